"""A variational autoencoder of 8x8 digits, its posterior refined by a CNF or not (FFJORD, 4.3).

For each seed four models p(x | z), q(z | x), by the same steps on the same batches. "gaussian": q
is N(mean, diag scale^2). "flow": the same networks from the same initial weights, and a CNF that
makes of the Gaussian what it can. "wider": a Gaussian whose encoder has about as many parameters as
that. "refined": the trained "gaussian" as it is, whose CNF alone is trained; its decoder, and with
it log p(x), is fixed, so that what its bound gains is what KL(q || p(z | x)) loses.

Bounds are in nats a picture. Pixels are binary, drawn with their grey value for probability, and
the likelihood Bernoulli, as of MNIST; fresh ones for each batch keep 1,079 pictures from being
learnt by heart. Or (--no-binary) they are what they were made as, the number of black ones among 16
pixels of a scanned digit, and the likelihood Binomial.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from experiments._runner.cli import main
from experiments._runner.config import WIDEST, LoopSettings, SolveSettings, preset
from experiments._runner.loop import Fitted, fit
from experiments._runner.run_dir import RunDir
from experiments._runner.stages import Stage
from experiments._tasks.vae_figures import Measured, draw
from jcnf import evaluate, fields, objectives, training
from jcnf._checks import InputError
from jcnf.data.images import load_images
from jcnf.evaluate import standard_error
from jcnf.flows import ODE
from jcnf.flows.vae import VAE, Binomial, Encoder, Posterior
from jcnf.training import checkpoint

MODELS = ("gaussian", "wider", "flow", "refined")
PAIRS = [("wider", "gaussian"), ("flow", "gaussian"), ("refined", "gaussian"), ("flow", "wider")]
TRIALS = 16
SCORE = "val_negative_elbo"
VALIDATION_SAMPLES = 16  # of z for each picture
ACTIVE = 0.01  # variance over pictures of E[z | x] in an active unit (Burda et al. 2016, 4.2)


@preset
class Latent(LoopSettings, SolveSettings):
    """The autoencoder, its posterior, and how often all is done.

    Train by solves to a tolerance: with two fixed steps of rk4 a flow learnt to profit by their
    error, and its ELBO in training was no bound.
    """

    # seeds compared, from --seed on
    seeds: int = 3
    # dimension of z
    latent: int = 8
    # width of the two hidden layers of the encoder, and so the number of its features
    hidden: int = 128
    # the same of the encoder of "wider"
    wider: int = 216
    # width of the two hidden layers of the decoder
    decoder: int = 128
    # hidden widths of the posterior's field
    widths: tuple[int, ...] = (64, 64)
    # how time enters it: ignore, concat, squash, concatsquash, hyper, blend
    time: str = "concatsquash"
    # how the encoder's features enter it: concat, modulate
    conditioning: str = "modulate"
    # pixels are 1 with the grey value for probability, drawn anew for each training batch and once
    # for validation and test, as is usual with MNIST; otherwise a grey value is a count of 16
    binary: bool = True
    # samples of z for each picture of the test part
    samples: int = 128

    has_table = True
    steps = 2500
    batch = 128
    learning_rate = 5e-3
    weight_decay = 0.03
    average = 0.99
    log_every = 100
    checkpoint_every = 1000
    validate_every = 250

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work, before anything is compiled."""
        super().check()
        self.at_least(1, "seeds", "samples")
        self.at_least(1, "latent", "hidden", "wider", "decoder", most=WIDEST)
        self.sizes("widths", fewest=1)
        if self.seed + self.seeds > 2**31:
            raise InputError("--seed and --seeds go beyond 2147483647: lower one of them")
        if self.lbfgs_steps and self.adjoint == "forward":
            raise InputError("L-BFGS takes gradients by reverse mode: choose another --adjoint")
        self.check_steps(1.0)
        try:
            self.make_stages()
            eqx.filter_eval_shape(self.make_vae, 1, self.make_refinement())
        except ValueError as error:
            raise InputError(str(error)) from None

    def of_seed(self, seed: int, folder: Path) -> "Latent":
        """The settings of one seed, in a folder of its own."""
        return dataclasses.replace(self, seed=seed, out=folder / f"seed{seed}")

    def _key(self, part: int):
        return jr.fold_in(jr.fold_in(jr.key(self.seed), 0), part)

    def make_vae(self, dim: int, refine: ODE | None = None, *, wider: bool = False) -> VAE:
        """The untrained model of pictures of `dim` pixels."""
        trunk_key, head_key, decoder_key = (self._key(part) for part in range(3))
        mlp = functools.partial(eqx.nn.MLP, activation=jax.nn.silu)
        width = self.wider if wider else self.hidden
        trunk = mlp(dim, width, width, 1, final_activation=jax.nn.silu, key=trunk_key)
        encoder = Encoder(trunk, width, self.latent, key=head_key)
        decoder = mlp(self.latent, dim, self.decoder, 2, key=decoder_key)
        return VAE(
            Posterior(encoder, self.latent, refine), decoder, Binomial(1 if self.binary else TRIALS)
        )

    def make_refinement(self) -> ODE:
        """A field at rest: at first it leaves the Gaussian posterior as it is."""
        field = fields.MLP(
            self.latent,
            self.widths,
            time=self.time,
            context_dim=self.hidden,
            conditioning=self.conditioning,
            key=self._key(3),
        )
        last = jax.tree.map(jnp.zeros_like, field.layers[-1])
        return ODE(eqx.tree_at(lambda field: field.layers[-1], field, last))

    def draw_of(self, num: int | None) -> training.DrawBatch:
        """So many pictures."""
        rows = training.draw_rows(num)

        def binary_rows(key, pictures):
            row_key, pixel_key = jr.split(key)
            return binarised(pixel_key, rows(row_key, pictures))

        return binary_rows if self.binary else rows

    def make_stages(self) -> list[Stage]:
        """The ELBO, and L-BFGS where there are steps for it."""
        return self.stages_of(objectives.elbo)

    def stages_of(self, objective: Any) -> list[Stage]:
        """Training by an objective that takes a `solve`."""
        solve = self.make_solve()
        stage = Stage(
            functools.partial(objective, solve=solve),
            self.steps,
            self.make_optimizer(self.steps, self.learning_rate),
            solve,
            self.average,
            self.batch,
        )
        return self.then_lbfgs([stage])

    @property
    def loss_units(self) -> str:
        """What the training loss is measured in."""
        return "nats"


