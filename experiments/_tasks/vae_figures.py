"""Figures of VAEs: reconstructions, samples of the prior, and posteriors in the plane."""

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from experiments._runner.loop import FitResult
from experiments._runner.run_dir import RunDir
from jcnf import evaluate, plot
from jcnf.plot import _style, gallery

if TYPE_CHECKING:
    from experiments.latent import Latent

SHOWN_IMAGES = 60
SHOWN_POSTERIORS = 6
POSTERIOR_CELLS = 120  # along each axis
POSTERIOR_REACH = 6.0  # from the center to the edge, in standard deviations of the Gaussian


class Measured(NamedTuple):
    """A trained model and its bounds on the test part."""

    fitted: FitResult  # its `flow` is the VAE
    bounds: evaluate.Bounds


def draw(
    run_dir: RunDir,
    settings: "Latent",
    found: dict[str, Measured],
    shape: tuple[int, int, int],
    test: Array,
) -> None:
    """Draw images of the first seed's models and, for latents in the plane, their posteriors."""
    model = found["flow"].fitted.flow
    decode = jax.jit(jax.vmap(lambda z: jax.nn.sigmoid(model.decoder(z))))
    z = model.prior.sample(jr.fold_in(jr.key(settings.seed), 4), SHOWN_IMAGES)
    mean = jnp.asarray(found["flow"].bounds.mean[:SHOWN_IMAGES])
    run_dir.save_figures(
        pictures=gallery(
            [
                ("test part", test[:SHOWN_IMAGES]),
                ("from the mean of $q(z|x)$", decode(mean)),
                ("from the prior", decode(z)),
            ],
            shape,
        ),
        training=plot.training_curves(found["flow"].fitted.records, loss_units=settings.loss_units),
    )
    if settings.latent == 2:
        run_dir.save_figures(
            posteriors=draw_posteriors(found, shape, test[:SHOWN_POSTERIORS], settings)
        )


def draw_posteriors(
    found: dict[str, Measured], shape: tuple[int, int, int], x: Array, settings: "Latent"
) -> _style.Figure:
    """Draw p(z | x) of the "gaussian" model's decoder, and its "gaussian" and "refined" fits."""
    model = found["gaussian"].fitted.flow
    posteriors = [found[name].fitted.flow.posterior for name in ("gaussian", "refined")]
    encoded = jax.vmap(model.posterior.bijection.encoder)(x)
    views, panels = [], []
    for i, one in enumerate(x):
        center = np.asarray(encoded.loc[i])
        reach = POSTERIOR_REACH * float(np.exp(np.max(encoded.log_scale[i])))
        views.append((center[0] - reach, center[0] + reach, center[1] - reach, center[1] + reach))

        def exact(z, one=one):
            log_p = jax.vmap(lambda z: model.likelihood(one, model.decoder(z)))(z)
            log_p = np.asarray(log_p + model.prior.log_prob(z))
            return evaluate.LogProbs(log_p, 0.0, np.zeros(len(z), bool))

        def approximate(posterior, z, one=one):
            context = jnp.broadcast_to(one[None], (len(z), len(one)))
            return evaluate.log_prob(
                posterior, z, context=context, solve=settings.make_test_solve()
            )

        densities = [exact, *(functools.partial(approximate, q) for q in posteriors)]
        panels.append([evaluate.grid_of(d, views[-1], POSTERIOR_CELLS).log_prob for d in densities])
    names = ("$p(z|x)$", "$q(z|x)$, Gaussian", "$q(z|x)$, refined by a flow")
    return plot.posteriors(np.asarray(x), shape, np.asarray(panels), names, views)
