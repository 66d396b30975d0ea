"""Places on the earth, from tables with columns of latitudes and longitudes in degrees."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jcnf._checks import InputError, list_rows
from jcnf.data.tables import read_raw

LATITUDES = ("latitude", "lat")
LONGITUDES = ("longitude", "long", "lon", "lng")
HELD_OUT = 0.1  # for validation, and as much for the test
DIGITS = 6  # of degrees, to tell places apart: a millionth of a degree is 0.1 m


class Split(NamedTuple):
    """The indices of rows."""

    train: Int[np.ndarray, " train"]
    val: Int[np.ndarray, " val"]
    test: Int[np.ndarray, " test"]


class Places(NamedTuple):
    """Places as unit vectors, of which several may be the same."""

    points: Float[np.ndarray, "n 3"]
    place: Int[np.ndarray, " n"]  # number of the place of each row, from 0

    @classmethod
    def of(cls, degrees: Float[np.ndarray, "n 2"]) -> "Places":
        """Return the places of latitudes and longitudes."""
        latitude, longitude = np.round(degrees, DIGITS).T
        longitude = np.where(np.abs(latitude) == 90, 0, np.round(longitude % 360, DIGITS) % 360)
        _, place = np.unique(np.stack([latitude, longitude], 1), axis=0, return_inverse=True)
        return cls(to_points(degrees), place.reshape(-1))

    def split(self, protocol: str, seed: int) -> Split:
        """Hold out a tenth for validation and a tenth for the test, at random.

        The protocol "random" splits the rows, as published figures do, and "distinct" the places:
        then rows of the same place are never on both sides.

        **Raises:** `InputError` if there are too few rows or places for three parts.
        """
        rng = np.random.default_rng(seed)
        unit = np.arange(len(self.place)) if protocol == "random" else self.place
        number = int(unit.max()) + 1
        size = round(HELD_OUT * number)
        if size == 0:
            what = "rows" if protocol == "random" else "distinct places"
            raise InputError(f"{number} {what} are too few to hold out some: give at least 6")
        part = np.empty(number, int)
        part[rng.permutation(number)] = np.minimum(np.arange(number) // size, 2)
        found = part[unit]
        return Split(*(rng.permutation(np.flatnonzero(found == i)) for i in (2, 1, 0)))

    def leaked(self, split: Split) -> float:
        """Return the share of test rows whose exact place is among the training rows."""
        return float(np.isin(self.place[split.test], self.place[split.train]).mean())


def read_places(path: Path) -> Places:
    """Read a table whose columns of latitudes and longitudes in degrees are found by their names.

    Longitudes may run from -180 to 180 or from 0 to 360.

    **Raises:** `InputError` for a table without these columns, and for values out of range.
    """
    raw = read_raw(path)
    columns = [_column(raw, names) for names in (LATITUDES, LONGITUDES)]
    raw = raw.take(columns)
    degrees = np.concatenate(list(raw.parts.values()))
    for name, x, low, high in zip(raw.columns, degrees.T, (-90, -180), (90, 360), strict=True):
        if (out := (x < low) | (x > high)).any():
            raise InputError(
                f"{path}: {name} must be from {low} to {high} degrees; got {x[out][0]:g} in "
                f"{list_rows(np.flatnonzero(out), len(out))}: correct them"
            )
    return Places.of(degrees)


def to_points(degrees: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 3"]:
    """Return unit vectors: the first axis points to 0 degrees, the third to the north pole."""
    latitude, longitude = np.deg2rad(degrees).T
    across = np.cos(latitude)
    return np.stack([across * np.cos(longitude), across * np.sin(longitude), np.sin(latitude)], 1)


def to_degrees(points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 2"]:
    """Return latitudes and longitudes, from -180 to 180."""
    latitude = np.arctan2(points[:, 2], np.hypot(points[:, 0], points[:, 1]))
    return np.rad2deg(np.stack([latitude, np.arctan2(points[:, 1], points[:, 0])], 1))


def _column(raw, names):
    lower = [name.lower() for name in raw.columns]
    found = [lower.index(name) for name in names if name in lower]
    if len(found) != 1:
        raise InputError(
            f"{raw.path}: expected one column named {' or '.join(names)}; the columns are "
            f"{', '.join(raw.columns)}: name the columns latitude and longitude"
        )
    return found[0]
