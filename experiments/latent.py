"""Train variational autoencoders of 8x8 digits, with and without a CNF posterior (FFJORD, 4.3).

    python -m experiments.latent --seeds 1 --latent 2

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
from typing import Annotated, Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from experiments._runner.cli import main
from experiments._runner.config import Loop, LoopExperiment, Measure, Run, Training
from experiments._runner.fields import TimeLayer
from experiments._runner.loop import RunResult, fit
from experiments._runner.run_dir import RunDir
from experiments._runner.settings import MAX_LAYERS, MAX_WIDTH, Range, Settings, Steps, Width
from experiments._runner.solves import TrainingSolve
from experiments._runner.stages import Stage
from experiments._tasks.vae_figures import MeasuredVAE, draw
from jcnf import evaluate, fields, objectives, training
from jcnf.data.images import load_images
from jcnf.evaluate import standard_error
from jcnf.flows import ODE
from jcnf.flows.vae import VAE, Binomial, Encoder, Posterior
from jcnf.training import DrawBatch, checkpoint

MODELS = ("gaussian", "wider", "flow", "refined")
PAIRS = [("wider", "gaussian"), ("flow", "gaussian"), ("refined", "gaussian"), ("flow", "wider")]
TRIALS = 16  # of the binomial likelihood: a gray value counts black pixels among 16
SCORE = "val_negative_elbo"
VALIDATION_SAMPLES = 16  # of z for each image
# A latent unit is active if E[z | x] varies more over images (Burda et al. 2016, section 4.2).
ACTIVE_UNIT_VARIANCE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks(Settings):
    """The encoder and the decoder."""

    # dimension of z
    latent: Width = 8
    # width of the two hidden layers of the encoder, which is also the number of its features
    hidden: Width = 128
    # width of the encoder of the model "wider"
    wider: Width = 216
    # width of the two hidden layers of the decoder
    decoder: Width = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class PosteriorField(Settings):
    """The field of the posterior, a multilayer perceptron."""

    # hidden widths
    widths: Annotated[tuple[int, ...], Range(1, MAX_WIDTH, 1, MAX_LAYERS)] = (64, 64)
    # how time enters
    time: TimeLayer = "concatsquash"
    # how the encoder's features enter
    conditioning: Literal["concat", "modulate"] = "modulate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ELBOMeasure(Measure):
    """Held-out numbers."""

    # number of samples of z for each test image
    samples: Steps = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent(LoopExperiment):
    """The autoencoder, its posterior, and how many seeds to compare."""

    has_table: ClassVar[bool] = True
    # number of seeds to compare, from --seed on
    seeds: Steps = 3
    # make a pixel 1 with its gray value as probability, drawn anew for each training batch and once
    # for validation and test; otherwise it is a count out of 16
    binary: bool = True

    networks: Networks = Networks()
    field: PosteriorField = PosteriorField()
    # With two fixed steps of rk4, a flow learned to exploit their error, and its training ELBO was
    # not a bound. Hence steps adapted to tolerances.
    solve: TrainingSolve = TrainingSolve()
    training: Training = Training(
        steps=2500, batch=128, learning_rate=5e-3, weight_decay=0.03, average=0.99
    )
    measure: ELBOMeasure = ELBOMeasure()
    loop: Loop = Loop(log_every=100, checkpoint_every=1000, validate_every=250)
    run: Run = Run()

    def check(self) -> None:
        super().check()
        if self.run.seed + self.seeds > 2**31:
            raise ValueError(
                f"the last seed, --seed {self.run.seed} plus --seeds {self.seeds}, exceeds "
                "2147483647: lower one of them"
            )
        self.solve.check_interval(1.0)
        self.make_stages()

    def for_seed(self, seed: int, folder: Path) -> "Latent":
        """Return the settings of one seed, whose run directory is a subfolder."""
        out = folder / f"seed{seed}"
        return dataclasses.replace(self, run=dataclasses.replace(self.run, seed=seed, out=out))

    def _key(self, part: int):
        return jr.fold_in(jr.fold_in(jr.key(self.run.seed), 0), part)

    def make_vae(self, dim: int, refine: ODE | None = None, *, wider: bool = False) -> VAE:
        """Return an untrained model of images of `dim` pixels."""
        sizes = self.networks
        trunk_key, head_key, decoder_key = (self._key(part) for part in range(3))
        mlp = functools.partial(eqx.nn.MLP, activation=jax.nn.silu)
        width = sizes.wider if wider else sizes.hidden
        trunk = mlp(dim, width, width, 1, final_activation=jax.nn.silu, key=trunk_key)
        encoder = Encoder(trunk, width, sizes.latent, key=head_key)
        decoder = mlp(sizes.latent, dim, sizes.decoder, 2, key=decoder_key)
        likelihood = Binomial(1 if self.binary else TRIALS)
        return VAE(Posterior(encoder, sizes.latent, refine), decoder, likelihood)

    def make_refinement(self) -> ODE:
        """Return a CNF that starts as the identity: the last layer of its field is 0."""
        field = fields.MLP(
            self.networks.latent,
            self.field.widths,
            time=self.field.time,
            context_dim=self.networks.hidden,
            conditioning=self.field.conditioning,
            key=self._key(3),
        )
        last = jax.tree.map(jnp.zeros_like, field.layers[-1])
        return ODE(eqx.tree_at(lambda field: field.layers[-1], field, last))

    def make_draw(self, num: int | None) -> DrawBatch:
        """Return a function that draws batches of `num` images; None for all."""
        rows = training.draw_rows(num)

        def binary_rows(key, images):
            row_key, pixel_key = jr.split(key)
            return binarized(pixel_key, rows(row_key, images))

        return binary_rows if self.binary else rows

    def make_stages(self) -> list[Stage]:
        return self.stages_of(objectives.elbo)

    def stages_of(self, objective: Any) -> list[Stage]:
        """Return the stages of training by `objective`, which takes a `solve`."""
        solve = self.solve.make()
        stage = self.training.make_stage(functools.partial(objective, solve=solve), solve)
        return self.training.then_lbfgs([stage])


def run(settings: Latent) -> None:
    """Train the models for each seed, measure their bounds, and draw their images."""
    loaded = load_images("digits")
    parts = {"train": loaded.train, "val": loaded.val, "test": loaded.test}
    images = {part: jnp.asarray(rows / TRIALS, float) for part, rows in parts.items()}
    if settings.binary:
        for part, seed in {"val": 0, "test": 1}.items():
            images[part] = binarized(jr.key(seed), images[part])
    run_dir = RunDir("latent", settings)
    solve = settings.measure.make_solve()
    seeds = range(settings.run.seed, settings.run.seed + settings.seeds)
    found: list[dict[str, MeasuredVAE]] = []
    for seed in seeds:
        one = settings.for_seed(seed, run_dir.path)
        fits = train_models(one, images, run_dir)
        key = jr.fold_in(jr.key(seed), 2)
        print(f"seed {seed}: bounds by {settings.measure.samples} samples of z per image")
        found.append({})
        for name, fitted in fits.items():
            samples = evaluate.elbo(
                fitted.flow, images["test"], key, samples=settings.measure.samples, solve=solve
            )
            found[-1][name] = MeasuredVAE(fitted, samples)
            print(f"{name}: ELBO {np.mean(samples.elbo):.3f}")
    metrics = {name: value for model in MODELS for name, value in figures_of(model, found)}
    for pair in PAIRS:
        metrics |= gains(*pair, found, seeds)
    numerics: dict[str, float] = {
        "solver_failures": sum(
            int(m.samples.failed.sum()) for each in found for m in each.values()
        ),
        "skipped_updates": sum(m.fitted.skipped for each in found for m in each.values()),
        "rollbacks": sum(m.fitted.rollbacks for each in found for m in each.values()),
    }
    timing: dict[str, float] = {}
    for model in MODELS:
        numerics[f"nfe_{model}"] = mean_of(model, found, lambda m: m.samples.nfe)
        timing[f"train_s_{model}"] = mean_of(model, found, lambda m: m.fitted.timing["train_s"])
    key = jr.fold_in(jr.key(settings.run.seed), 4)
    draw(run_dir, found[0], loaded.shape, images["test"], key, solve)
    warning = "some solves of the bounds failed, so the metrics that need them are NaN"
    run_dir.finish(metrics, numerics, timing, [warning] if numerics["solver_failures"] else [])


def binarized(key: Key[Array, ""], images: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
    """Draw 1 with a gray value in [0, 1] as its probability, else 0; consumes `key`."""
    return jr.bernoulli(key, images).astype(images.dtype)


def train_models(settings: Latent, images: dict[str, Array], whole: RunDir) -> dict[str, RunResult]:
    """Train the four models of one seed, each in its own run directory."""
    dim = images["train"].shape[1]
    key = jr.fold_in(jr.key(settings.run.seed), 3)
    folder, val_solve = settings.run.out, settings.measure.make_validation_solve()
    assert folder is not None  # set by `for_seed`

    def trained(name, model, make_vae=lambda model: model):
        """Train `model`, from which `make_vae` makes the VAE that the result holds."""

        def objective(model, x, key, solve):
            return objectives.elbo(make_vae(model), x, key, solve=solve)

        def validate(model):
            found = evaluate.elbo(
                make_vae(model),
                images["val"],
                key,
                samples=VALIDATION_SAMPLES,
                solve=val_solve,
            )
            return -float(np.mean(found.elbo))

        path = folder / name
        resume = (path / "config.json").exists()
        own = dataclasses.replace(
            settings,
            run=dataclasses.replace(settings.run, out=path),
            loop=dataclasses.replace(settings.loop, resume=resume),
        )
        run_dir = RunDir("latent", own, part_of=whole)
        fitted = fit(
            run_dir,
            own,
            model,
            own.make_draw,
            images["train"],
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


def mean_of(model: str, found: list[dict[str, MeasuredVAE]], figure: Callable) -> float:
    """Mean over seeds of a figure of one model."""
    return float(np.mean([figure(each[model]) for each in found]))


def figures_of(model: str, found: list[dict[str, MeasuredVAE]]) -> Iterator[tuple[str, float]]:
    """Yield names and means over seeds of a model's figures; bounds are in nats per image."""
    figures = {
        "elbo": lambda m: np.mean(m.samples.elbo),
        "reconstruction": lambda m: -np.mean(m.samples.log_likelihood),
        "kl": lambda m: np.mean(m.samples.log_ratio),
        "iwae": lambda m: np.mean(iwae(m.samples)),
        "active": lambda m: np.sum(np.var(m.samples.mean, axis=0) > ACTIVE_UNIT_VARIANCE),
        "parameters": lambda m: sum(
            leaf.size for leaf in jax.tree.leaves(training.partition(m.fitted.flow)[0])
        ),
    }
    for name, figure in figures.items():
        yield f"{name}_{model}", mean_of(model, found, figure)


def iwae(samples: evaluate.ELBOSamples) -> np.ndarray:
    """Importance-weighted bounds of each image from all samples, nats."""
    return samples.iwae(samples.log_ratio.shape[1])


def gains(
    model: str, other: str, found: list[dict[str, MeasuredVAE]], seeds: Iterable[int]
) -> dict[str, float]:
    """Mean differences of two models' bounds, paired by image, nats, with standard errors."""
    result = {}
    for name, bound in {"elbo": lambda samples: samples.elbo, "iwae": iwae}.items():
        name = f"{name}_{model}_over_{other}"
        gain = np.stack([bound(m[model].samples) - bound(m[other].samples) for m in found])
        for seed, each in zip(seeds, gain, strict=True):
            result[f"{name}_seed{seed}"] = float(np.mean(each))
            result[f"{name}_seed{seed}_stderr"] = standard_error(each)
        result[name] = float(np.mean(gain))
        # Over images, for these seeds.
        result[f"{name}_stderr"] = standard_error(np.mean(gain, axis=0))
    return result


if __name__ == "__main__":
    main(run, Latent)
