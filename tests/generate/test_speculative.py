"""Speculative decoding: greedy answers are those of plain decoding, drawn ones follow the target model's law."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gpt4v_jax import config
from gpt4v_jax.data import chat, packing, tokenizer
from gpt4v_jax.generate import decode, draft, sample, speculative
from gpt4v_jax.generate.draft import Law, Lookup
from tests import tiny
from tests.generate.test_decode import ask, forward, make

LOOKUP = Lookup(4, 2)


def noisy(trained, share: float):
    """-> a draft model that says often, but not always, what `trained` says."""
    other = make_like(trained)
    mixed = jax.tree.map(lambda a, b: (1 - share) * a + share * b, trained.params, other)
    return dataclasses.replace(trained, params=mixed)


def make_like(trained):
    return tiny.make_model(trained.model.config, seed=1)[1]


def same(trained, prompts, proposer, tokens=12, k=3, **more):
    """Greedy answers against decode.generate's -> the counts."""
    read = tiny.reader(trained.layout)
    expected = [list(answer.tokens) for answer in decode.generate(trained, prompts, read, tokens)]
    found, counts = speculative.generate(trained, prompts, read, tokens, proposer, k, **more)
    assert found == expected
    return speculative.Counts(*map(np.asarray, counts))


# ---- greedy


@pytest.mark.parametrize("name", tiny.fusions())
def test_greedy_is_plain_greedy(name):
    number = list(tiny.FUSIONS).index(name)
    trained = make(media=True, axes=3 if number % 2 else 1, context=32, **tiny.FUSIONS[name])
    texts = ("I U2", "V S5 U1", "U4 A3 I U2", "U1", "S7 U2 A1 U1")
    prompts = [chat.document(tiny.pieces(text, seed), tiny.SPECIAL, trained.layout) for seed, text in enumerate(texts)]
    for proposer in (noisy(trained, 0.1), LOOKUP):
        counts = same(trained, prompts, proposer, 10)
        assert 0 < counts.accepted.sum() < counts.drafted.sum(), "some are accepted and some are not"