def run(settings: Latent) -> None:
    """Train the models for each seed, measure their bounds, draw what they make."""
    images = load_images("digits")
    parts = {"train": images.train, "val": images.val, "test": images.test}
    pictures = {part: jnp.asarray(rows / TRIALS, float) for part, rows in parts.items()}
    if settings.binary:
        for part, seed in {"val": 0, "test": 1}.items():
            pictures[part] = binarised(jr.key(seed), pictures[part])
    run_dir = RunDir("latent", settings, resume=settings.resume)
    solve = settings.make_test_solve()
    seeds = range(settings.seed, settings.seed + settings.seeds)
    found: list[dict[str, Measured]] = []
    for seed in seeds:
        one = settings.of_seed(seed, run_dir.path)
        fits = train_models(one, pictures, run_dir)
        key = jr.fold_in(jr.key(seed), 2)
        print(f"seed {seed}: bounds by {settings.samples} samples of z a picture")
        found.append({})
        for name, fitted in fits.items():
            bounds = evaluate.bounds(
                fitted.flow, pictures["test"], key, samples=settings.samples, solve=solve
            )
            found[-1][name] = Measured(fitted, bounds)
            print(f"{name}: ELBO {np.mean(bounds.elbo):.3f}")
    metrics = {name: value for model in MODELS for name, value in figures_of(model, found)}
    for pair in PAIRS:
        metrics |= gains(*pair, found, seeds)
    numerics: dict[str, float] = {
        "solver_failures": sum(int(m.bounds.failed.sum()) for each in found for m in each.values()),
        "skipped_updates": sum(m.fitted.skipped for each in found for m in each.values()),
        "rollbacks": sum(m.fitted.rollbacks for each in found for m in each.values()),
    }
    timing: dict[str, float] = {}
    for model in MODELS:
        numerics[f"nfe_{model}"] = mean_of(model, found, lambda m: m.bounds.nfe)
        timing[f"train_s_{model}"] = mean_of(model, found, lambda m: m.fitted.timing["train_s"])
    draw(run_dir, settings, found[0], images.shape, pictures["test"])
    warning = "some solves of the bounds failed: their numbers are missing"
    run_dir.finish(metrics, numerics, timing, [warning] if numerics["solver_failures"] else [])


