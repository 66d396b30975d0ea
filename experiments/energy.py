"""Match a density that is known but for its scale, exp(-U) / Z, without a sample of it.

By reverse KL (Chen et al. 2018, section 5.1 and figure 4), a planar flow unless told otherwise.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from experiments._runner.cli import main
from experiments._runner.config import MANY, preset
from experiments._runner.flow_config import FitSettings, FlowSettings
from experiments._runner.loop import fit
from experiments._runner.progress import progress
from experiments._runner.run_dir import RunDir
from experiments._runner.stages import DrawOf, Stage, drawing
from experiments._tasks import figures
from jcnf import CNF, Solve, evaluate, objectives, plot
from jcnf._checks import InputError
from jcnf.data import energies
from jcnf.data.energies import Energy, Integral

VALIDATION_POINTS = 5000
CELLS = 300  # an axis, of the grid on which densities are integrated
MARGIN = 0.25  # of the extent at each side, where a flow may have mass that the target has not
# A KL is not negative. One that is, by more than sampling explains, is of a flow too stiff for its
# solve, whose log-densities are wrong.
NOISE = 0.1  # nats, of a validation
STDERRS, ROUNDING = 5, 1e-3  # standard errors and nats, of the final figure
BORDER = 1e-4  # share of a density near its window's border, above which some is outside


@preset
class EnergySettings(FlowSettings):
    """The flow that learns a density from its energy, and how it is measured: a planar one by the
    one objective reverse_kl."""

    # fresh samples of the flow that are measured
    test_points: int = 20_000
    # steps before the others by the energy U / --temperature, whose modes hang together: what a
    # flow leaves out of the density at first it does not find later
    hot_steps: int = 1000
    # that of the steps of --hot-steps
    temperature: float = 5.0

    objective = "reverse_kl"
    field = "planar"
    widths = (32, 32)
    t1 = 10.0
    steps = 3000
    batch = 512
    learning_rate = 3e-3

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work."""
        if self.steer or self.finetune_steps:
            raise InputError("--steer and --finetune-steps are of likelihood: there are no data")
        self.at_least(0, "hot_steps")
        self.positive("temperature")
        super().check()
        self.at_least(2, "test_points", most=MANY)
        self.check_objective(dim=2)
        if self.temperature != type(self)().temperature and not self.hot_steps:
            raise InputError("--temperature would change nothing: of use with --hot-steps alone")

    def uses(self) -> set[str]:
        """The parts of the settings that these ones put to use."""
        # Solves, divergence and penalties are those of likelihood.
        return super().uses() | {"likelihood"}

    @property
    def loss_units(self) -> str:
        """What the training loss is measured in."""
        return "nats"

    def make_energy(self) -> Energy:
        """What is learnt."""
        raise NotImplementedError

    def make_objectives(self) -> dict[str, Callable]:
        """What --objective can name."""
        return {"reverse_kl": self.make_reverse_kl()}

    def make_reverse_kl(self, temperature: float = 1.0) -> Callable:
        """Reverse KL to exp(-U / temperature) by the training solve."""
        function = self.make_energy().function
        return functools.partial(
            objectives.reverse_kl,
            energy=lambda x: function(x) / temperature,
            solve=self.make_solve(),
            divergence=self.make_divergence(),
            penalties=self.make_penalties(),
        )

    def make_stages(self) -> list[Stage]:
        """Training by a tempered energy, by the energy, and by L-BFGS."""
        stages = super().make_stages()
        if not self.hot_steps:
            return stages
        hot = stages[0]._replace(
            objective=objectives.with_context(self.make_reverse_kl(self.temperature)),
            steps=self.hot_steps,
            optimizer=self.make_optimizer(self.hot_steps, self.learning_rate),
        )
        return [hot, *stages]


@preset
class MatchEnergy(EnergySettings, FitSettings):
    """An energy, and the flow that learns its density."""

    # u1, u2, u3, u4, or module:function: one of yours, of x (batch, 2), giving U in nats (batch,)
    # by operations of jax.numpy
    target: str = "u1"
    # module:function: lowest and highest z1, lowest and highest z2 of a window that holds its mass
    extent: tuple[float, float, float, float] | None = None

    validate_every = 500

    @functools.cached_property
    def _energy(self) -> Energy:
        return energies.energy(self.target, self.extent)

    def make_energy(self) -> Energy:
        """What is learnt."""
        return self._energy


class Matched(NamedTuple):
    """How near a flow has come to a density."""

    metrics: dict[str, float]
    samples: np.ndarray  # of the flow, those that arrived
    certificate: evaluate.Certificate  # of its log-densities at them
    failures: int  # samples that did not arrive
    warnings: list[str]  # what is wrong with these numbers


