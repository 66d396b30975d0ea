"""Measure held-out likelihood on real tables: the MAF suite as published, digits, or any table.

    python -m experiments.tabular table:digits --steps 1500
    python -m experiments.tabular table:suite --suite power --data FOLDER
    python -m experiments.tabular table:file --data table.csv

`experiments.density use` reads these runs too, and `experiments.tables` compares models of tables.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from experiments._runner.cli import main
from experiments._runner.config import Loop, Run, Training
from experiments._runner.fields import FlowSettings
from experiments._runner.objectives import FlowMatching, Objective
from experiments._runner.settings import choice
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
from jcnf.data.images import load_digits_table
from jcnf.data.tables import Table, load_maf_suite


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
    """A table, and the flow that learns it."""

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


def run(settings: Tabular) -> None:
    """Train and measure the flow."""
    learn_table("tabular", settings, settings.table.load(settings.run.seed))


if __name__ == "__main__":
    main(run, Tabular)
