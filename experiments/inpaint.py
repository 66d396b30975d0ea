"""Fill in the covered half of test images by the density that a run of nice or images learned.

    python -m experiments.inpaint --from RUN_DIR
    python -m experiments.inpaint --from RUN_DIR method:langevin --known left

The known pixels are kept. The covered ones climb the log-density with noise, or are sampled given
the known ones. For a run of images the pixels are updated as logits, and an estimated divergence
keeps one draw of its noise; the log-densities of the summary are of pixels. The figure shows the
images at several stages. To fill in missing entries of tables, see `experiments.density use`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from tyro.conf import arg

from experiments._runner.cli import main
from experiments._runner.config import Experiment, Run, check_reachable
from experiments._runner.run_dir import RunDir, kind_of, load_flow
from experiments._runner.settings import Count, NonNegative, Positive, Settings, choice
from experiments._tasks.image_data import held_out, pick_rows
from experiments._tasks.images import ImageExperiment, one_hot
from jcnf import evaluate, plot
from jcnf._checks import InputError
from jcnf.divergence import FixedNoise
from jcnf.evaluate.log_prob import full_precision
from jcnf.flows import Chain, Composition, Logit
from jcnf.inference import inpaint, mala


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ascend(Settings):
    """Gradient of the log-density plus noise, NICE's rule.

    The steps are 10 / (100 + i) of each pixel's spread.
    """

    # standard deviation of the noise
    noise: NonNegative = 1.0

    def make(self, steps: int, bounds: tuple[float, float] | None) -> Callable:
        """Return the method, with pixels clipped to the bounds."""
        return partial(inpaint.ascend, steps=steps, noise=self.noise, bounds=bounds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Langevin(Settings):
    """Samples of the covered half given the known one, Metropolis-adjusted.

    It first takes as many steps again to tune their sizes.
    """

    def make(self, steps: int, bounds: tuple[float, float] | None) -> Callable:
        """Return the method, which needs no bounds."""
        return partial(mala.langevin, steps=steps, burn_in=steps, step=0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inpaint(Experiment):
    """A finished run, and how to cover and fill in its test images."""

    # finished run of nice on images, or of images
    from_run: Annotated[Path, arg(name="from")]
    # half that stays known
    known: Literal["top", "bottom", "left", "right"] = "top"
    # number of test images to fill in
    count: Count = 10
    # number of steps
    steps: Count = 1000
    # number of stages to draw
    stages: Count = 6
    # relative and absolute tolerance of the solves (NICE has no solves)
    tolerance: Positive = 1e-3

    method: (
        Annotated[Ascend, choice("method:ascend")] | Annotated[Langevin, choice("method:langevin")]
    ) = Ascend()
    run: Run = Run()

    def check(self) -> None:
        super().check()
        check_reachable("tolerance", self.tolerance)
        if self.stages > self.steps:
            raise ValueError(
                f"--stages {self.stages} is more than --steps {self.steps}: ask for fewer stages"
            )


def run(settings: Inpaint) -> None:
    """Cover halves of test images, fill them in, compare with the truth, and draw the stages."""
    kind = kind_of(settings.from_run)
    if not issubclass(kind, ImageExperiment):
        raise InputError(
            f"{settings.from_run} is not a run on images; to fill in missing entries of a table, "
            "use experiments.density use --from RUN_DIR --impute TABLE"
        )
    flow, trained, _ = load_flow(settings.from_run, kind)
    images, solve = trained.images.load(), trained.measure.make_validation_solve()
    divergence, chunk = trained.measure.make_divergence(), trained.measure.chunk
    run_dir = RunDir("inpaint", settings)
    root = jr.fold_in(jr.key(settings.run.seed), 6)
    truth_key, start_key, noise_key, spread_key, score_key, key = jr.split(root, 6)
    truth = held_out(images.test, images.levels, settings.count, truth_key)
    rows = pick_rows(len(images.test), settings.count)
    known = jnp.asarray(inpaint.half(images.shape, settings.known))
    context = one_hot(images, "test", trained.classes, rows)
    # Start covered halves from samples of the flow, where its density is neither 0 nor flat.
    sampled = evaluate.sample(flow, start_key, len(truth), context=context, solve=solve)
    start = jnp.where(known[None], truth, jnp.clip(np.nan_to_num(sampled.x[-1]), 1e-3, 1 - 1e-3))
    noise = flow.bijection.draw_noise(divergence, noise_key, *truth.shape, truth.dtype)
    tolerance = settings.tolerance
    # Most pixels are black or white, where steps would stop at a bound. Logits have no bounds.
    inner, there, back = _unbounded(flow)
    log_prob = mala.Density(
        inner,
        context,
        dataclasses.replace(solve, rtol=tolerance, atol=tolerance),
        FixedNoise(divergence, noise),
    )
    few = held_out(images.train, images.levels, 1000, spread_key)
    method = settings.method.make(settings.steps, (0.0, 1.0) if inner is flow else None)
    scale = jnp.std(there(few), axis=0)
    fill = eqx.filter_jit(full_precision(method))
    filled: Any = fill(log_prob, there(start), known, key, keep=settings.stages, scale=scale)
    ends = [jnp.where(known[None], truth, back(x)) for x in filled.x]

    def mean_log_prob(x):
        """Return the mean log-density of pixels, with fresh noise of the divergence."""
        scored = evaluate.log_prob(
            flow,
            x,
            key=score_key,
            context=context,
            solve=solve,
            divergence=divergence,
            chunk=chunk,
        )
        return -scored.nll

    def rmse(x):
        return float(np.sqrt(np.mean((x - truth)[:, ~np.asarray(known)] ** 2)))

    covered = np.where(np.asarray(known)[None], truth, 0.5)
    steps = mala.kept_steps(settings.steps, settings.stages)
    columns = [truth, covered, start, *ends]
    sheet = np.stack([np.asarray(x) for x in columns], axis=1).reshape(-1, truth.shape[1])
    title = f"test image, known half, start, steps {', '.join(map(str, steps))}"
    figure = plot.image_grid([(title, sheet)], images.shape, columns=len(columns))
    run_dir.save_figures(stages=figure)
    metrics = {
        "rmse_start": rmse(start),
        "rmse": rmse(ends[-1]),
        "rmse_mean_image": rmse((images.train.mean(axis=0)[None] + 0.5) / images.levels),
        "log_prob_truth": mean_log_prob(truth),
        "log_prob_start": mean_log_prob(start),
        "log_prob": mean_log_prob(ends[-1]),
    }
    if isinstance(settings.method, Langevin):
        metrics["acceptance"] = float(np.mean(filled.acceptance))
    run_dir.finish(metrics, {"failed_steps": int(np.sum(filled.failed))}, {})


def _unbounded(flow):
    """Split off the logit that a flow ends with: the rest, and the maps to and from logits."""
    chain = flow.bijection
    *parts, logit = chain.parts if isinstance(chain, Composition) else [chain]
    if not isinstance(logit, Logit):
        return flow, jnp.asarray, jnp.asarray

    def along(direction):
        return lambda x: logit.both(jnp.asarray(x), direction)[0]

    return Chain(parts, flow.base), along("to_base"), along("to_data")


if __name__ == "__main__":
    main(run, Inpaint)
