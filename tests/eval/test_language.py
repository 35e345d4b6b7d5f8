"""The loss of a text: by token, by character, by letter; and its interval."""

import types

import numpy as np
import pytest

from gpt4v_jax.eval import common, language


class Lines:
    """12 tokens in windows of 4; each token is a letter and a line's end."""

    def needs(self, epoch):
        return np.full((3, 1), 4)

    def trained_text(self):
        return "a\n" * 12


@pytest.mark.parametrize("nats", [(8.0, 12.0, 16.0), (12.0, 12.0, 12.0)])
def test_windows(nats):
    subject = types.SimpleNamespace(source=Lines())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "score", lambda *_: (np.array(nats), np.full(3, 4.0), None))
        m = language.windows(subject).metrics
    assert (m["loss"], m["loss_a_character"], m["loss_a_letter"]) == (3.0, 1.5, 3.0)
    assert (m["tokens"], m["characters"]) == (12, 24)
    for name in ("loss", "loss_a_character", "loss_a_letter"):
        # Of three windows drawn with replacement, each of 27 draws is as likely: 1/27 are three times the least.
        low, high = (extreme * 3 / 12 * m[name] / 3.0 for extreme in (min(nats), max(nats)))
        assert (m[f"{name}/low"], m[f"{name}/high"]) == pytest.approx((low, high))
