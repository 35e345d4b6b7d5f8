"""The log-probabilities of a prompt's own tokens."""

import dataclasses

import jax
import numpy as np

from gpt4v_jax import config, sharding
from gpt4v_jax.generate import score
from tests import tiny
from tests.generate.test_decode import ask, full_logits, make


def test_they_are_those_of_the_logits_before_each_token():
    trained = dataclasses.replace(make(), mesh=sharding.make_mesh(config.Mesh()))
    prompt = ask(trained, "some text", [3])
    (first, *rest), (none, *tops) = score.prompt(trained, prompt, tiny.reader(trained.layout), 3)
    nats = jax.nn.log_softmax(full_logits(trained, prompt), axis=-1)
    expected = [float(nats[t, token]) for t, token in enumerate(prompt.tokens[1:])]
    assert first is None and none == ()
    np.testing.assert_allclose(rest, expected, atol=1e-5)
    for t, top in enumerate(tops):
        assert [token for token, _ in top] == np.argsort(-nats[t], kind="stable")[:3].tolist()
        assert dict(top).get(prompt.tokens[t + 1], rest[t]) == rest[t]  # the same float
