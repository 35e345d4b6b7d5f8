"""Texts -> probabilities of labels, by a model that was trained to answer with a label's name.

The probability of a label is that of its tokens and of the answer's end, divided by the sum over the labels: so
classification is answering (T5, Raffel et al. 2020), and no other head is needed.
"""

import dataclasses
import functools
import threading
from collections.abc import Sequence

import jax
import numpy as np

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config, sharding
from gpt4v_jax.data import chat, packing
from gpt4v_jax.generate import decode
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training import step as step_lib
from gpt4v_jax.training.workdir import Trained

WINDOWS = 8  # of a long text, in one compiled program


class Classifier:
    """Thread-safe: one program runs at a time."""

    def __init__(self, trained: Trained, labels: Sequence[str], question: str = "{}"):
        """question: what the model was asked in training, {} for the text. Raises InputError for a model of plain text,
        for less than two labels or the same twice, and where no room is left for a text."""
        if not trained.chats:
            raise config.InputError("this model was trained on plain text alone, and answers no question: train it on "
                                    "questions with the labels as answers")
        if not trained.run.model.causal:
            raise config.InputError("this model's stream is bidirectional: it fills in masked tokens, and answers none")
        if len(set(labels)) < max(len(labels), 2) or "" in labels:
            raise config.InputError(f"labels={list(labels)} must be two or more, none of them twice or empty")
        if question.count("{}") != 1:
            raise config.InputError(f"question={question!r} must have one {{}}, the text's place")
        self.trained, self.labels, self.question = trained, tuple(labels), question
        self._ids = [tuple(trained.tokenizer.encode(label)) for label in labels]
        self._around = [trained.tokenizer.encode(part) for part in question.split("{}")]
        layout, lengths = trained.layout, [chat.lengths(self._pieces((), ids), trained.layout) for ids in self._ids]
        stream, source = (max(column) for column in zip(*lengths, strict=True))
        self._room = layout.source - source if layout.source else layout.context - stream
        if self._room - sum(map(len, self._around)) < 2:
            raise config.InputError(f"labels={list(labels)} and question={question!r} leave no room for a text in the "
                                    f"model's context of {layout.context}: make them shorter")
        self._lock = threading.Lock()

    def probabilities(self, text: str) -> np.ndarray:
        """-> [W,L] float64, the labels' probabilities in each window of the text: one, or, where the model's context
        does not hold it, several that overlap by half. Raises InputError for what the tokenizer cannot read."""
        asked = self._windows(text)
        some = WINDOWS if len(asked) > 1 else 1
        return np.concatenate([self._scored(asked[i : i + some], some) for i in range(0, len(asked), some)])

    def _windows(self, text: str) -> list[list[int]]:
        """-> the questions' tokens."""
        whole = self.trained.tokenizer.encode(self.question.replace("{}", text))
        if len(whole) <= self._room:
            return [whole]
        before, after = self._around
        ids, size = self.trained.tokenizer.encode(text), self._room - len(before) - len(after)
        starts = range(0, max(len(ids) - size, 0) + size // 2, size // 2)
        return [[*before, *ids[start : start + size], *after] for start in starts]

    def _scored(self, asked: Sequence[Sequence[int]], windows: int) -> np.ndarray:
        """-> [n,L]; rows are filled up to `windows`, and to what the devices share, so that few shapes are compiled."""
        trained = self.trained
        made = [chat.document(self._pieces(ids, label), trained.tokenizer.special, trained.layout)
                for ids in asked for label in self._ids]  # fmt: skip
        shards = sharding.ways(trained.mesh, "batch")
        rows = decode.rounded(windows * len(self.labels), shards)
        made += [made[-1]] * (rows - len(made))
        width = min(decode.rounded(max(map(len, made)), decode.BUCKET), trained.layout.context)
        layout = dataclasses.replace(trained.layout, context=width, **decode.budgets(made, trained.layout))
        batch = packing.stack([packing.fill([document], None, layout) for document in made])
        with self._lock, jax.set_mesh(trained.mesh):  # JAX keeps a mesh for each thread
            nats = np.asarray(_nats(trained.model.clone(layout=layout), trained.params, batch), np.float64)
        score = -nats[: len(asked) * len(self.labels)].reshape(len(asked), -1)
        p = np.exp(score - score.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True)

    def _pieces(self, ids: Sequence[int], label: Sequence[int]) -> list[chat.Piece]:
        return [chat.Piece("user", ids), chat.Piece("assistant", label)]


@functools.partial(jax.jit, static_argnames="model")
def _nats(model: GPT4V, params, batch: batch_lib.Batch):
    """-> [B]: -log p of a row's trained tokens."""
    return (step_lib.token_scores(model, params, batch).nats * batch.weight).sum(axis=1)
