"""Train variational autoencoders of 8x8 digits, with and without a CNF posterior (FFJORD, 4.3).

For each seed, four models p(x | z), q(z | x) take the same steps on the same batches:

- gaussian: q is N(mean, diag scale^2)
- flow: the same networks from the same initial weights, and a CNF that transforms the Gaussian
- wider: a Gaussian whose encoder has about as many parameters as the posterior of "flow"
- refined: the trained "gaussian", frozen, with a CNF trained on top; its decoder, and with it
  log p(x), is fixed, so that the bound gains exactly what KL(q || p(z | x)) loses

Bounds are in nats per image. Pixels are binary, as is usual with MNIST: each is 1 with its gray
value as probability, and the likelihood is Bernoulli. Fresh draws for each batch keep the models
from memorizing the 1,079 training images. With --no-binary a pixel is its original value, the
number of black pixels among 16 of the scanned digit, and the likelihood is binomial.
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
from experiments._runner.config import MAX_WIDTH, LoopSettings, SolveSettings, preset
from experiments._runner.loop import FitResult, fit
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
TRIALS = 16  # of the binomial likelihood: a gray value counts black pixels among 16
SCORE = "val_negative_elbo"
VALIDATION_SAMPLES = 16  # of z for each image
# A latent unit is active if E[z | x] varies more over images (Burda et al. 2016, section 4.2).
ACTIVE_UNIT_VARIANCE = 0.01


@preset
class Latent(LoopSettings, SolveSettings):
    """The autoencoder, its posterior, and how many seeds to compare.

    Solve to a tolerance in training. With two fixed steps of rk4 a flow learned to exploit their
    error, and its training ELBO was not a bound.
    """

    # number of seeds to compare, from --seed on
    seeds: int = 3
    # dimension of z
    latent: int = 8
    # width of the two hidden layers of the encoder, which is also the number of its features
    hidden: int = 128
    # width of the encoder of the model "wider"
    wider: int = 216
    # width of the two hidden layers of the decoder
    decoder: int = 128
    # hidden widths of the posterior's field
    widths: tuple[int, ...] = (64, 64)
    # how time enters the field: ignore, concat, squash, concatsquash, hyper, blend
    time: str = "concatsquash"
    # how the encoder's features enter the field: concat, modulate
    conditioning: str = "modulate"
    # make a pixel 1 with its gray value as probability, drawn anew for each training batch and once
    # for validation and test; otherwise it is a count out of 16
    binary: bool = True
    # samples of z for each test image
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
        super().check()
        self.at_least(1, "seeds", "samples")
        self.at_least(1, "latent", "hidden", "wider", "decoder", most=MAX_WIDTH)
        self.sizes("widths", fewest=1)
        if self.seed + self.seeds > 2**31:
            raise InputError(
                f"the last seed, --seed {self.seed} plus --seeds {self.seeds}, exceeds 2147483647: "
                "lower one of them"
            )
        if self.lbfgs_steps and self.adjoint == "forward":
            raise InputError("L-BFGS needs reverse-mode gradients: choose another --adjoint")
        self.check_steps(1.0)
        try:
            self.make_stages()
            eqx.filter_eval_shape(self.make_vae, 1, self.make_refinement())
        except ValueError as error:
            raise InputError(str(error)) from None

    def of_seed(self, seed: int, folder: Path) -> "Latent":
        """Return the settings of one seed, whose run directory is a subfolder."""
        return dataclasses.replace(self, seed=seed, out=folder / f"seed{seed}")

    def _key(self, part: int):
        return jr.fold_in(jr.fold_in(jr.key(self.seed), 0), part)

    def make_vae(self, dim: int, refine: ODE | None = None, *, wider: bool = False) -> VAE:
        """Return an untrained model of images of `dim` pixels."""
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
        """Return a CNF that starts as the identity: the last layer of its field is 0."""
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
        """Return a function that draws batches of `num` images; None for all."""
        rows = training.draw_rows(num)

        def binary_rows(key, pictures):
            row_key, pixel_key = jr.split(key)
            return binarized(pixel_key, rows(row_key, pictures))

        return binary_rows if self.binary else rows

    def make_stages(self) -> list[Stage]:
        return self.stages_of(objectives.elbo)

    def stages_of(self, objective: Any) -> list[Stage]:
        """Return the stages of training by `objective`, which takes a `solve`."""
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
        return "nats"


def run(settings: Latent) -> None:
    """Train the models for each seed, measure their bounds, and draw their images."""
    images = load_images("digits")
    parts = {"train": images.train, "val": images.val, "test": images.test}
    pictures = {part: jnp.asarray(rows / TRIALS, float) for part, rows in parts.items()}
    if settings.binary:
        for part, seed in {"val": 0, "test": 1}.items():
            pictures[part] = binarized(jr.key(seed), pictures[part])
    run_dir = RunDir("latent", settings, resume=settings.resume)
    solve = settings.make_test_solve()
    seeds = range(settings.seed, settings.seed + settings.seeds)
    found: list[dict[str, Measured]] = []
    for seed in seeds:
        one = settings.of_seed(seed, run_dir.path)
        fits = train_models(one, pictures, run_dir)
        key = jr.fold_in(jr.key(seed), 2)
        print(f"seed {seed}: bounds by {settings.samples} samples of z per image")
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
    warning = "some solves of the bounds failed, so the metrics that need them are NaN"
    run_dir.finish(metrics, numerics, timing, [warning] if numerics["solver_failures"] else [])


def binarized(key: Key[Array, ""], pictures: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
    """Draw 1 with a gray value in [0, 1] as its probability, else 0; consumes `key`."""
    return jr.bernoulli(key, pictures).astype(pictures.dtype)


def train_models(
    settings: Latent, pictures: dict[str, Array], whole: RunDir
) -> dict[str, FitResult]:
    """Train the four models of one seed, each in its own run directory."""
    dim = pictures["train"].shape[1]
    key, quick = jr.fold_in(jr.key(settings.seed), 3), settings.make_validation_solve()

    def trained(name, model, make_vae=lambda model: model):
        """Train `model`, from which `make_vae` makes the VAE that the result holds."""

        def objective(model, x, key, solve):
            return objectives.elbo(make_vae(model), x, key, solve=solve)

        def validate(model):
            found = evaluate.bounds(
                make_vae(model), pictures["val"], key, samples=VALIDATION_SAMPLES, solve=quick
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
        fitted = fitted._replace(flow=make_vae(fitted.flow))
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
    """Return `model` with its Gaussian posterior refined by an ODE."""
    posterior = Posterior(model.posterior.bijection.encoder, model.posterior.dim, refine)
    return eqx.tree_at(lambda model: model.posterior, model, posterior)


def mean_of(model: str, found: list[dict[str, Measured]], figure: Callable) -> float:
    """Mean over seeds of a figure of one model."""
    return float(np.mean([figure(each[model]) for each in found]))


def figures_of(model: str, found: list[dict[str, Measured]]) -> Iterator[tuple[str, float]]:
    """Yield names and means over seeds of a model's figures; bounds are in nats per image."""
    figures = {
        "elbo": lambda m: np.mean(m.bounds.elbo),
        "reconstruction": lambda m: -np.mean(m.bounds.log_likelihood),
        "kl": lambda m: np.mean(m.bounds.log_ratio),
        "iwae": lambda m: np.mean(iwae(m.bounds)),
        "active": lambda m: np.sum(np.var(m.bounds.mean, axis=0) > ACTIVE_UNIT_VARIANCE),
        "parameters": lambda m: sum(
            leaf.size for leaf in jax.tree.leaves(training.partition(m.fitted.flow)[0])
        ),
    }
    for name, figure in figures.items():
        yield f"{name}_{model}", mean_of(model, found, figure)


def iwae(bounds: evaluate.Bounds) -> np.ndarray:
    """Importance-weighted bounds of each image from all samples, nats."""
    return bounds.iwae(bounds.log_ratio.shape[1])


def gains(
    model: str, other: str, found: list[dict[str, Measured]], seeds: Iterable[int]
) -> dict[str, float]:
    """Mean differences of two models' bounds, paired by image, nats, with standard errors."""
    result = {}
    for name, bound in {"elbo": lambda bounds: bounds.elbo, "iwae": iwae}.items():
        name = f"{name}_{model}_over_{other}"
        gain = np.stack([bound(m[model].bounds) - bound(m[other].bounds) for m in found])
        for seed, each in zip(seeds, gain, strict=True):
            result[f"{name}_seed{seed}"] = float(np.mean(each))
            result[f"{name}_seed{seed}_stderr"] = standard_error(each)
        result[name] = float(np.mean(gain))
        # Over images, for these seeds.
        result[f"{name}_stderr"] = standard_error(np.mean(gain, axis=0))
    return result


if __name__ == "__main__":
    main(run, Latent)
