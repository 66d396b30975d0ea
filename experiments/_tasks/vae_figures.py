"""Figures of VAEs: reconstructions, samples of the prior, and posteriors in the plane."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from experiments._runner.loop import RunResult
from experiments._runner.run_dir import RunDir
from jcnf import Solve, evaluate, plot
from jcnf.plot import _style, image_grid

SHOWN_IMAGES = 60
SHOWN_POSTERIORS = 6
POSTERIOR_CELLS = 120  # along each axis
POSTERIOR_REACH = 6.0  # from the center to the edge, in standard deviations of the Gaussian


class MeasuredVAE(NamedTuple):
    """A trained model and its samples for the ELBO on the test part."""

    fitted: RunResult  # its `flow` is the VAE
    samples: evaluate.ELBOSamples


def draw(
    run_dir: RunDir,
    found: dict[str, MeasuredVAE],
    shape: tuple[int, int, int],
    test: Array,
    key: Key[Array, ""],
    solve: Solve,
) -> None:
    """Draw images of models and, for latents in the plane, their posteriors; consumes `key`."""
    model = found["flow"].fitted.flow
    decode = jax.jit(jax.vmap(lambda z: jax.nn.sigmoid(model.decoder(z))))
    z = model.prior.sample(key, SHOWN_IMAGES)
    mean = jnp.asarray(found["flow"].samples.mean[:SHOWN_IMAGES])
    run_dir.save_figures(
        images=image_grid(
            [
                ("test part", test[:SHOWN_IMAGES]),
                ("from the mean of $q(z|x)$", decode(mean)),
                ("from the prior", decode(z)),
            ],
            shape,
        ),
        training=plot.training_curves(found["flow"].fitted.records, loss_units="nats"),
    )
    if model.prior.dim == 2:
        run_dir.save_figures(
            posteriors=draw_posteriors(found, shape, test[:SHOWN_POSTERIORS], solve)
        )


def draw_posteriors(
    found: dict[str, MeasuredVAE], shape: tuple[int, int, int], x: Array, solve: Solve
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
            return evaluate.log_prob(posterior, z, context=context, solve=solve)

        densities = [exact, *(functools.partial(approximate, q) for q in posteriors)]
        panels.append([evaluate.grid_of(d, views[-1], POSTERIOR_CELLS).log_prob for d in densities])
    names = ("$p(z|x)$", "$q(z|x)$, Gaussian", "$q(z|x)$, refined by a flow")
    return plot.posteriors(np.asarray(x), shape, np.asarray(panels), names, views)
