"""The repr of a flow is one short line that says what it is made of, and how large it is."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import jcnf
from jcnf import distributions, fields, training
from jcnf.flows import ODE, Chain, Flow, multiscale
from jcnf.flows.fixed import Affine

KEY, BASE = jr.key(0), distributions.StandardNormal(2)


def mlp(context_dim=0):
    return fields.MLP(2, (8, 8), context_dim=context_dim, key=KEY)


def trainable(model):
    return sum(leaf.size for leaf in jax.tree.leaves(training.partition(model)[0]))


def test_repr_of_a_cnf_names_the_field_and_counts_parameters():
    flow = jcnf.CNF(fields.ResNet(2, 96, 2, key=KEY), BASE)
    size = trainable(flow)
    assert size > 1000
    expected = f"Flow(ODE(ResNet), dim=2, {size:,} parameters, base=StandardNormal(dim=2))"
    assert repr(flow) == expected
    assert repr(eqx.filter_eval_shape(lambda: flow)) == expected
    assert "weight" in eqx.tree_pformat(flow)


def test_repr_shows_a_context_and_fields_inside_fields():
    flow = jcnf.CNF(fields.Cast(mlp(context_dim=3), jnp.float32), BASE)
    assert repr(flow).startswith("Flow(ODE(Cast(MLP)), dim=2, context_dim=3, ")


def test_repr_of_a_chain_counts_equal_parts_and_no_fixed_arrays():
    whiten = Affine(np.zeros(2), np.eye(2))
    flow = Chain([ODE(mlp()), ODE(mlp()), whiten], BASE)
    size = trainable(flow)
    assert size == 2 * trainable(ODE(mlp()))
    assert repr(flow) == (
        f"Flow(Composition(2 x ODE(MLP), Affine), dim=2, {size:,} parameters, "
        "base=StandardNormal(dim=2))"
    )


def test_repr_of_a_multiscale_flow_stays_on_one_line():
    def blocks(shape):
        return [ODE(fields.Conv(shape, (4,), key=KEY))] * 2

    flow = Flow(multiscale((4, 4, 1), 2, blocks), distributions.StandardNormal(16))
    assert repr(flow) == (
        "Flow(Composition(ChannelSplit(Composition(2 x ODE(Conv))), 2 x ODE(Conv), Squeeze, "
        f"2 x ODE(Conv)), dim=16, {trainable(flow):,} parameters, base=StandardNormal(dim=16))"
    )
