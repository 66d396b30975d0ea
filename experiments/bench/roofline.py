"""A training step compared with the rate of the machine's matrix products."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from experiments.bench import ours, step, unrolled
from experiments.bench.cases import Case
from experiments.bench.report import Results
from experiments.bench.timing import Program, measure
from jcnf import training

SIZES = (256, 512, 1024)
UNROLLED, AGAIN = "unrolled", "unrolled, each step again"


def flops(function: Callable, *arguments) -> float:
    """Count the floating-point operations of a loop-free program, by XLA's cost analysis."""
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return float((analysis or {}).get("flops", jnp.nan))


def gemm(rounds: int, seconds: float, sizes: tuple[int, ...] = SIZES) -> Results:
    """Time products of square float32 matrices, in milliseconds and GFLOP/s."""
    programs = {}
    for size in sizes:
        a, b = jr.normal(jr.key(0), (2, size, size))
        product = jax.jit(jnp.matmul).lower(a, b).compile()
        number = max(1, 1024**3 // size**3)

        def run(product=product, a=a, b=b, number=number):
            jax.block_until_ready([product(a, b) for _ in range(number)])

        figures = {"gflop": flops(jnp.matmul, a, b) / 1e9}
        programs[f"{size} x {size}"] = Program(run, figures, number)
    results = measure(programs, rounds, seconds=seconds)
    for r in results.values():
        r["gflop_per_s"] = 1e3 * r["gflop"] / r["ms"]
    return results


def run(case: Case, rounds: int, seconds: float, rate: float) -> Results:
    """Time the step of jcnf against the unrolled programs, and their shares of `rate` (GFLOP/s).

    The work of every program is taken to be the GFLOP of the unrolled one. An unrolled program with
    a different loss or different steps is not timed.
    """
    objective = unrolled.objective(case)
    params, static = training.partition(case.flow)

    def loss(params, x):
        return objective(eqx.combine(params, static), x, jr.key(0))[0]

    counted = flops(jax.value_and_grad(loss), params, case.x) / 1e9
    here = ours.training_step(case)
    programs = {
        UNROLLED: ours.training_step(case, objective),
        AGAIN: ours.training_step(case, unrolled.objective(case, again=True)),
    }
    for name, program in list(programs.items()):
        found, wanted = program.figures, here.figures
        if not (
            step.agrees(found["loss"], wanted["loss"])
            # Ours evaluates once more, to estimate the error of the last step.
            and found["nfe"] + 1 == wanted["nfe"]
        ):
            print(
                f"  {name}: not timed: its loss is {found['loss']:.6f} after {found['nfe']:g} "
                f"evaluations, not {wanted['loss']:.6f} after {wanted['nfe'] - 1:g}"
            )
            del programs[name]
    programs[ours.NAME] = here
    results = measure(programs, rounds, seconds=seconds)
    for r in results.values():
        r["gflop"] = counted
        r["share"] = counted / rate / (r["ms"] / 1e3)
    return results
