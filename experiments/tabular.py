"""Measure held-out likelihood on real tables: the MAF suite as published, digits, or any table.

    python -m experiments.tabular table:digits --peer-seconds 180
    python -m experiments.tabular table:suite --suite power --data FOLDER
    python -m experiments.tabular table:file --data table.csv

`experiments.density use` reads these runs too.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp

from experiments._runner.cli import main
from experiments._runner.config import Loop, Run, Training
from experiments._runner.fields import FlowSettings
from experiments._runner.objectives import FlowMatching, Objective
from experiments._runner.settings import Range, choice
from experiments._tasks.spline_flow import require_flowjax, train_spline_flow
from experiments._tasks.tables import (
    FLOW,
    LOOP,
    TRAINING,
    TableExperiment,
    TableFile,
    TableMeasure,
    TableSource,
    learn_table,
)
from jcnf import evaluate, training
from jcnf.data.images import load_digits_table
from jcnf.data.tables import Table, load_maf_suite

PEER_BATCH = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(TableSource):
    """The 8x8 digits of scikit-learn."""

    def load(self, seed: int) -> Table:
        return load_digits_table()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAFSuite(TableSource):
    """A table of the MAF suite, preprocessed and split as published."""

    # folder with the raw files
    data: Path
    # name of the table
    suite: Literal["power", "gas", "hepmass", "miniboone", "bsds300"]

    @property
    def path(self) -> Path:
        return self.data

    def load(self, seed: int) -> Table:
        return load_maf_suite(self.suite, self.data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tabular(TableExperiment):
    """A table, the flow that learns it, and the spline flow to compare with."""

    # training seconds of a neural spline flow (flowjax) on the same split; 0 for none
    peer_seconds: Annotated[float, Range(0, 100_000)] = 0.0

    table: (
        Annotated[Digits, choice("table:digits")]
        | Annotated[MAFSuite, choice("table:suite")]
        | Annotated[TableFile, choice("table:file")]
    ) = Digits()
    objective: Objective = FlowMatching()
    flow: FlowSettings = FLOW
    training: Training = TRAINING
    measure: TableMeasure = TableMeasure()
    loop: Loop = LOOP
    run: Run = Run()

    def check(self) -> None:
        super().check()
        if self.peer_seconds and self.table.context:
            raise ValueError(
                "--peer-seconds trains a spline flow, which takes no context: leave out "
                "--peer-seconds or --context"
            )

    def trace(self) -> None:
        if self.peer_seconds:
            require_flowjax()


def run(settings: Tabular) -> None:
    """Train and measure the flow, then the spline flow if asked for."""
    table = settings.table.load(settings.run.seed)
    peers = functools.partial(peer, settings, table) if settings.peer_seconds else dict
    learn_table("tabular", settings, table, peers=peers)


def peer(settings: Tabular, table: Table) -> dict[str, float]:
    """Train a neural spline flow on the table; return its test NLL (nats), time and size."""
    rows, val, test = (jnp.asarray(part, float) for part in (table.train, table.val, table.test))
    trained = train_spline_flow(
        training.draw_rows(PEER_BATCH),
        rows,
        seconds=settings.peer_seconds,
        seed=settings.run.seed,
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
