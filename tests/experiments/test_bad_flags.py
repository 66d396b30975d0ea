"""Bad values of the flags of every experiment are refused by `check`, before anything compiles."""

import dataclasses
import importlib
import math
import types
import typing
from pathlib import Path

import jax
import pytest
import tyro

from jcnf._checks import InputError

THERE = Path(__file__)  # an existing file, for paths whose content `check` does not read
KINDS = {
    "adjoints": ["Adjoints"],
    "benchmark": ["Benchmark"],
    "conditional": ["Conditional"],
    "density": ["Density"],
    "energy": ["MatchEnergy"],
    "energy_sweep": ["EnergySweep"],
    "estimators": ["Estimators"],
    "flow_matching": ["FlowMatching"],
    "gaussian_1d": ["Gaussian1D"],
    "images": ["Digits", "FFJORDMnist", "RNODEMnist", "FFJORDCifar10", "FlowMnist"],
    "imputation": ["Imputation"],
    "inpaint": ["Inpaint"],
    "latent": ["Latent"],
    "nice": ["PlaneNICE", "DigitsNICE", "MNISTNICE", "PaperNICE"],
    "ood": ["OOD"],
    "ot_flow": ["OTFlow"],
    "picture": ["Picture"],
    "reflow": ["Reflow"],
    "six_gaussians": ["SixGaussians"],
    "spiral": ["Spiral"],
    "tabular": ["Tabular"],
    "toy2d": ["Toy2D"],
    "two_circles": ["TwoCircles"],
}
NEEDED = {
    "Density": {"data": THERE},
    "Imputation": {"data": THERE},
    "Inpaint": {"from_run": THERE},
    "OOD": {"from_run": THERE},
    "Tabular": {"suite": "digits"},
}
HOSTILE = {
    int: (-1, 2**31),
    float: (math.nan, math.inf, -1.0, 1e30),
    str: ("nonsense",),
    tuple[int, ...]: ((), (0,), (-1,), (2**31,)),
    tuple[float, ...]: ((), (math.nan,), (math.inf,), (1e30,)),
    tuple[str, ...]: (("nonsense",),),
    tuple[float, float, float, float]: ((math.nan,) * 4, (1.0, -1.0, 0.0, 1.0)),
    tuple[tuple[str, float], ...]: tuple(
        ((name, weight),)
        for name, weight in [("nonsense", 1.0), ("kinetic", math.nan), ("kinetic", -1.0)]
    ),
}
FINE = {  # values that are valid, or whose mistake shows only when the file is read
    ("clip", math.inf): "no clipping",
    ("clip", 1e30): "no clipping",
    ("drop", ("nonsense",)): "columns are known only when the table is read",
    ("context", ("nonsense",)): "columns are known only when the table is read",
    ("time_dims", ()): "nothing is timed",
    ("widths", ()): "an affine field or network",
}
AFFINE = {"Gaussian1D", "SixGaussians", "Spiral", "PlaneNICE"}
AFFINE |= {"DigitsNICE", "MNISTNICE", "PaperNICE"}


def kind_of(experiment, name):
    return getattr(importlib.import_module(f"experiments.{experiment}"), name)


def hostile(hint):
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return [value for part in typing.get_args(hint) for value in hostile(part)]
    return list(HOSTILE.get(hint, ()))