def run(settings: MatchEnergy) -> None:
    """Train, measure on fresh samples and on a grid, draw the figures."""
    energy = settings.make_energy()
    integral = integrated(energy)
    run_dir = RunDir("energy", settings, resume=settings.resume)
    flow = settings.make_flow(2)
    keys = jr.split(jr.fold_in(jr.key(settings.seed), 2), 4)
    validation = flow.base.sample(keys[0], VALIDATION_POINTS)
    solve, quick = settings.make_test_solve(), settings.make_validation_solve()
    fitted = fit(
        run_dir,
        settings,
        flow,
        draw_of=base_samples(flow),
        data=None,
        validate=lambda flow: possible(
            float(free_energy(flow, validation, energy, quick)) + integral.log, NOISE
        ),
        score="val_kl",
    )
    flow = fitted.flow
    run_dir.save_flow(flow, {})

    with progress(f"measuring on {settings.test_points} fresh samples"):
        matched = measure(flow, energy, integral, keys[1], settings.test_points, solve)
        view = evaluate.grid(flow, energy.extent, solve=solve)
    metrics = matched.metrics
    with progress("drawing figures"):
        figures.plane(
            run_dir,
            flow,
            target_samples(energy, len(matched.samples), settings.seed),
            matched.samples,
            view,
            key=keys[2],
            solve=solve,
            title=f"{energy.name}: reverse KL {metrics['reverse_kl']:.4f} nats, "
            f"ESS {100 * metrics['ess']:.1f} %; the data are of the target's grid",
            true_log_density=-np.asarray(energy.function(view.points)).reshape(view.log_prob.shape)
            - integral.log,
        )
        run_dir.save_figures(
            training=plot.training_curves(fitted.records, loss_units=settings.loss_units)
        )
    numerics = matched.certificate.numerics() | {
        "samples_failed": matched.failures,
        **fitted.numerics(),
    }
    warnings = matched.warnings
    if integral.border > BORDER:
        warnings.append(
            f"a share of {integral.border:.1e} of exp(-U) is near the border of the extent: what "
            "is outside is missing in Z; widen --extent"
        )
    run_dir.finish(metrics, numerics, fitted.timing, warnings)


def integrated(energy: Energy) -> Integral:
    """log Z by quadrature; raises `InputError` where it is not finite."""
    integral = energies.integrate(energy)
    if not math.isfinite(integral.log):
        raise InputError(f"{energy.name} is not finite all over its extent: give it a steep wall")
    return integral


def base_samples(flow: CNF) -> DrawOf:
    """Batches of fresh samples of the base."""
    return drawing(lambda key, num: flow.base.sample(key, num))


@eqx.filter_jit
def free_energy(flow: CNF, z: Array, energy: Energy, solve: Solve) -> Array:
    """E_q[log q + U] at base samples `z`, nats; NaN where their solve failed."""
    value, metrics = objectives.reverse_kl(flow, z, energy=energy.function, solve=solve)
    return jnp.where(metrics["failed_rows"] > 0, jnp.nan, value)


def measure(
    flow: CNF,
    energy: Energy,
    integral: Integral,
    key: Key[Array, ""],
    num: int,
    solve: Solve,
) -> Matched:
    """KL, effective sample size and importance weights of `num` fresh samples; KL of the target.

    What the flow misses is in no sample of it: `forward_kl` is an integral over a grid, of the
    target's density times its log-ratio to the flow's. Consumes `key`.
    """
    drawn = evaluate.draw(flow, key, num, solve=solve)
    x = drawn.x[-1][~drawn.failed]
    certificate = evaluate.certify(
        flow, jnp.asarray(x), solve=solve, extent=widened(energy.extent), cells=CELLS
    )
    log_q = certificate.scores.log_prob.astype(np.float64)
    u = np.asarray(energy.function(jnp.asarray(x)), np.float64)
    known = ~certificate.scores.failed
    log_w = (-u - integral.log - log_q)[known]  # of the density ratio p / q
    top = log_w.max()
    w = np.exp(log_w - top)
    stderr = evaluate.standard_error(log_w)
    metrics = {
        "reverse_kl": possible(float(-np.mean(log_w)), STDERRS * stderr + ROUNDING),
        "reverse_kl_stderr": stderr,
        "forward_kl": forward_kl(certificate.grid, energy, integral),
        "ess": float(np.sum(w) ** 2 / (len(w) * np.sum(w**2))),
        "log_z": integral.log,
        "log_z_importance": float(np.log(np.mean(w)) + top + integral.log),
        "log_z_importance_stderr": evaluate.standard_error(w) / float(np.mean(w)),
    }
    warnings = certificate.warnings()
    if math.isnan(metrics["reverse_kl"]):
        metrics |= dict.fromkeys(("forward_kl", "ess", "log_z_importance"), math.nan)
        warnings.append(
            f"E_q[log q + U] + log Z is {-np.mean(log_w):.3g}, and no KL: the flow is too stiff "
            "for its solve; train with a smaller --clip, or smaller --rtol and --atol"
        )
    return Matched(metrics, x, certificate, drawn.failures, warnings)


def possible(kl: float, noise: float) -> float:
    """A KL, nats, or NaN where it is more negative than noise makes it."""
    return kl if kl >= -noise else math.nan


def widened(extent: energies.Extent) -> energies.Extent:
    """The extent with a margin on each side."""
    a, b, c, d = extent
    across, up = MARGIN * (b - a), MARGIN * (d - c)
    return a - across, b + across, c - up, d + up


def forward_kl(grid: evaluate.Grid | None, energy: Energy, integral: Integral) -> float:
    """KL(p || q) in nats, by the midpoint rule; NaN where q is not known though p has mass."""
    assert grid is not None  # in two dimensions there is one
    a, b, c, d = grid.extent
    area = (b - a) * (d - c) / grid.log_prob.size
    log_p = -np.asarray(energy.function(grid.points), np.float64) - integral.log
    p = np.exp(log_p)
    some = p * area > 1e-12
    return float(np.sum((p * (log_p - grid.log_prob.ravel()))[some]) * area)


def target_samples(energy: Energy, num: int, seed: int) -> np.ndarray:
    """Samples (num, 2) of the target for a picture: of cells by their mass, uniform in each."""
    points = energies.cell_grid(energy.extent, CELLS).reshape(-1, 2)
    log_p = -np.asarray(energy.function(jnp.asarray(points, float)), np.float64)
    p = np.exp(log_p - log_p.max())
    rng = np.random.default_rng(seed)
    a, b, c, d = energy.extent
    jitter = (rng.random((num, 2)) - 0.5) * np.array([b - a, d - c]) / CELLS
    return points[rng.choice(len(points), num, p=p / p.sum())] + jitter


if __name__ == "__main__":
    main(run, MatchEnergy)
