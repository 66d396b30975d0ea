"""Fill in the covered half of test pictures, by the density a run has learnt of pictures.

Of a run of nice or images: the known pixels are held, and the others go up the log-density with
noise (--way ascend, NICE's rule) or are sampled given the known ones (--way langevin, Metropolis-
adjusted). Of images all this is in the logits of the pixels, of which the log-densities of the
summary are too; an estimated divergence keeps one draw of its noise. The figure has the pictures at
several stages. Missing entries of tables are filled in by `experiments.density --impute`.
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
from experiments._runner.config import MANY, RunSettings, SolveSettings
from experiments._runner.run_dir import RunDir, kind_of, load_flow
from experiments._tasks.image_data import held_out, some
from experiments._tasks.images import ImageLoop, one_hot
from jcnf import Solve, evaluate, plot
from jcnf._checks import InputError
from jcnf.divergence import Drawn
from jcnf.evaluate.log_prob import full_precision
from jcnf.flows import Chain, Logit
from jcnf.inference import inpaint

WAYS = ("ascend", "langevin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inpaint(RunSettings):
    """A trained run, and how its pictures are covered and filled in."""

    # finished run of nice or images on pictures
    from_run: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    # the half that is known: top, bottom, left, right
    known: str = "top"
    # ascend (NICE's: the log-density's gradient and noise, step 10 / (100 + i) in units of the
    # pixels' spread), langevin (samples of the covered half given the known one)
    way: str = "ascend"
    # test pictures
    count: int = 10
    # steps; of langevin, as many before them to find its step sizes
    steps: int = 1000
    # stages drawn
    stages: int = 6
    # ascend: deviation of the noise
    noise: float = 1.0
    # tolerance of the solves; NICE has none
    tolerance: float = 1e-3

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work, before anything is compiled."""
        super().check()
        self.at_least(1, "count", "steps", "stages", most=MANY)
        self.at_least(0, "noise")
        self.reachable("tolerance")
        if self.from_run is None:
            raise InputError("give --from RUN_DIR: a finished run of nice or images")
        if self.way not in WAYS:
            raise InputError(f"unknown way '{self.way}': use one of {', '.join(WAYS)}")
        if self.stages > self.steps:
            raise InputError(f"--stages {self.stages} of --steps {self.steps}: ask for fewer")
        if self.noise != type(self).noise and self.way != "ascend":
            raise InputError("--noise would change nothing: of use with --way ascend alone")
        try:
            inpaint.half((2, 2, 1), self.known)
        except ValueError as error:
            raise InputError(f"--known: {error}") from None


def run(settings: Inpaint) -> None:
    """Cover, fill in, compare with what was there, draw."""
    assert settings.from_run is not None  # by `check`
    kind = kind_of(settings.from_run)
    if not issubclass(kind, ImageLoop):
        raise InputError(
            f"{settings.from_run} is no run on pictures; fill in a table's missing entries by "
            "experiments.density --from RUN_DIR --impute TABLE"
        )
    flow, trained, _ = load_flow(settings.from_run, kind)
    if settings.tolerance != type(settings).tolerance and not isinstance(trained, SolveSettings):
        raise InputError(f"--tolerance would change nothing: {settings.from_run} has no solves")
    images, measure = trained.load(), trained.make_measure()
    run_dir = RunDir("inpaint", settings)
    root = jr.fold_in(jr.key(settings.seed), 6)
    truth_key, start_key, noise_key, spread_key, score_key, key = jr.split(root, 6)
    truth = held_out(images.test, images.levels, settings.count, truth_key)
    rows = some(len(images.test), settings.count)
    known = jnp.asarray(inpaint.half(images.shape, settings.known))
    context = one_hot(images, "test", trained.classes, rows)
    # Covered halves start from the flow's own samples, where its density is neither 0 nor flat.
    sampled = evaluate.draw(flow, start_key, len(truth), context=context, solve=measure.quick)
    start = jnp.where(known[None], truth, jnp.clip(np.nan_to_num(sampled.x[-1]), 1e-3, 1 - 1e-3))
    noise = flow.draw_noise(measure.divergence, noise_key, *truth.shape, truth.dtype)
    tolerance = settings.tolerance
    # Most pixels are black or white: steps there would end at a bound, and logits have none.
    inner, there, back = _unbounded(flow)
    log_prob = inpaint.Density(
        inner,
        context,
        dataclasses.replace(measure.quick, rtol=tolerance, atol=tolerance),
        Drawn(measure.divergence, noise),
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

    def mean_log_prob(x):  # of pixels, with other noise than that of the way there
        scored = evaluate.score(
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
    title = f"test picture, what is known, start, steps {', '.join(map(str, steps))}"
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
    """The flow without the logit that it ends in, if any, and the ways into its space and back."""
    if not (isinstance(flow, Chain) and isinstance(flow.parts[-1], Logit)):
        return flow, jnp.asarray, jnp.asarray
    *parts, logit = flow.parts

    def along(direction):
        return lambda x: logit.carry(jnp.asarray(x), direction, None, Solve())[0]

    return Chain(parts, flow.base), along("to_base"), along("to_data")


if __name__ == "__main__":
    main(run, Inpaint)
