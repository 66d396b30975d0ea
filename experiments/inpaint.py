"""Fill in the covered half of test images by the density that a run of nice or images learned.

The known pixels are kept. The covered ones climb the log-density with noise (--way ascend, NICE's
rule) or are sampled given the known ones (--way langevin, Metropolis-adjusted). For a run of images
the pixels are updated as logits, and an estimated divergence keeps one draw of its noise; the
log-densities of the summary are of pixels. The figure shows the images at several stages. To fill
in missing entries of tables, use `experiments.density --impute`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro

from experiments._runner.cli import main
from experiments._runner.config import MAX_COUNT, RunSettings, SolveSettings
from experiments._runner.run_dir import RunDir, kind_of, load_flow
from experiments._tasks.image_data import held_out, some
from experiments._tasks.images import ImageLoop, one_hot
from jcnf import evaluate, plot
from jcnf._checks import InputError
from jcnf.divergence import FixedNoise
from jcnf.evaluate.log_prob import full_precision
from jcnf.flows import Chain, Composition, Logit
from jcnf.inference import inpaint

WAYS = ("ascend", "langevin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inpaint(RunSettings):
    """A finished run, and how to cover and fill in its test images."""

    # finished run of nice on images, or of images
    from_run: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    # half that stays known: top, bottom, left, right
    known: str = "top"
    # way to fill in: ascend (NICE's rule: gradient of the log-density plus noise, in steps of
    # 10 / (100 + i) of each pixel's spread), langevin (samples of the covered half given the known)
    way: str = "ascend"
    # test images to fill in
    count: int = 10
    # steps; langevin first takes as many again to tune its step sizes
    steps: int = 1000
    # stages to draw
    stages: int = 6
    # ascend: standard deviation of the noise
    noise: float = 1.0
    # relative and absolute tolerance of the solves; NICE has no solves
    tolerance: float = 1e-3

    def check(self) -> None:
        super().check()
        self.at_least(1, "count", "steps", "stages", most=MAX_COUNT)
        self.at_least(0, "noise")
        self.reachable("tolerance")
        if self.from_run is None:
            raise InputError("--from RUN_DIR is missing: name a finished run of nice or images")
        if self.way not in WAYS:
            raise InputError(f"unknown way '{self.way}': use one of {', '.join(WAYS)}")
        if self.stages > self.steps:
            raise InputError(
                f"--stages {self.stages} is more than --steps {self.steps}: ask for fewer stages"
            )
        if self.noise != type(self).noise and self.way != "ascend":
            raise InputError(
                f"--noise only affects --way ascend: leave it out with --way {self.way}"
            )
        try:
            inpaint.half((2, 2, 1), self.known)
        except ValueError as error:
            raise InputError(f"--known: {error}") from None


def run(settings: Inpaint) -> None:
    """Cover halves of test images, fill them in, compare with the truth, and draw the stages."""
    assert settings.from_run is not None  # by `check`
    kind = kind_of(settings.from_run)
    if not issubclass(kind, ImageLoop):
        raise InputError(
            f"{settings.from_run} is not a run on images; to fill in missing entries of a table, "
            "use experiments.density --from RUN_DIR --impute TABLE"
        )
    flow, trained, _ = load_flow(settings.from_run, kind)
    if settings.tolerance != type(settings).tolerance and not isinstance(trained, SolveSettings):
        raise InputError(
            f"--tolerance has no effect: {settings.from_run} solves no ODE; leave out --tolerance"
        )
    images, measure = trained.load(), trained.make_measure()
    run_dir = RunDir("inpaint", settings)
    root = jr.fold_in(jr.key(settings.seed), 6)
    truth_key, start_key, noise_key, spread_key, score_key, key = jr.split(root, 6)
    truth = held_out(images.test, images.levels, settings.count, truth_key)
    rows = some(len(images.test), settings.count)
    known = jnp.asarray(inpaint.half(images.shape, settings.known))
    context = one_hot(images, "test", trained.classes, rows)
    # Start covered halves from samples of the flow, where its density is neither 0 nor flat.
    sampled = evaluate.sample(flow, start_key, len(truth), context=context, solve=measure.quick)
    start = jnp.where(known[None], truth, jnp.clip(np.nan_to_num(sampled.x[-1]), 1e-3, 1 - 1e-3))
    noise = flow.bijection.draw_noise(measure.divergence, noise_key, *truth.shape, truth.dtype)
    tolerance = settings.tolerance
    # Most pixels are black or white, where steps would stop at a bound. Logits have no bounds.
    inner, there, back = _unbounded(flow)
    log_prob = inpaint.Density(
        inner,
        context,
        dataclasses.replace(measure.quick, rtol=tolerance, atol=tolerance),
        FixedNoise(measure.divergence, noise),
    )
    few = held_out(images.train, images.levels, 1000, spread_key)
    shared: Any = {
        "steps": settings.steps,
        "keep": settings.stages,
        "scale": jnp.std(there(few), axis=0),
    }
    if settings.way == "ascend":
        shared |= {"noise": settings.noise, "bounds": (0.0, 1.0) if inner is flow else None}
        march: Any = inpaint.ascend
    else:
        shared |= {"burn_in": settings.steps, "step": 0.1}
        march = inpaint.langevin
    march = eqx.filter_jit(full_precision(march))
    filled: Any = march(log_prob, there(start), known, key, **shared)
    ends = [jnp.where(known[None], truth, back(x)) for x in filled.x]

    def mean_log_prob(x):  # of pixels, with fresh noise
        scored = evaluate.log_prob(
            flow,
            x,
            key=score_key,
            context=context,
            solve=measure.quick,
            divergence=measure.divergence,
            chunk=measure.chunk,
        )
        return -scored.nll

    def rmse(x):
        return float(np.sqrt(np.mean((x - truth)[:, ~np.asarray(known)] ** 2)))

    covered = np.where(np.asarray(known)[None], truth, 0.5)
    steps = inpaint.kept_steps(settings.steps, settings.stages)
    columns = [truth, covered, start, *ends]
    sheet = np.stack([np.asarray(x) for x in columns], axis=1).reshape(-1, truth.shape[1])
    title = f"test image, known half, start, steps {', '.join(map(str, steps))}"
    figure = plot.gallery([(title, sheet)], images.shape, columns=len(columns))
    run_dir.save_figures(stages=figure)
    metrics = {
        "rmse_start": rmse(start),
        "rmse": rmse(ends[-1]),
        "rmse_mean_picture": rmse((images.train.mean(axis=0)[None] + 0.5) / images.levels),
        "log_prob_truth": mean_log_prob(truth),
        "log_prob_start": mean_log_prob(start),
        "log_prob": mean_log_prob(ends[-1]),
    }
    if settings.way == "langevin":
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
