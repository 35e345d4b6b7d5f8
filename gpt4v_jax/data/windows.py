"""Plain text as documents: a source of windows."""

import numpy as np

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import chat
from gpt4v_jax.data.bad import Bad
from gpt4v_jax.data.objectives import Task
from gpt4v_jax.data.tokenizer import Tokenizer


class Windows:
    """A text as windows of `data.window` tokens, each with the token that follows as its last target.

    In training they start at an offset drawn from (seed, epoch), and every epoch reads the whole text once; with
    seed None they start at 0, do not overlap, and cover the text up to the last whole window.
    """

    def __init__(self, texts, data: config.Data, tokenizer: Tokenizer, layout: batch_lib.Layout, seed: int | None,
                 bad: Bad | None = None, share: float = 1.0, task: Task | None = None):  # fmt: skip
        """texts: one after the other; between two of them lies `<end>`, where the tokenizer has one. share: only
        so much of the beginning. task: what is made of each window; None: it is as above."""
        end = [tokenizer.special["<end>"]] if "<end>" in tokenizer.special else []
        ids: list[int] = []
        said, length, self._places = [], 0, []  # in evaluation: all texts, and where in them each token ends
        for number, text in enumerate(texts):
            ids += [*(end if number else []), *tokenizer.encode(text)]
            if seed is None:
                places = [length + place for place in tokenizer.ends_in(text)]
                between = len(ids) - len(self._places) - len(places)
                self._places += [length] * between + places
                said.append(text)
                length += len(text)
        self._said = "".join(said)
        self._ids = np.array(ids[: round(share * len(ids))], np.int32)
        self.name, self.layout, self.task = data.name, layout, task or Task()
        self._T, self._seed = min(data.window or layout.context, layout.context), seed
        self.bad = bad or Bad(data.name, 1, data.bad)
        if len(self._ids) < 2 * self._T:
            raise config.InputError(f"the text has {len(self._ids)} tokens, too few for two windows of {self._T}")

    def _offset(self, epoch: int) -> int:
        return 0 if self._seed is None else int(np.random.default_rng((self._seed, epoch, 1)).integers(self._T))

    def needs(self, epoch: int) -> np.ndarray:
        n = (len(self._ids) - 1 - self._offset(epoch)) // self._T
        positions, source = self.task.lengths(self._T)
        media = [0] * (2 * len(batch_lib.MEDIA))
        return np.tile([positions, *media, *([source] if self.layout.source else [])], (n, 1))

    def document(self, epoch: int, i: int) -> chat.Document:
        T, start = self._T, self._offset(epoch) + i * self._T
        ids = self._ids[start : start + T + 1]
        ones = np.ones(T, bool)
        return self.task(chat.Document(ids[:-1], ids[1:], ones.astype(np.float32), ones, trained=ones), epoch, i)

    def trained_text(self) -> str:
        """-> the text of those tokens that are targets in evaluation, as it was before a tokenizer changed it."""
        return self._said[self._places[0] : self._places[len(self.needs(0)) * self._T]]

    def read(self, medium: chat.Medium):
        raise ValueError("a text has no media")
