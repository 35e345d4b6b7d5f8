"""Texts as vectors: the mean of the hidden states, or what training with pairs makes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import config, sharding
from gpt4v_jax.data import chat, packing
from gpt4v_jax.generate import embed
from gpt4v_jax.training import step as step_lib
from gpt4v_jax.training.workdir import Trained
from tests import tiny


def make(**model) -> Trained:
    """A random model of 64 positions."""
    made = dataclasses.replace(tiny.make_config(context=64, **{k: v for k, v in model.items() if k == "kind"}),
                               **{k: v for k, v in model.items() if k != "kind"})  # fmt: skip
    module, params = tiny.make_model(made)
    run = config.Config(model=made, data=tiny.DATA)
    tokenizer = type("Tokenizer", (), {"special": tiny.SPECIAL})()
    return Trained(run, module.layout, tokenizer, sharding.make_mesh(config.Mesh()), module, params, 0)


IDS = [[9, 10, 11], [12] * 40, [13], list(range(7, 30)), *[[k, k + 1] for k in range(7, 18)]]


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(model, params, batch):
    return model.apply({"params": params}, batch)[0]


def mean(trained: Trained, ids: list[int]) -> np.ndarray:
    """By hand: all of the context, one text alone."""
    row = packing.fill([embed.document(trained, ids)], None, trained.layout)
    hidden = hidden_of(trained.model, trained.params, packing.stack([row]))
    vector = np.asarray(hidden[0, : len(ids)], np.float64).mean(axis=0)
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("kind", ["concat", "cross_attention", "encoder_decoder"])
def test_the_mean_of_the_hidden_states(kind):
    """Of texts of all lengths in any order, more than one batch of them."""
    trained = make(kind=kind)
    found = embed.embed(trained, [embed.document(trained, ids) for ids in IDS])
    assert found.shape == (len(IDS), 16) and found.dtype == np.float32
    for ids, vector in list(zip(IDS, found, strict=True))[:6]:
        np.testing.assert_allclose(vector, mean(trained, ids), atol=2e-6)


def test_a_model_trained_with_pairs():
    """The vector is that of the text of a pair, as training computes it beside a medium."""
    trained = make(embed=6)
    ids = [9, 10, 11]
    layout = dataclasses.replace(trained.layout, pairs=1)
    pair = chat.pair(tiny.pieces("I"), [chat.Piece("assistant", ids)], tiny.SPECIAL, layout)
    batch = packing.stack([packing.fill([pair], tiny.reader(layout), layout)])
    scores = jax.jit(step_lib.make_embed_step(trained.model.clone(layout=layout)))(trained.params, batch)
    (vector,) = embed.embed(trained, [embed.document(trained, ids)])
    np.testing.assert_allclose(vector, scores[1][0, 0], atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-5)


def test_a_bidirectional_model_reads_both_ways():
    trained = make(causal=False)
    assert not embed.document(trained, [9, 10]).ar.any()
    one, two = embed.embed(trained, [embed.document(trained, ids) for ids in ([9, 10], [9, 11])])
    hidden = jnp.asarray(one) @ jnp.asarray(two)
    assert abs(float(hidden)) < 1 - 1e-4


@pytest.mark.parametrize("ids, message", [([], "no token"), ([9] * 65, "65 positions, the model's context is 64")])
def test_texts_that_cannot_be_embedded(ids, message):
    with pytest.raises(config.InputError, match=message):
        embed.document(make(), ids)
