"""Files of fitted estimators: checkpoints whose notes have the structure of the mixture."""

import dataclasses
import json
from numbers import Integral
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jcnf._checks import InputError
from jcnf.flows import Affine
from jcnf.sklearn._contexts import network_of
from jcnf.sklearn.columns import Column
from jcnf.sklearn.mixture import Mixture, Plan, skeleton
from jcnf.sklearn.sides import Side, blank_columns
from jcnf.training import checkpoint


def save(density: Any, path: str | Path) -> None:
    """Save a fitted `FlowDensity`."""
    notes = {
        "columns": [dataclasses.asdict(support) for support in density.columns_],
        "knots": [int(density.outer_[1].u.shape[1])],
        "plan": density.plan_._asdict(),
        "normal": [isinstance(flow.bijection, Affine) for flow in density.mixture_.flows],
        "weights": density.mixture_.weights.tolist(),
        "steps": density.mixture_.steps,
        "held_out_nll": density.held_out_nll_,
        "history": density.history_,
        "embedding": density.embedding is not None,
        "names": density.names_,
        "dtypes": None if density.dtypes_ is None else [str(dtype) for dtype in density.dtypes_],
        "dim": density.n_features_in_,
        "params": {"steps": density.steps, "progress": density.progress},
        "seed": int(density.random_state) if isinstance(density.random_state, Integral) else None,
        "context": None,
    }
    tree: Any = (density.outer_, density.mixture_.flows)
    if density.context_ is not None:
        names, side = density.context_
        supports = [dataclasses.asdict(support) for support in side.supports]
        notes["context"] = {"names": names, "columns": supports, "shape": density.context_shape_}
        notes["knots"].append(int(side.map.u.shape[1]))
        tree = (*tree, side.map)
    with jax.enable_x64(True):
        checkpoint.save(path, tree, json.loads(json.dumps(notes)))


def load(path: str | Path, embedding: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters of the estimator in a file, and its fitted attributes.

    **Raises:** `ValueError` if the file is missing, damaged, not of an estimator, or of one with
    an embedding where none is given, or the other way round.
    """
    notes = checkpoint.read_notes(path)
    if "held_out_nll" not in notes:
        raise InputError(f"{path} was not written by FlowDensity.save")
    if notes["embedding"] != (embedding is not None):
        has = "has an" if notes["embedding"] else "has no"
        raise InputError(f"the density in {path} {has} embedding: pass it to load, or leave it out")
    context, dim, plan = notes["context"], notes["dim"], Plan(**notes["plan"])
    plan = plan._replace(weight_decays=tuple(plan.weight_decays), circular=tuple(plan.circular))
    shape = () if context is None else tuple(context["shape"])
    context_dim = 0 if context is None else len(context["names"])
    with jax.enable_x64(False):
        network = network_of(embedding, shape)
        flows = tuple(skeleton(dim, context_dim, plan, n, network) for n in notes["normal"])
    with jax.enable_x64(True):
        weight = np.zeros((dim, context_dim)) if context_dim and not embedding else None
        whiten = Affine(np.zeros(dim), np.eye(dim), weight)
        tree: Any = ((whiten, blank_columns(dim, notes["knots"][0])), flows)
        if context is not None:
            tree = (*tree, blank_columns(context_dim, notes["knots"][1]))
        tree, _ = checkpoint.load(path, tree)
    state = {
        "outer_": tree[0],
        "mixture_": Mixture(tree[1], np.array(notes["weights"]), notes["steps"]),
        "columns_": [Column(**support) for support in notes["columns"]],
        "plan_": plan,
        "held_out_nll_": notes["held_out_nll"],
        "history_": notes["history"],
        "n_features_in_": dim,
        "names_": notes["names"],
        "dtypes_": notes["dtypes"],
        "context_": None,
    }
    if any(isinstance(name, str) for name in notes["names"]):
        state["feature_names_in_"] = np.array(notes["names"], dtype=object)
    if context is not None:
        supports = [Column(**support) for support in context["columns"]]
        state["context_"] = (context["names"], Side(supports, tree[2]))
        state["context_shape_"] = shape
    return notes["params"] | {"random_state": notes["seed"]}, state
