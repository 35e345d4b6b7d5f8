"""The smallest model with media, and rows for it: documents are written like "I U2 A3", a picture, two tokens of the
user, three of the assistant; V is a clip, S a sound, S7 one of 7 mel frames."""

import functools

import jax
import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config, sharding
from gpt4v_jax.data import chat, packing
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training import step as step_lib

SPECIAL = {"<pad>": 0, "<end>": 1, "<user>": 2, "<assistant>": 3, "<image>": 4, "<video>": 5, "<audio>": 6}
VOCAB = 32
DATA = config.Data(image=config.Budget(2), video=config.Budget(2), audio=config.Budget(2, 8))


def make_config(kind="concat", context=24, size=4, encoder=False, init_std=0.3, tied=True, position="rope",
                embed_norm=False, patch_norm=False, media=False, axes=1, image=None, video=None, audio=None,
                fusion=None, **backbone):  # fmt: skip
    """A config.Model; pictures are 2 x 2 patches of 2 x 2 pixels. init_std is large, so that errors show.

    media: also clips, of 2 tubelets of 2 x 2 patches, and sounds, of 2 frames of 3 bins a patch. image, video, audio:
    what is to be different in them. fusion: keys of config.Fusion besides its kind.
    """
    block = {"depth": 2, "width": 16, "heads": 2, "hidden": 32} | backbone
    encoder = config.Backbone(**block | {"depth": 1}) if encoder else None
    return config.Model(
        vocab=VOCAB, context=context, position=position, tied=tied, init_std=init_std, embed_norm=embed_norm,
        backbone=config.Backbone(**block), fusion=config.Fusion(kind, **fusion or {}),
        image=config.Image(**{"size": size, "patch": 2, "patch_norm": patch_norm, "encoder": encoder} | (image or {})),
        **({} if not media else {
            "axes": axes,
            "video": config.Video(
                **{"size": 4, "patch": 2, "frames": 4, "tubelet": 2, "encoder": encoder} | (video or {})
            ),
            "audio": config.Audio(**{"bins": 3, "patch": 2, "seconds": 0.1, "encoder": encoder} | (audio or {})),
        }),
    )  # fmt: skip


def make_module(model: config.Model) -> GPT4V:
    return GPT4V(model, batch_lib.layout(model, DATA))


FUSIONS = {  # name -> of make_config; each kind, and what it can be besides
    "concat": {},
    "prefix_lm": {"kind": "prefix_lm"},
    "cross_attention": {"kind": "cross_attention", "fusion": {"every": 1}},
    "cross_attention, latest": {"kind": "cross_attention", "fusion": {"latest": True}},
    "resampler": {"kind": "resampler", "fusion": {"tokens": 3}},
    "resampler, memory": {"kind": "resampler", "fusion": {"tokens": 3, "into": "memory"}},
    "q_former": {"kind": "q_former", "fusion": {"tokens": 2, "depth": 2}},
    "q_former, memory": {"kind": "q_former", "fusion": {"tokens": 2, "into": "memory"}},
    "pooled": {"kind": "pooled", "fusion": {"tokens": 2, "every": 1}},
    "encoder_decoder": {"kind": "encoder_decoder"},
    "encoder_decoder, latest": {"kind": "encoder_decoder", "fusion": {"latest": True}},
    "experts": {"kind": "experts"},
    "mlp2x_gelu": {"fusion": {"connector": "mlp2x_gelu"}, "encoder": True},
    "pool": {"kind": "prefix_lm", "fusion": {"connector": "pool"}},
    "pixel_shuffle": {"fusion": {"connector": "pixel_shuffle"}, "encoder": True},
    "injected": {"fusion": {"inject": 1, "connector": "pixel_shuffle"}, "encoder": True},
}

KINDS = [name for name in FUSIONS if name in config.FUSIONS]  # one of each kind


def fusions(*quick: str) -> list:
    """Names of FUSIONS as a test's parameters: all but `quick` are make soak's; none given: all but KINDS."""
    return [name if name in (quick or KINDS) else pytest.param(name, marks=pytest.mark.soak) for name in FUSIONS]


@functools.cache
def make_model(model: config.Model, seed: int = 0, gate: float = 0.7):
    """-> (GPT4V, its parameters). gate: of blocks that read a memory, which start at 0."""
    module = make_module(model)
    params = jax.jit(lambda: step_lib.init_params(module, seed))()
    return module, jax.tree_util.tree_map_with_path(
        lambda path, x: x + gate if sharding.path_name(path).endswith("_gate/value") else x, params
    )


def pieces(text: str, seed: int = 0) -> list[chat.Piece]:
    rng = np.random.default_rng(seed)
    made = []
    for word in text.split():
        if word[0] in "IVS":
            modality = {"I": "image", "V": "video", "S": "audio"}[word[0]]
            shape = {"I": (4, 4), "V": (4,), "S": (int(word[1:] or 5),)}[word[0]]
            made.append(chat.Piece("user", medium=chat.Medium(modality, int(rng.integers(1000)), shape)))
        else:
            role = {"U": "user", "A": "assistant"}[word[0]]
            made.append(chat.Piece(role, tuple(map(int, rng.integers(len(SPECIAL), VOCAB, int(word[1:]))))))
    return made


def document(text: str, layout: batch_lib.Layout, seed: int = 0) -> chat.Document:
    return chat.document(pieces(text, seed), SPECIAL, layout)


def reader(layout: batch_lib.Layout):
    """-> read(medium) for packing.fill: random values, drawn from the medium's key."""

    def read(medium: chat.Medium):
        rng, (p, dtype) = np.random.default_rng(medium.key), layout.values(medium.modality)
        views = layout.views(medium.modality, medium.shape)
        draw = rng.standard_normal if dtype == np.float32 else functools.partial(rng.integers, 0, 256)
        index = [np.indices(view.grid).reshape(3, -1).T for view in views]
        return [(draw(size=(len(view), p)).astype(dtype), at) for view, at in zip(views, index, strict=True)]

    return read


def rows(layout: batch_lib.Layout, *texts: tuple[str, ...]) -> batch_lib.Batch:
    """One row for each tuple of documents; documents are equal where their texts are."""
    return packing.stack([
        packing.fill([document(text, layout, seed=len(text)) for text in row], reader(layout), layout) for row in texts
    ])  # fmt: skip
