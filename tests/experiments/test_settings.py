"""The settings of every experiment: limits, clashes, help, and their form in JSON."""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path

import jax
import pytest
from command_lines import EXPERIMENTS, command_of

from experiments._runner import cli, fields, objectives
from experiments._runner.metrics_log import json_ready
from experiments._runner.settings import Range, Settings, from_json, to_json
from experiments._runner.solves import TrainingSolve
from experiments._tasks.density2d import ToyFlow, ToyName
from experiments._tasks.energies import EnergyName
from experiments._tasks.series import SpiralName
from experiments._tasks.simulators import TASKS
from experiments.posterior import TaskName
from jcnf._checks import InputError
from jcnf.data.energies import ENERGIES
from jcnf.data.series import TARGETS
from jcnf.data.tables import MAF_SUITE
from jcnf.data.toys import TOYS
from jcnf.fields.layers import ACTIVATIONS, LAYERS
from jcnf.objectives.couplings import COUPLINGS
from jcnf.objectives.paths import PATHS
from jcnf.objectives.times import TIMES
from jcnf.ode.solve import NORMS, SOLVERS

HOSTILE = {
    int: (-1, 2**31),
    float: (math.nan, math.inf, -1.0, 1e30),
    str: ("nonsense",),
    tuple[int, ...]: ((0,), (-1,), (2**31,)),
    tuple[float, ...]: ((math.nan,), (math.inf,), (1e30,)),
    tuple[tuple[str, float], ...]: tuple(
        ((name, weight),)
        for name, weight in [("nonsense", 1.0), ("kinetic", math.nan), ("kinetic", -1.0)]
    ),
}
FINE = {  # values that are valid, or whose mistake shows only when a file is read
    ("clip", math.inf): "no clipping",
    ("clip", 1e30): "no clipping",
    ("seeds", (0,)): "one seed",
}
NAMES_OF_FILES = {"drop", "context", "suite"}


COMMANDS = {name: command_of(name) for name in EXPERIMENTS}


def members(hint):
    """Return the classes of settings in a type hint: itself, or the members of a union."""
    if isinstance(hint, type) and issubclass(hint, Settings):
        return [hint]
    return [kind for part in typing.get_args(hint) for kind in members(part)]


def parts_of(kind):
    """Return a class of settings and those of its parts, of every choice too."""
    found = [kind]
    for hint in typing.get_type_hints(kind, include_extras=True).values():
        for part in members(hint):
            found += parts_of(part)
    return found


def given(experiment):
    """Return the classes of settings, or instances with the defaults, of an experiment."""
    settings = COMMANDS[experiment].settings
    return list(settings.values()) if isinstance(settings, Mapping) else [settings]


def instances(experiment):
    """Return the default settings of an experiment, with a file where a path is needed."""
    return [
        kind(**needed_by(kind)) if isinstance(kind, type) else kind for kind in given(experiment)
    ]


# Settings of which one must be given, whichever it is.
CHOSEN = {"Outputs": {"samples": 3}}


def needed_by(kind):
    """Return what must be given to a class of settings; a file wherever it is a path."""
    needed, hints = dict(CHOSEN.get(kind.__name__, {})), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.default is field.default_factory is dataclasses.MISSING:
            part = members(hints[field.name])
            needed[field.name] = part[0](**needed_by(part[0])) if part else Path(__file__)
    return needed


def parts():
    kinds = {type(each) for name in EXPERIMENTS for each in instances(name)}
    return sorted({part for kind in kinds for part in parts_of(kind)}, key=lambda k: k.__qualname__)


def hostile(hint):
    """Return bad values of a type."""
    if typing.get_origin(hint) is typing.Literal:
        return ("nonsense",)
    if typing.get_origin(hint) is typing.Annotated:
        lengths = [limit.min_length for limit in hint.__metadata__ if isinstance(limit, Range)]
        return (*hostile(hint.__origin__), *([()] if any(lengths) else []))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return [value for part in typing.get_args(hint) for value in hostile(part)]
    return HOSTILE.get(hint, ())


@pytest.mark.parametrize("kind", parts(), ids=lambda kind: f"{kind.__module__}.{kind.__qualname__}")
def test_settings_refuse_hostile_values_by_name(kind):
    needed = needed_by(kind)
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        for value in hostile(hints[field.name]):
            if (field.name, value) in FINE or field.name in NAMES_OF_FILES:
                continue
            flag = field.name.replace("_", "-").removesuffix("s")
            try:
                kind(**needed | {field.name: value})
                said = "taken"
            except ValueError as error:
                said = str(error)
            assert re.search(f"{flag}|nonsense", said), (field.name, value, said)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_head_of_the_help_has_an_example(experiment):
    assert f"    python -m experiments.{experiment}" in COMMANDS[experiment].head


