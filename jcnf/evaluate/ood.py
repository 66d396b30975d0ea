"""Out-of-distribution scores: the higher, the less like the training data.

Each maps log-densities in nats, (n,), as `jcnf.evaluate.log_prob` computes them, to scores (n,). A
NaN, from a solve that failed, stays NaN. `jcnf.evaluate.auroc` tells how well a score separates two
sets.
"""

import numpy as np
from jaxtyping import Float

from jcnf.evaluate.log_prob import bits_per_dim


def likelihood(log_prob: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return -log p(x), nats (Bishop 1994, "Novelty detection and neural network validation").

    A simple image from elsewhere can be more likely than the training images (Nalisnick et al.
    2019, "Do deep generative models know what they don't know?"), and then scores lower.
    """
    return -log_prob


def typicality(
    log_prob: Float[np.ndarray, " n"], reference: Float[np.ndarray, " m"]
) -> Float[np.ndarray, " n"]:
    """Return |log p(x) - mean of `reference`|, nats: a point can also be too likely.

    `reference` holds log-densities of training points or, if the model is overfitted, of held-out
    points: training points are then more likely than any fresh ones. This is the test of Nalisnick
    et al. 2019, "Detecting out-of-distribution inputs to deep generative models using typicality",
    for batches of M = 1 points.

    **Raises:** `ValueError` if `reference` is empty or has NaN.
    """
    if not len(reference) or np.isnan(reference).any():
        raise ValueError(
            "expected reference log-densities, at least one and without NaN; got "
            f"{len(reference)} with {np.isnan(reference).sum()} NaN: leave out points whose solve "
            "failed"
        )
    return np.abs(log_prob - np.mean(reference))


def complexity(
    log_prob: Float[np.ndarray, " n"], code_length: Float[np.ndarray, " n"], dim: int, levels: int
) -> Float[np.ndarray, " n"]:
    """Return -log2 P(x) - L(x), bits: how much longer the model's code is than a universal one.

    This is the score of Serrà et al. 2020, "Input complexity and out-of-distribution detection with
    likelihood-based generative models". `log_prob` is of dequantized pixels
    (`jcnf.data.images.pixels.dequantize`), so -log2 P is `dim` times their `bits_per_dim`;
    `code_length` is L, the `jcnf.evaluate.code_length` of the same images.

    **Raises:** `ValueError` if the two have different shapes.
    """
    _same(log_prob, code_length)
    return dim * bits_per_dim(log_prob, dim, levels) - code_length


def ratio(
    log_prob: Float[np.ndarray, " n"], background: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Return log p_background(x) - log p(x), nats.

    `background` is the log-density under a model trained on perturbed data, which learns what
    images have in common but not what is special to these (Ren et al. 2019, "Likelihood ratios for
    out-of-distribution detection").

    **Raises:** `ValueError` if the two have different shapes.
    """
    _same(log_prob, background)
    return background - log_prob


def _same(log_prob, other):
    if np.shape(log_prob) != np.shape(other):
        raise ValueError(
            "expected one value of each kind for each point; got shapes "
            f"{np.shape(log_prob)} and {np.shape(other)}"
        )
