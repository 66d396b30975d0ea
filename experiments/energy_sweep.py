"""Measure KL against the number of units of a planar flow (Chen et al. 2018, figure 4).

    python -m experiments.energy_sweep --targets u1 u2 --units 2 8

All other settings are shared by the flows, one for each target and number of units.
"""

import dataclasses
import functools
import typing
from typing import Annotated

import jax.random as jr
from jaxtyping import Array, Key

from experiments._runner.cli import main
from experiments._runner.config import PointMeasure, Run, Training
from experiments._runner.fields import FlowSettings
from experiments._runner.flow_config import FlowExperiment
from experiments._runner.metrics_log import MetricsLog
from experiments._runner.run_dir import RunDir
from experiments._runner.settings import MAX_WIDTH, Range, Settings, Width
from experiments._runner.stages import train_stages
from experiments._tasks.energies import (
    EnergyName,
    ReverseKL,
    base_batches,
    integrated,
    measure,
)
from jcnf import fields
from jcnf.data.energies import ENERGIES, Energy
from jcnf.plot import CurvePanel, scaling

METRICS = ("reverse_kl", "reverse_kl_stderr", "forward_kl", "ess")
NUMERICS = ("mass", "nfe_backward", "solver_failures", "skipped_updates")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetKLs(ReverseKL):
    """Reverse KL divergence to the density of each energy, by ODE solves."""

    # energies to learn
    targets: tuple[EnergyName, ...] = typing.get_args(EnergyName)

    @functools.cached_property
    def energy(self) -> Energy:
        """The first of the energies."""
        return ENERGIES[self.targets[0]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanarSizes(Settings):
    """Planar fields of several sizes."""

    # numbers of units M
    units: Annotated[tuple[int, ...], Range(1, MAX_WIDTH, min_length=1)] = (2, 8, 32)
    # width of the hypernetwork
    hyper_width: Width = 32

    def make(self, dim: int, context_dim: int, key: Key[Array, ""]) -> fields.Planar:
        """Return the untrained field with the first number of units."""
        return fields.Planar(dim, self.units[0], self.hyper_width, key=key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanarFlows(FlowSettings):
    """The flows: their fields, base distribution and end time."""

    field: PlanarSizes = PlanarSizes()  # pyright: ignore[reportIncompatibleVariableOverride]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergySweep(FlowExperiment):
    """Energies, numbers of units, and the settings that all flows share."""

    objective: TargetKLs = TargetKLs()
    flow: PlanarFlows = PlanarFlows(t1=10.0)
    training: Training = Training(steps=3000, batch=512, learning_rate=3e-3)
    measure: PointMeasure = PointMeasure(test_points=20_000)
    run: Run = Run()

    def check(self) -> None:
        for name, values in (
            ("targets", self.objective.targets),
            ("units", self.flow.field.units),
        ):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} needs at least one value, none twice; got {values}")
        super().check()

    def trace(self) -> None:
        self.trace_objectives(2)

    def for_flow(self, target: EnergyName, units: int) -> "EnergySweep":
        """Return the settings for this target and number of units alone."""
        objective = dataclasses.replace(self.objective, targets=(target,))
        field = dataclasses.replace(self.flow.field, units=(units,))
        flow = dataclasses.replace(self.flow, field=field)
        return dataclasses.replace(self, objective=objective, flow=flow)


def run(settings: EnergySweep) -> None:
    """Train and measure a flow for each target and number of units; draw KL against units."""
    run_dir = RunDir("energy_sweep", settings)
    log = MetricsLog(run_dir.log, [], 0)
    key = jr.fold_in(jr.key(settings.run.seed), 2)
    results: dict[str, dict[str, float]] = {}
    warnings = []
    targets, units = settings.objective.targets, sorted(settings.flow.field.units)
    solve = settings.measure.make_solve()
    for target in targets:
        integral = integrated(ENERGIES[target])
        for count in units:
            one = settings.for_flow(target, count)
            flow = one.make_flow(2)
            trained = train_stages(flow, one.make_stages(), base_batches(flow), seed=one.run.seed)
            num = one.measure.test_points
            found = measure(trained.flow, ENERGIES[target], integral, key, num, solve)
            figures = found.metrics | {
                "mass": found.report.numerics()["mass"],
                "nfe_backward": found.report.nfe_backward,
                "solver_failures": found.failures + found.report.failures,
                "skipped_updates": trained.skipped,
                "seconds": trained.seconds,
            }
            results[f"{target}_{count}"] = figures
            warnings += [f"{target}, {count} units: {text}" for text in found.warnings]
            log.add({"step": len(results), "target": target, "units": count, **figures})
            shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            print(f"{target}, {count} units: {shown}")

    def curves(name):
        return {
            target: (units, [results[f"{target}_{count}"][name] for count in units])
            for target in targets
        }

    panels = [
        CurvePanel("KL(q || p), the loss", "units M", "nats", curves("reverse_kl")),
        CurvePanel("KL(p || q), on a grid", "units M", "nats", curves("forward_kl")),
    ]
    run_dir.save_figures(units=scaling(panels))
    run_dir.write_json("results.json", results)

    def every(name):
        return {f"{name}_{place}": figures[name] for place, figures in results.items()}

    run_dir.finish(
        {key: value for name in METRICS for key, value in every(name).items()},
        {key: value for name in NUMERICS for key, value in every(name).items()},
        {place: figures["seconds"] for place, figures in results.items()},
        warnings,
    )


if __name__ == "__main__":
    main(run, EnergySweep)
