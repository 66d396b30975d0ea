"""Learn a density in the plane: the eight toy sets of FFJORD."""

import dataclasses

import jax
import jax.random as jr
import numpy as np

from experiments.figures import plane
from experiments.harness import main
from experiments.loop import fit
from experiments.rundir import RunDir
from experiments.settings import FitSettings, FlowSettings
from experiments.stages import drawing
from jcnf import evaluate, plot
from jcnf.data.toys import toy

VALIDATION_POINTS = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToySettings(FlowSettings):
    """A toy density and the flow that learns it."""

    # 8gaussians, 2spirals, checkerboard, pinwheel, moons, circles, swissroll, rings
    data: str = "8gaussians"
    # fresh points for the held-out NLL
    test_points: int = 20_000

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work."""
        super().check()
        toy(self.data)
        self.at_least(2, "test_points")
        self.at_least(1, "lbfgs_batch")
        self.check_objective(dim=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy2D(FitSettings, ToySettings):
    """A toy density and the flow that learns it."""


def square(half: float) -> tuple[float, float, float, float]:
    """The extent [-half, half]^2."""
    return -half, half, -half, half


def run(settings: Toy2D) -> None:
    """Train, measure on fresh points, draw the figures."""
    density = toy(settings.data)
    run_dir = RunDir("toy2d", settings, resume=settings.resume)
    val_key, test_key, sample_key, plot_key = jr.split(jr.fold_in(jr.key(settings.seed), 2), 4)
    sample = jax.jit(density.sample, static_argnums=1)
    validation = sample(val_key, VALIDATION_POINTS)
    solve, quick = settings.make_test_solve(), settings.make_validation_solve()
    fitted = fit(
        run_dir,
        settings,
        settings.make_flow(2),
        draw_of=drawing(density.sample),
        data=None,
        validate=lambda flow: evaluate.score(flow, validation, solve=quick).nll,
    )
    flow = fitted.flow
    run_dir.save_flow(flow, {})

    print(f"measuring on {settings.test_points} fresh points, drawing the figures")
    test = sample(test_key, settings.test_points)
    # The window of the figures may cut off what a model puts outside it.
    certificate = evaluate.certify(
        flow, test, solve=solve, extent=square(2 * density.extent), cells=300
    )
    scores = certificate.scores
    gaps = np.asarray(density.log_prob(test)) - scores.log_prob
    samples = evaluate.draw(flow, sample_key, settings.test_points, solve=solve)
    view = evaluate.grid(flow, square(density.extent), solve=solve)
    metrics = {
        "test_nll": scores.nll,
        "test_nll_stderr": scores.stderr,
        "nll_gap": float(np.mean(gaps)),
        "nll_gap_stderr": evaluate.standard_error(gaps),
        "entropy": density.entropy,
    }
    plane(
        run_dir,
        flow,
        np.asarray(test),
        samples.x[-1],
        view,
        key=plot_key,
        solve=solve,
        title=f"{settings.data}: held-out NLL {scores.nll:.3f} nats, gap {metrics['nll_gap']:.3f}",
        true_log_density=np.asarray(density.log_prob(view.points)).reshape(view.log_prob.shape),
    )
    run_dir.save_figures(
        training=plot.training_curves(fitted.records, loss_units=settings.loss_units)
    )
    numerics = certificate.numerics() | {"skipped_updates": fitted.skipped}
    run_dir.finish(metrics, numerics, fitted.timing, certificate.warnings())


if __name__ == "__main__":
    main(run, Toy2D)
