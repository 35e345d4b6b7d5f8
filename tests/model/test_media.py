"""Pictures, clips and sound in one stream: who sees whom, packing, the cache, rope over three axes, the front ends."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import chat, packing
from gpt4v_jax.model import attention, audio
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training import step as step_lib
from tests import tiny

T = 64
# Every way in which a medium can come in occurs with both fusions, and with one axis and three.
VARIANTS = {
    "axes": {"axes": 3},
    "prefix": {"kind": "prefix_lm", "audio": {"front": "conv"}},
    "encoder": {"encoder": True, "axes": 3, "audio": {"front": "conv"}},
    "rope": {"kind": "prefix_lm", "encoder": True, "image": {"position": "rope", "tiles": 2},
             "video": {"position": "rope"}, "audio": {"position": "rope"}, "patch_norm": True},
    "native": {"image": {"resize": "native"}, "video": {"tubelet": 1, "patch_norm": True, "position": "none"},
               "audio": {"patch": 4, "patch_norm": True, "position": "none"}},
}  # fmt: skip
DATA = config.Data(image=config.Budget(4, 24), video=config.Budget(2), audio=config.Budget(3, 8))


@functools.cache
def made(name: str):
    """-> (GPT4V, its parameters). Heads are 8 wide: rope over three axes has something for each."""
    model = tiny.make_config(context=T, media=True, **{"head_dim": 8} | VARIANTS[name])
    module = GPT4V(model, batch_lib.layout(model, DATA))
    return module, jax.jit(lambda: step_lib.init_params(module, 0))()


@functools.cache
def forward(name: str):
    module, params = made(name)
    return jax.jit(lambda batch: step_lib.forward(module, params, batch))


def document(text: str, layout: batch_lib.Layout, seed: int = 0) -> chat.Document:
    """As tiny.document; "i" is a small picture of another shape."""
    pieces = []
    for n, word in enumerate(text.split()):
        piece, = tiny.pieces(word.upper() if word == "i" else word, seed=100 * seed + n)
        if word == "i":
            piece = dataclasses.replace(piece, medium=dataclasses.replace(piece.medium, shape=(2, 4)))
        if word == "I":
            piece = dataclasses.replace(piece, medium=dataclasses.replace(piece.medium, shape=(4, 9)))
        pieces.append(piece)
    return chat.document(pieces, tiny.SPECIAL, layout)


def row(module, *documents: chat.Document) -> batch_lib.Batch:
    return packing.stack([packing.fill(documents, tiny.reader(module.layout), module.layout)])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("texts", [
    ("i S3 U2 A2", "U1 i V", "S U1 A1 i A2"), ("I I U1 A2", "S3 U1 A1 i"), ("U1 A1 I", "V i i A1"),
])  # fmt: skip
def test_packed_rows_equal_separate_rows(name, texts):
    """All modalities mixed in a row; two pictures side by side; a medium first, and last; a tiled one ("I", of "rope")
    as the first and the last thing, beside another tiled one."""
    model, params = made(name)
    room = batch_lib.layout(model.config, config.Data(image=config.Budget(8, 40), video=DATA.video, audio=DATA.audio))
    module = model.clone(layout=room)
    whole = jax.jit(lambda batch: step_lib.forward(module, params, batch))
    documents = [document(text, room, seed) for seed, text in enumerate(texts)]
    assert len(room.views("image", (4, 9))) == (3 if name == "rope" else 1)
    packed = whole(row(module, *documents))[0]
    start = 0
    for one in documents:
        alone = whole(row(module, one))[0]
        np.testing.assert_allclose(packed[start : start + len(one)], alone[: len(one)], atol=1e-5)
        start += len(one)
    assert start <= T and np.ptp(packed) > 1


def test_tiles_are_items_of_their_own():
    """An encoder reads each by itself."""
    module, _ = made("rope")
    item = row(module, document("I U1 A1", module.layout)).image.item[0]
    views = module.layout.views("image", (4, 9))
    assert item[item > 0].tolist() == [n for n, view in enumerate(views, 1) for _ in range(len(view))]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("modality, text", [
    ("image", "S3 U1 I i V A2"), ("video", "i U1 V S3 A2"), ("audio", "i V U1 S3 A2"),
])  # fmt: skip
def test_what_comes_before_a_medium_does_not_see_it(name, modality, text):
    """Other values of one medium change its own positions and all behind it, and no bit before its block."""
    module, _ = made(name)
    one = document(text, module.layout)
    batch = row(module, one)
    media = getattr(batch, modality)
    patch = media.patch.copy()
    here = media.item[0] == 1
    patch[0, here] = 255 - patch[0, here] if modality != "audio" else -patch[0, here]
    changed = batch.replace(**{modality: media.replace(patch=patch)})
    moved = (np.asarray(forward(name)(changed))[0] != np.asarray(forward(name)(batch))[0]).any(-1)
    first = int(media.at[0, 0])
    step = np.cumsum(batch.ar[0])
    sees = (batch.document[0] == 1) & (step >= step[first])
    np.testing.assert_array_equal(moved, sees)
    assert VARIANTS[name].get("kind") == "prefix_lm" or first > 0 and not moved[:first].any()


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decoding_equals_the_whole(name):
    """A prefill with sound and clip, a second turn in two chunks, the first of which ends with its picture (whose rows
    reach further than its time), then tokens one by one."""
    module, params = made(name)
    one = document("S3 V U2 A2 U1 i S3 A3", module.layout)
    whole = row(module, one)
    expected = np.asarray(forward(name)(whole))[0, : len(one)]
    turn = int(np.flatnonzero(one.tokens == tiny.SPECIAL["<user>"])[1])
    answer = int(np.flatnonzero(one.tokens == tiny.SPECIAL["<assistant>"])[1]) + 1
    cache = attention.empty_cache(module.config.backbone, 1, len(one), module.config.axes)
    append = jax.jit(lambda model, b, c: model.apply({"params": params}, b, c)[:2], static_argnums=0)
    found, taken = [], dict.fromkeys(batch_lib.MEDIA, 0)
    stream = ("tokens", "slot", "position", "document", "ar", "target", "weight")
    picture = whole.image.at[0, 0] + int((whole.image.item[0] == 1).sum())
    assert turn < picture < answer
    ends = sorted({0, turn, int(picture), answer})
    for start, stop in [*zip(ends, ends[1:], strict=False), *((t, t + 1) for t in range(answer, len(one)))]:
        none = dict.fromkeys(batch_lib.MEDIA)
        part = whole.replace(**{key: getattr(whole, key)[:, start:stop] for key in stream}, **none)
        if stop - start > 1:
            layout, media = dataclasses.replace(module.layout, context=stop - start), {}
            for key in batch_lib.MEDIA:
                packed = getattr(whole, key)
                items = [n for n, at in enumerate(packed.at[0]) if start <= at < stop]
                keep = np.isin(packed.item[0] - 1, items)
                renumbered = np.where(keep, packed.item[0] - taken[key], 0)[None]
                at = np.full_like(packed.at, -1)
                at[0, : len(items)] = packed.at[0, items] - start
                media[key] = packed.replace(item=renumbered, at=at)
                taken[key] += len(items)
            part, model = part.replace(**media), module.clone(layout=layout)
        else:
            model = module
        hidden, cache = append(model, part, cache)
        assert (cache.next_position == whole.position[0, :stop].max() + 1).all()
        found.append(module.apply({"params": params}, hidden, method="logits")[0])
    np.testing.assert_allclose(np.concatenate(found), expected, atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_is_trained(name):
    module, params = made(name)
    batch = row(module, document("I S3 U2 V A3", module.layout))

    def loss(params):
        logits = step_lib.forward(module, params, batch)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.target[..., None], -1)[..., 0]
        return (losses * batch.weight).sum()

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(grad).all() and (np.abs(grad).max() > 0 or path.endswith("key/bias")), path


def test_positions_over_three_axes():
    """A patch stands at its (time, row, column) behind the medium's start, text behind the largest of all of them."""
    module, _ = made("axes")
    one = document("U1 I V A1", module.layout)
    at = packing.positions(len(one), one.media, module.layout).tolist()
    assert at[:2] == [[0] * 3, [1] * 3]
    assert at[2:6] == [[2, 2, 2], [2, 2, 3], [2, 3, 2], [2, 3, 3]]  # the picture, from 2 on
    assert at[6:10] == [[4, 4, 4], [4, 4, 5], [4, 5, 4], [4, 5, 5]] and at[10] == [5, 4, 4]  # the clip's two tubelets
    assert at[14:] == [[6] * 3, [7] * 3, [8] * 3]  # <assistant>, the answer, <end>