def binarised(key: Key[Array, ""], pictures: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
    """0 or 1, the latter with the probability that a grey value in [0, 1] is; consumes `key`."""
    return jr.bernoulli(key, pictures).astype(pictures.dtype)


def train_models(settings: Latent, pictures: dict[str, Array], whole: RunDir) -> dict[str, Fitted]:
    """The models of one seed, in run directories of their own."""
    dim = pictures["train"].shape[1]
    key, quick = jr.fold_in(jr.key(settings.seed), 3), settings.make_validation_solve()

    def trained(name, model, whole=lambda model: model):
        """`model` trained as a part of the VAE that `whole` makes of it."""

        def objective(model, x, key, solve):
            return objectives.elbo(whole(model), x, key, solve=solve)

        def validate(model):
            found = evaluate.bounds(
                whole(model), pictures["val"], key, samples=VALIDATION_SAMPLES, solve=quick
            )
            return -float(np.mean(found.elbo))

        path = settings.out / name
        own = dataclasses.replace(settings, out=path, resume=(path / "config.json").exists())
        run_dir = RunDir("latent", own, resume=own.resume, part_of=whole)
        fitted = fit(
            run_dir,
            own,
            model,
            own.draw_of,
            pictures["train"],
            validate,
            score=SCORE,
            stages=own.stages_of(objective),
        )
        fitted = fitted._replace(flow=whole(fitted.flow))
        checkpoint.save(
            run_dir.path / "vae.jcnf", training.partition(fitted.flow)[0], {"model": name}
        )
        return fitted

    gaussian = trained("gaussian", settings.make_vae(dim))
    return {
        "gaussian": gaussian,
        "wider": trained("wider", settings.make_vae(dim, wider=True)),
        "flow": trained("flow", settings.make_vae(dim, settings.make_refinement())),
        "refined": trained(
            "refined", settings.make_refinement(), functools.partial(refined_by, gaussian.flow)
        ),
    }


def refined_by(model: VAE, refine: ODE) -> VAE:
    """`model`, its Gaussian posterior refined."""
    return eqx.tree_at(
        lambda model: model.posterior.refine, model, refine, is_leaf=lambda leaf: leaf is None
    )


def mean_of(model: str, found: list[dict[str, Measured]], figure: Callable) -> float:
    """The mean over seeds of a figure of one model."""
    return float(np.mean([figure(each[model]) for each in found]))


def figures_of(model: str, found: list[dict[str, Measured]]) -> Iterator[tuple[str, float]]:
    """Means over seeds of a model's figures, in nats a picture."""
    figures = {
        "elbo": lambda m: np.mean(m.bounds.elbo),
        "reconstruction": lambda m: -np.mean(m.bounds.log_likelihood),
        "kl": lambda m: np.mean(m.bounds.log_ratio),
        "iwae": lambda m: np.mean(iwae(m.bounds)),
        "active": lambda m: np.sum(np.var(m.bounds.mean, axis=0) > ACTIVE),
        "parameters": lambda m: sum(
            leaf.size for leaf in jax.tree.leaves(training.partition(m.fitted.flow)[0])
        ),
    }
    for name, figure in figures.items():
        yield f"{name}_{model}", mean_of(model, found, figure)


def iwae(bounds: evaluate.Bounds) -> np.ndarray:
    """By all samples."""
    return bounds.iwae(bounds.log_ratio.shape[1])


def gains(
    model: str, other: str, found: list[dict[str, Measured]], seeds: Iterable[int]
) -> dict[str, float]:
    """Bounds of a model less those of another, picture by picture, with standard errors."""
    result = {}
    for name, bound in {"elbo": lambda bounds: bounds.elbo, "iwae": iwae}.items():
        name = f"{name}_{model}_over_{other}"
        gain = np.stack([bound(m[model].bounds) - bound(m[other].bounds) for m in found])
        for seed, each in zip(seeds, gain, strict=True):
            result[f"{name}_seed{seed}"] = float(np.mean(each))
            result[f"{name}_seed{seed}_stderr"] = standard_error(each)
        result[name] = float(np.mean(gain))
        # Over pictures, for these seeds.
        result[f"{name}_stderr"] = standard_error(np.mean(gain, axis=0))
    return result


if __name__ == "__main__":
    main(run, Latent)
