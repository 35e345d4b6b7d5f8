"""The smallest model with pictures, and rows for it: documents are written like "I U2 A3", a picture, two tokens of the
user, three of the assistant."""

import functools

import jax
import numpy as np

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import chat, packing
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training import step as step_lib

SPECIAL = {"<pad>": 0, "<end>": 1, "<user>": 2, "<assistant>": 3, "<image>": 4}
VOCAB = 32


def make_config(kind="concat", context=24, size=4, encoder=False, init_std=0.3, tied=True, position="rope",
                embed_norm=False, patch_norm=False, **backbone):  # fmt: skip
    """A config.Model; pictures are 2 x 2 patches of 2 x 2 pixels. init_std is large, so that errors show."""
    block = {"depth": 2, "width": 16, "heads": 2, "hidden": 32} | backbone
    encoder = config.Backbone(**block | {"depth": 1}) if encoder else None
    return config.Model(
        vocab=VOCAB, context=context, position=position, tied=tied, init_std=init_std, embed_norm=embed_norm,
        backbone=config.Backbone(**block), fusion=config.Fusion(kind),
        image=config.Image(size=size, patch=2, patch_norm=patch_norm, encoder=encoder),
    )  # fmt: skip


def make_module(model: config.Model) -> GPT4V:
    return GPT4V(model, batch_lib.layout(model, config.Data(media=2)))


@functools.cache
def make_model(model: config.Model, seed: int = 0):
    """-> (GPT4V, its parameters)."""
    module = make_module(model)
    return module, jax.jit(lambda: step_lib.init_params(module, seed))()


def pieces(text: str, seed: int = 0) -> list[chat.Piece]:
    rng = np.random.default_rng(seed)
    made = []
    for word in text.split():
        if word == "I":
            made.append(chat.Piece("user", picture=int(rng.integers(1000))))
        else:
            role = {"U": "user", "A": "assistant"}[word[0]]
            made.append(chat.Piece(role, tuple(map(int, rng.integers(len(SPECIAL), VOCAB, int(word[1:]))))))
    return made


def document(text: str, layout: batch_lib.Layout, seed: int = 0) -> chat.Document:
    return chat.document(pieces(text, seed), SPECIAL, layout)


def picture(key: int) -> np.ndarray:
    return np.random.default_rng(key).integers(0, 256, (4, 4, 3), np.uint8)


def rows(layout: batch_lib.Layout, *texts: tuple[str, ...]) -> batch_lib.Batch:
    """One row for each tuple of documents; documents are equal where their texts are."""
    return packing.stack([
        packing.fill([document(text, layout, seed=len(text)) for text in row], picture, layout) for row in texts
    ])  # fmt: skip
