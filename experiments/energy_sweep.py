"""Measure KL against the number of units of a planar flow (Chen et al. 2018, figure 4)."""

import dataclasses

import jax.random as jr

from experiments._runner.cli import main
from experiments._runner.metrics_log import MetricsLog
from experiments._runner.run_dir import RunDir
from experiments._runner.stages import train_stages
from experiments.energy import EnergySettings, MatchEnergy, base_samples, integrated, measure
from jcnf._checks import InputError
from jcnf.data.energies import ENERGIES, Energy, energy
from jcnf.plot import CurvePanel, scaling

METRICS = ("reverse_kl", "reverse_kl_stderr", "forward_kl", "ess")
NUMERICS = ("mass", "nfe_backward", "solver_failures", "skipped_updates")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergySweep(EnergySettings):
    """Energies, numbers of units, and the settings that all their flows share."""

    # energies to learn: u1, u2, u3, u4
    targets: tuple[str, ...] = tuple(ENERGIES)
    # numbers of units M, each in turn the first of the two --widths
    units: tuple[int, ...] = (2, 8, 32)

    def check(self) -> None:
        for name, values in (("targets", self.targets), ("units", self.units)):
            if not values or len(set(values)) < len(values):
                raise InputError(f"--{name} needs at least one value, none twice; got {values}")
        unknown = set(self.targets) - ENERGIES.keys()
        if unknown:
            raise InputError(
                f"unknown target '{min(unknown)}' in --targets: use {', '.join(ENERGIES)}, or "
                "experiments.energy for your own energy"
            )
        if self.field != "planar" or len(self.widths) != 2:
            raise InputError(
                "--units vary the planar field, which has two --widths; got "
                f"--field {self.field} --widths {' '.join(map(str, self.widths))}"
            )
        self.sizes("units", fewest=1)
        if self.widths[0] != type(self)().widths[0]:
            raise InputError(
                "--units replace the first of --widths: leave it at its default and give --units"
            )
        super().check()

    def make_energy(self) -> Energy:
        """Return the first energy: `check` needs one, and all have the same form."""
        return energy(self.targets[0])

    def of(self, target: str, units: int) -> MatchEnergy:
        """Return the settings of the flow of one target and number of units."""
        names = {field.name for field in dataclasses.fields(EnergySettings)}
        settings = {name: getattr(self, name) for name in names}
        return MatchEnergy(**settings | {"target": target, "widths": (units, self.widths[1])})


def run(settings: EnergySweep) -> None:
    """Train and measure a flow for each target and number of units; draw KL against units."""
    run_dir = RunDir("energy_sweep", settings)
    log = MetricsLog(run_dir.log, [], 0)
    key = jr.fold_in(jr.key(settings.seed), 2)
    results: dict[str, dict[str, float]] = {}
    warnings = []
    units = sorted(settings.units)
    for target in settings.targets:
        integral = integrated(energy(target))
        for count in units:
            one = settings.of(target, count)
            flow = one.make_flow(2)
            trained = train_stages(flow, one.make_stages(), base_samples(flow), seed=one.seed)
            solve = one.make_test_solve()
            found = measure(trained.flow, energy(target), integral, key, one.test_points, solve)
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
            for target in settings.targets
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
