"""Scores that tell strange points from those of the training distribution: higher is stranger.

All are made of log-densities in nats, (n,), which `jcnf.evaluate.score` computes, and give (n,). A
NaN, from a solve that failed, stays one. How well a score tells two sets apart is its
`jcnf.evaluate.auroc`.
"""

import numpy as np
from jaxtyping import Float

from jcnf.evaluate.log_prob import bits_per_dim


def likelihood(log_prob: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """-log p(x), nats (Bishop 1994, "Novelty detection and neural network validation").

    A simple picture from elsewhere can be likelier than those trained upon (Nalisnick et al. 2019,
    "Do deep generative models know what they don't know?"), and then scores lower.
    """
    return -log_prob


def typicality(
    log_prob: Float[np.ndarray, " n"], reference: Float[np.ndarray, " m"]
) -> Float[np.ndarray, " n"]:
    """|log p(x) - mean of `reference`|, nats: too likely is strange as well.

    `reference` are log-densities of training points. The test of a single point of Nalisnick et
    al. 2019, "Detecting out-of-distribution inputs to deep generative models using typicality",
    whose batches of M points are those of M = 1 here.

    **Raises:** `ValueError` for no reference, and for a NaN in it.
    """
    if not len(reference) or np.isnan(reference).any():
        raise ValueError(
            f"expected reference log-densities without NaN; got {len(reference)}: leave out points "
            "whose solve failed"
        )
    return np.abs(log_prob - np.mean(reference))


def complexity(
    log_prob: Float[np.ndarray, " n"], code_length: Float[np.ndarray, " n"], dim: int, levels: int
) -> Float[np.ndarray, " n"]:
    """-log2 P(x) - L(x), bits: how much longer the model's code is than a universal one.

    Serrà et al. 2020, "Input complexity and out-of-distribution detection with likelihood-based
    generative models". `log_prob` is of dequantised pixels
    (`jcnf.data.images.pixels.dequantise`), by which -log2 P is `dim` times their `bits_per_dim`;
    `code_length` is L, `jcnf.evaluate.code_length` of the same pictures.
    """
    _same(log_prob, code_length)
    return dim * bits_per_dim(log_prob, dim, levels) - code_length


def ratio(
    log_prob: Float[np.ndarray, " n"], background: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """log p_background(x) - log p(x), nats.

    `background` is the log-density under a model trained on perturbed data, which knows what is
    common to pictures and not what is special to these (Ren et al. 2019, "Likelihood ratios for
    out-of-distribution detection").
    """
    _same(log_prob, background)
    return background - log_prob


def _same(log_prob, other):
    if np.shape(log_prob) != np.shape(other):
        raise ValueError(
            f"expected values of the same points; got {np.shape(log_prob)} and {np.shape(other)}"
        )