def test_rope_over_three_axes_turns_each_section_by_its_own():
    """With equal positions it is rope over one; otherwise 2 : 3 : 3 of the pairs go by time, row, column."""
    x = jnp.array(np.random.default_rng(0).standard_normal((1, 5, 2, 16)), jnp.float32)
    at = jnp.array(np.random.default_rng(1).integers(0, 50, (1, 5, 3)))
    one = attention.rope(x, at[..., :1], 100.0)
    np.testing.assert_array_equal(attention.rope(x, jnp.repeat(at[..., :1], 3, -1), 100.0), one)
    turned = attention.rope(x, at, 100.0)
    for axis, pairs in ((0, [0, 1]), (1, [2, 3, 4]), (2, [5, 6, 7])):
        expected = attention.rope(x, at[..., axis : axis + 1], 100.0)
        for pair in pairs:
            np.testing.assert_array_equal(turned[..., [pair, pair + 8]], expected[..., [pair, pair + 8]])


@pytest.mark.parametrize("patch", [2, 4])
def test_convolutions_are_those_of_each_sound_alone(patch):
    """Against lax's: kernels 3 and patch + 1, strides 1 and patch, zeros beyond both ends of each sound."""
    c, width = config.Audio(bins=3, patch=patch, front="conv"), 8
    rng = np.random.default_rng(0)
    lengths = (3, 1, 2)
    item = np.repeat([1, 2, 3, 0], [*lengths, 2])[None]
    frames = rng.standard_normal((1, item.size, patch * 3)).astype(np.float32)
    module = audio.Convolutions(c, width)
    params = jax.tree.map(lambda x: x + 0.1, module.init(jax.random.key(0), frames, item)["params"])
    found = module.apply({"params": params}, frames, item)[0]

    def conv(x, p, kernel, stride):
        made = p["kernel"].reshape(kernel, -1, width)
        pads = [(1, kernel - 2)] if stride > 1 else [(1, 1)]
        out = jax.lax.conv_general_dilated(x[None], made, (stride,), pads, dimension_numbers=("NWC", "WIO", "NWC"))
        return jax.nn.gelu(out[0] + p["bias"], approximate=False)

    start = 0
    for n in lengths:
        x = frames[0, start : start + n].reshape(n * patch, 3)
        expected = conv(conv(x, params["first"], 3, 1), params["second"], patch + 1, patch)[:n]
        np.testing.assert_allclose(found[start : start + n], expected, atol=1e-5)
        start += n


