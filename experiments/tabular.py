"""Measure held-out likelihood on real tables: the MAF suite as published, digits, or any table."""

import dataclasses
import functools

import jax.numpy as jnp

from experiments import density
from experiments._runner.cli import main
from experiments._tasks.spline_flow import require_flowjax, train_spline_flow
from experiments.density import Density
from jcnf import evaluate, training
from jcnf._checks import InputError
from jcnf.data.images import load_digits_table
from jcnf.data.tables import MAF_SUITE, Table, load_maf_suite

DIGITS = "digits"
PEER_BATCH = 512
MAX_PEER_SECONDS = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tabular(Density):
    """A table, the flow that learns it, and the spline flow to compare with."""

    # table to measure: digits (scikit-learn's, 8x8), or one of the MAF suite, with its raw files in
    # the folder --data: power, gas, hepmass, miniboone, bsds300
    suite: str | None = None
    # training seconds of a neural spline flow (flowjax) on the same split; 0 for none
    peer_seconds: float = 0.0

    def check(self) -> None:
        if self.from_run is not None:
            raise InputError("give --from to experiments.density, which reads runs of tabular too")
        known = (DIGITS, *MAF_SUITE)
        if self.suite is not None and self.suite not in known:
            raise InputError(f"unknown suite '{self.suite}': use one of {', '.join(known)}")
        if self.suite != DIGITS and self.data is None:
            raise InputError("give --data PATH, or --suite digits")
        if self.suite == DIGITS and self.data is not None:
            raise InputError("--suite digits comes with scikit-learn: leave out --data")
        super().check()
        if not 0 <= self.peer_seconds <= MAX_PEER_SECONDS:
            raise InputError(
                f"--peer-seconds must be from 0 to {MAX_PEER_SECONDS}; got {self.peer_seconds}"
            )
        if self.peer_seconds:
            require_flowjax()
            if self.context:
                raise InputError(
                    "--peer-seconds trains a spline flow, which takes no context: leave it out, or "
                    "leave out --context"
                )
        if self.suite is not None and (self.drop or self.dequantize):
            raise InputError("--suite has its own preprocessing: leave out --drop and --dequantize")

    def needs_data(self) -> bool:
        return self.suite != DIGITS

    def load(self) -> Table:
        if self.suite == DIGITS:
            return load_digits_table()
        if self.suite is None:
            return super().load()
        assert self.data is not None  # by `check`
        return load_maf_suite(self.suite, self.data)


def run(settings: Tabular) -> None:
    """Train and measure the flow, then the spline flow if asked for."""
    table = settings.load()
    peers = functools.partial(peer, settings, table) if settings.peer_seconds else dict
    density.train_and_measure("tabular", settings, table, peers)


def peer(settings: Tabular, table: Table) -> dict[str, float]:
    """Train a neural spline flow on the table; return its test NLL (nats), time and size."""
    rows, val, test = (jnp.asarray(part, float) for part in (table.train, table.val, table.test))
    trained = train_spline_flow(
        training.draw_rows(PEER_BATCH),
        rows,
        seconds=settings.peer_seconds,
        seed=settings.seed,
        val=val,
    )
    log_prob = trained.log_prob(test)
    return {
        "spline_nll": float(-log_prob.mean()),
        "spline_nll_stderr": evaluate.standard_error(log_prob),
        "spline_seconds": trained.seconds,
        "spline_steps": trained.steps,
        "spline_parameters": trained.parameters,
    }


if __name__ == "__main__":
    main(run, Tabular)