def sweep(kind):
    """Yield every setting with every hostile value of its type."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        for value in hostile(hints[field.name]):
            fine = (field.name, value) in FINE
            if not fine or (field.name == "widths" and kind.__name__ not in AFFINE):
                yield field.name, value


@pytest.mark.parametrize(
    "name", [(e, kind) for e, kinds in KINDS.items() for kind in kinds], ids=str
)
def test_no_hostile_value_of_a_setting_is_taken(name):
    kind, accepted, unclear = kind_of(*name), [], []
    for field, value in sweep(kind):
        try:
            kind(**NEEDED.get(name[1], {}) | {field: value}).check()
            accepted.append((field, value))
        except InputError as error:
            words = (field.replace("_", "-").removesuffix("-run").removesuffix("s"), "nonsense")
            if not any(word in str(error) for word in words):
                unclear.append((field, value, str(error)))
    assert not accepted
    assert not unclear


BAD = {
    "nothing to resume": ("toy2d", "Toy2D", "--resume", ["--resume needs --out"]),
    "pictures without a place": ("images", "Digits", "--resume", ["--resume needs --out"]),
    "a flow of the digits": ("images", "Digits", "--channels", ["--channels", "1"]),
    "alpha of nothing": ("images", "Digits", "--alpha 1e-300", ["alpha", "1e-300"]),
    "alpha below rounding": ("images", "Digits", "--alpha 1e-9", ["alpha", "1e-7"]),
    "a way of light years": ("toy2d", "Toy2D", "--t1 1e30", ["--t1", "1000"]),
    "a way of nothing": ("toy2d", "Toy2D", "--t1 1e-30", ["--t1", "0.001"]),
    "couplings without end": ("nice", "PlaneNICE", "--couplings 100000", ["--couplings", "1000"]),
    "steps beyond memory": ("toy2d", "Toy2D", "--max-steps 1000000000", ["--max-steps"]),
    "steps of 1.5": ("toy2d", "Toy2D", "--steps 1.5", ["--steps"]),
    "a word for a rate": ("toy2d", "Toy2D", "--learning-rate fast", ["--learning-rate"]),
    "no such flag": ("toy2d", "Toy2D", "--nonsense 3", ["--nonsense"]),
    "planar of three widths": (
        "toy2d",
        "Toy2D",
        "--field planar --widths 8 8 8",
        ["two widths", "(8, 8, 8)"],
    ),
    "a fixed step beyond the end": (
        "toy2d",
        "Toy2D",
        "--objective likelihood --fixed-step 3",
        ["--fixed-step", "at most", "got 3"],
    ),
    "a tolerance beyond float32": (
        "toy2d",
        "Toy2D",
        "--objective likelihood --rtol 1e-9 --atol 1e-9",
        ["1e-09", "float32", "JAX_ENABLE_X64"],
    ),
    "test tolerance beyond float32": (
        "toy2d",
        "Toy2D",
        "--test-tolerance 1e-9",
        ["--test-tolerance", "float32", "JAX_ENABLE_X64"],
    ),
    "a tolerance beyond float64": (
        "toy2d",
        "Toy2D",
        "--x64 --test-tolerance 1e-17",
        ["--test-tolerance", "float64"],
    ),
    "float32 audited beyond itself": (
        "adjoints",
        "Adjoints",
        "--x64 --float32-at 1e-9",
        ["--float32-at", "float32"],
    ),
    "a posterior of float32": ("latent", "Latent", "--rtol 1e-10 --atol 1e-10", ["float32"]),
    "chains beyond float32": ("imputation", "Imputation", "--data t --tolerance 1e-9", ["float64"]),
    "steer beyond the end": (
        "toy2d",
        "Toy2D",
        "--objective likelihood --steer 2",
        ["steer", "[0, 1.0)"],
    ),
    "warm-up of -1": ("toy2d", "Toy2D", "--warmup -1", ["--warmup"]),
    "an average of 1": ("toy2d", "Toy2D", "--average 1", ["--average"]),
    "a NaN penalty": (
        "toy2d",
        "Toy2D",
        "--objective likelihood --regularizers kinetic nan",
        ["--regularizers", "kinetic"],
    ),
    "a penalty twice": (
        "toy2d",
        "Toy2D",
        "--objective likelihood --regularizers kinetic 1 kinetic 2",
        ["twice", "kinetic"],
    ),
    "hjb of a resnet": (
        "toy2d",
        "Toy2D",
        "--objective likelihood --regularizers hjb 1",
        ["hjb", "potential"],
    ),
    "more orthogonal probes than dimensions": (
        "toy2d",
        "Toy2D",
        "--objective likelihood --divergence hutchinson --noise orthogonal --probes 3",
        ["at most 2 probes"],
    ),
    "draws beyond the chain": (
        "imputation",
        "Imputation",
        "--data t --draws 200",
        ["--draws", "--chain-steps"],
    ),
    "guidance of NaN": ("conditional", "Conditional", "--guidance nan", ["--guidance"]),
    "no strength of guidance": ("conditional", "Conditional", "--guidance", ["--guidance"]),
    "a budget of no time": ("flow_matching", "FlowMatching", "--budgets 0", ["--budgets"]),
    "Euler steps of none": ("reflow", "Reflow", "--euler-steps", ["--euler-steps"]),
    "windows that fall": ("spiral", "Spiral", "--shortest 3 --longest 2", ["shortest", "longest"]),
    "a pull to the loosest": ("adjoints", "Adjoints", "--loosest 9 --tightest 3", ["--tightest"]),
    "seconds for a peer": ("tabular", "Tabular", "--suite digits --peer-seconds -1", ["--peer"]),
    "a suite of nobody": ("tabular", "Tabular", "--suite mnist", ["'mnist'", "power"]),
    "a run of nobody": ("inpaint", "Inpaint", "", ["--from"]),
    "a flow of nobody": (
        "estimators",
        "Estimators",
        "--from nowhere",
        ["nowhere", "checkpoint"],
    ),
    "no run to hold anything against": ("ood", "OOD", "", ["--from"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_are_refused(name, capsys):
    experiment, kind, line, words = BAD[name]
    with jax.enable_x64(False):
        try:
            tyro.cli(kind_of(experiment, kind), args=line.split()).check()
            said = "taken"
        except InputError as error:
            said = str(error)
        except SystemExit:
            said = " ".join(capsys.readouterr().err.split())
    for word in words:
        assert word in said


def test_x64_makes_finer_tolerances_possible():
    kind = kind_of("toy2d", "Toy2D")
    with jax.enable_x64(False):
        kind(x64=True, test_tolerance=1e-9, steps=1).check()
        kind(test_tolerance=1e-7, steps=1).check()