def test_native_pictures_and_tiles_take_what_their_shape_asks_for():
    native = batch_lib.layout(tiny.make_config(image={"resize": "native", "size": 8}), DATA)
    assert native.views("image", (8, 4))[0].grid == (1, 4, 2) and native.views("image", (80, 40))[0].grid == (1, 4, 2)
    assert native.views("image", (1, 300))[0].grid == (1, 1, 4) and native.views("image", (3, 3))[0].grid == (1, 2, 2)
    tiled = batch_lib.layout(tiny.make_config(image={"tiles": 4}), DATA)
    assert [v.box for v in tiled.views("image", (4, 3))] == [(0, 0, 1, 1)]  # small: itself alone
    wide = tiled.views("image", (5, 10))
    assert [v.box for v in wide] == [(0, 0, 1, 1), (0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    assert len(tiled.views("image", (9, 9))) == 5 and tiled.count("image", (9, 9)) == 20
    assert len(tiled.views("image", (400, 100))) == 5 and tiled.views("image", (400, 100))[1].box == (0, 0, 1, 0.25)


@pytest.mark.parametrize("values, message", [
    ({"axes": 2, "media": True}, "axes=2 must be 1, or"),
    ({"axes": 3, "media": True, "position": "learned"}, "axes=3 must be 1, or with position='rope' 3"),
    ({"axes": 3, "media": True, "head_dim": 4}, "head_dim=4 must be even and 6 or more"),
    ({"image": {"position": "rope"}}, "image.position='rope' is an encoder's"),
    ({"media": True, "audio": {"bins": 200}}, "audio.bins=200 is more than 128"),
    ({"image": {"size": 8, "patch": 16}}, "image.size=8 is less than image.patch=16"),
    ({"image": {"tiles": 1}}, "image.tiles=1"),
    ({"image": {"tiles": 2, "resize": "native"}}, "tiles=2 with image.resize='native': .* raise image.size instead"),
    ({"image": {"tiles": 2, "resize": "pad"}}, "tiles=2 with image.resize='pad': .* resized square"),
    ({"media": True, "audio": {"front": "conv", "patch_norm": True}}, "patch_norm=True is for audio.front='patch'"),
    ({"media": True, "audio": {"front": "conv1d"}}, "front='conv1d' is none of patch, conv .did you mean 'conv'"),
    ({"media": True, "video": {"size": 5}}, "video.size=5 is not a multiple of video.patch=2"),
])  # fmt: skip
def test_what_cannot_be(values, message):
    with pytest.raises(config.InputError, match=message):
        tiny.make_config(**values)
