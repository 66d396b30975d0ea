"""A training step by likelihood: ours, and the same step by the peers."""

import dataclasses
import functools
from collections.abc import Callable

import jax.random as jr
import numpy as np

from experiments.bench import ours, peers
from experiments.bench.cases import Case
from experiments.bench.peers import diffrax_solves
from experiments.bench.report import Results
from experiments.bench.timing import Program, measure
from jcnf import objectives
from jcnf.divergence import FixedNoise, Hutchinson

LOSS_TOLERANCE = 1e-4  # absolute for losses below 1, otherwise relative
Make = Callable[[Case], dict[str, Program]]


def run(case: Case, rounds: int, seconds: float, with_peers: bool) -> Results:
    """Time a case's step by every program whose loss agrees with ours."""
    programs = {ours.NAME: ours.training_step(case)}
    worst = dataclasses.replace(case.solve, norm="worst")
    programs[f"{ours.NAME}, norm=worst"] = ours.training_step(case, solve=worst)
    programs[f"{ours.NAME}, fresh batches"] = ours.training_step(case, fresh=True)
    unaided = functools.partial(objectives.likelihood, solve=case.solve)
    title = f"{ours.NAME}, fresh batches, no step plan"
    programs[title] = ours.training_step(case, unaided, fresh=True)
    rivals: list[Make] = [diffrax_solves.training_steps]
    if with_peers:
        rivals += [peer.training_steps for peer in peers.load(*peers.SOLVING).values()]
    for make in rivals:
        programs |= agreeing(case, make, {})
    if case.estimated:
        noise = Hutchinson().draw_noise(jr.key(0), case.batch, case.flow.base.dim, case.x.dtype)
        divergence = FixedNoise(Hutchinson(), noise)
        estimated = ours.training_step(case, divergence=divergence)
        programs[f"{ours.NAME}, Hutchinson"] = estimated
        for peer in peers.load("torchdiffeq").values() if with_peers else ():
            make = functools.partial(peer.training_steps, noise=np.asarray(noise[:, 0]))
            programs |= agreeing(case, make, {"divergence": divergence})
    return measure(programs, rounds, seconds=seconds)


def agreeing(case: Case, make: Make, settings: dict) -> dict[str, Program]:
    """Return the programs of `make` whose losses agree with ours; print the losses of the others.

    At the same tolerance, solvers make different errors. Therefore losses that differ are compared
    again at a tenth of the tolerance, and a program is kept if it agrees there.
    """
    programs = make(case)
    losses = {name: program.figures["loss"] for name, program in programs.items()}
    differing = _differing(losses, ours.loss(case, **settings))
    if differing:
        solve = dataclasses.replace(
            case.solve, rtol=case.solve.rtol / 10, atol=case.solve.atol / 10
        )
        tight = dataclasses.replace(case, solve=solve)
        tight_losses = {name: program.figures["loss"] for name, program in make(tight).items()}
        reference = ours.loss(tight, **settings)
        for name in _differing({name: tight_losses[name] for name in differing}, reference):
            print(
                f"  {name}: not timed: its loss at a tolerance of {solve.rtol:.0e} is "
                f"{tight_losses[name]:.6f}, not {reference:.6f}"
            )
            del programs[name]
    return programs


def agrees(loss: float, reference: float) -> bool:
    """Return whether two losses are equal up to the solver's error."""
    return bool(abs(loss - reference) <= LOSS_TOLERANCE * max(1.0, abs(reference)))


def _differing(losses, reference):
    return [name for name, loss in losses.items() if not agrees(loss, reference)]