# A command line, and what its error says.
BAD = {
    "toy2d --resume": "--resume needs --out",
    "images --resume": "--resume needs --out",
    "toy2d --t1 1e30": "--t1.*1000",
    "toy2d objective:likelihood --max-steps 1000000000": "--max-steps",
    "toy2d --steps 1.5": "--steps",
    "toy2d --learning-rate fast": "--learning-rate",
    "toy2d --nonsense 3": "--nonsense",
    "toy2d --rtol 1e-3": "--rtol",
    "toy2d field:planar --widths 8 8 8": "--widths",
    "toy2d objective:likelihood --fixed-step 3": "--fixed-step.*at most.*got 3",
    "toy2d objective:likelihood --rtol 1e-9 --atol 1e-9": "1e-09.*JAX_ENABLE_X64",
    "toy2d --test-tolerance 1e-9": "--test-tolerance.*float32.*JAX_ENABLE_X64",
    "toy2d --x64 --test-tolerance 1e-17": "--test-tolerance.*float64",
    "toy2d objective:likelihood --random-end-time 2": r"\[0, 1.0\)",
    "toy2d objective:likelihood --regularizers kinetic 1 kinetic 2": "twice.*kinetic",
    "toy2d objective:likelihood --regularizers hjb 1": "potential",
    "toy2d objective:likelihood divergence:hutchinson --noise orthogonal --probes 3": "at most 2",
    "adjoints --x64 --float32-at 1e-9": "--float32-at.*float32",
    "adjoints --loosest 9 --tightest 3": "--tightest",
    "flow_matching --budgets 5 5": "--budgets",
    "conditional --drop-context 0": "--guidance.*--drop-context",
    "conditional objective:likelihood --guidance 2": "--guidance",
    "energy_sweep --targets u1 u1": "--targets",
    "ot_flow field:resnet": "field:resnet",
    "spiral --shortest 3 --longest 2": "shortest.*longest",
    "spiral --shortest 0.01 --longest 0.01": "--fixed-step.*0.01",
    "spiral data:table": "--path",
    "imputation --data t --tolerance 1e-9": "--tolerance.*JAX_ENABLE_X64",
    "imputation --data t --draws 200": "--draws.*--chain-steps",
    "density use --from t --samples 1 --test-tolerance 1e-9": "--test-tolerance.*JAX_ENABLE_X64",
    "reflow --euler-steps 2 2": "--euler-steps",
    "posterior --simulator mine:model": "--simulator needs --prior",
    "posterior --prior mine:prior": "--prior needs --simulator",
    "posterior --simulator model --prior mine:prior": "--simulator must be module:name",
    "posterior --task slcp --simulator a:b --prior a:c": "--task.*--simulator",
    "posterior --budgets 1000 1000": "--budgets",
    "posterior --simulations 10": "--simulations.*100",
    "posterior --checks 5": "--checks.*20",
    "posterior --observations 2": "--observations needs --folder",
    "posterior --resume": "--resume needs --out",
    "tables --models kde kde": "--models",
    "tables --seeds": "--seeds",
    "tables --seeds -1": "--seeds.*0 to",
    "tables --tables a a": "--tables",
    "tables --resume": "--resume needs --out",
    "benchmark --suites step step": "--suites",
    "benchmark --suites": "--suites",
    "benchmark --suites sample --cases toy": "--suites sample.*toy_trained, table",
    "images --random-end-time 0.1": "--random-end-time",
    "images --time-frequencies 2": "--time-frequencies",
    "images --test-draws 8": "--test-draws",
    "images objective:flow-matching --scales 1 --drop-context 0.1": "--conditional",
    "inpaint --from r method:langevin --noise 2": "--noise",
    "inpaint --from r --stages 9 --steps 8": "--stages.*--steps",
    "nice --test-tolerance 1e-3": "--test-tolerance",
}


@pytest.mark.parametrize("line", BAD)
def test_command_lines_that_clash_are_refused(line, capsys):
    experiment, *words = line.split()
    jax.config.update("jax_enable_x64", False)
    try:
        cli.parse(COMMANDS[experiment].settings, words).trace()
        said = "taken"
    except ValueError as error:
        said = str(error)
    except SystemExit:
        said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    finally:
        jax.config.update("jax_enable_x64", True)
    assert re.search(BAD[line], said), said


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_settings_survive_json(experiment):
    for settings in instances(experiment):
        content = json.loads(json.dumps(json_ready(to_json(settings))))
        assert from_json(type(settings), content) == settings


def test_json_of_other_settings_is_refused():
    content = to_json(ToyFlow())
    content["flow"]["field"]["kind"] = "Transformer"
    with pytest.raises(InputError, match="Transformer"):
        from_json(ToyFlow, content)


@pytest.mark.parametrize(
    ("hint", "known"),
    [
        (typing.get_type_hints(fields.MLP)["activation"], ACTIVATIONS),
        (typing.get_type_hints(fields.MLP)["time"], LAYERS),
        (typing.get_type_hints(TrainingSolve)["solver"], SOLVERS),
        (typing.get_type_hints(TrainingSolve)["norm"], NORMS),
        (typing.get_type_hints(objectives.Matching)["path"], PATHS),
        (typing.get_type_hints(objectives.Matching)["times"], TIMES),
        (objectives.Coupling, COUPLINGS),
        (ToyName, TOYS),
        (EnergyName, ENERGIES),
        (SpiralName, TARGETS),
        (TaskName, TASKS),
    ],
    ids=[
        "activations",
        "time layers",
        "solvers",
        "norms",
        "paths",
        "times",
        "couplings",
        "toys",
        "energies",
        "spirals",
        "simulators",
    ],
)
def test_the_choices_are_those_of_the_library(hint, known):
    assert set(typing.get_args(hint)) == set(known)


def test_the_tables_of_the_suite_are_those_of_the_library():
    from experiments.tabular import MAFSuite

    assert set(typing.get_args(typing.get_type_hints(MAFSuite)["suite"])) == set(MAF_SUITE)


def test_an_error_names_the_help_of_the_chosen_command(capsys):
    with pytest.raises(SystemExit):
        cli.parse(COMMANDS["density"].settings, ["use", "--seed", "0"], program="density")
    assert "density use --help" in capsys.readouterr().err
