"""What a fusion must keep beside the mask law (test_gpt4v.py) and the cache (generate/test_decode.py): identities,
counts of positions, every modality, blocks computed otherwise, bad input."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config, sharding
from gpt4v_jax.data import chat, packing
from gpt4v_jax.model import attention, media
from gpt4v_jax.model.backbone import Block
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training import objectives
from gpt4v_jax.training import step as step_lib
from tests import tiny

forward = jax.jit(step_lib.forward, static_argnums=0)


def other(batch: batch_lib.Batch, name: str) -> batch_lib.Batch:
    """The batch with other media of a modality."""
    found = getattr(batch, name)
    patch = 255 - found.patch if found.patch.dtype == np.uint8 else -found.patch
    return batch.replace(**{name: found.replace(patch=patch)})


# ---- identities


@pytest.mark.parametrize("name", ["cross_attention", "q_former, memory"])
def test_a_closed_gate_is_the_model_of_text_bit_for_bit(name):
    """At initialisation, also where rows have media: their anchors are tokens."""
    model = tiny.make_config(**tiny.FUSIONS[name])
    module, params = tiny.make_model(model, gate=0.0)
    text = GPT4V(dataclasses.replace(model, image=config.Image(), fusion=config.Fusion()), dataclasses.replace(
        module.layout, items=(0, 0, 0), patches=(0, 0, 0), place="stream", tokens=0
    ))  # fmt: skip
    own = step_lib.abstract_params(text)
    kept = {path: x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    params_of_text = jax.tree_util.tree_map_with_path(lambda path, _: kept[path], own)
    batch = tiny.rows(module.layout, ("I U2 A3", "U1 I A2"), ("U3 A8 U2 A4",))
    expected = forward(text, params_of_text, batch.replace(image=None))
    np.testing.assert_array_equal(forward(module, params, batch), expected)
    assert not np.array_equal(forward(*tiny.make_model(model), batch), expected), "open gates change it"


@pytest.mark.parametrize("connector", config.CONNECTORS)
def test_a_projector_from_zero_knows_no_picture(connector):
    fusion = {"connector": connector, "gain": 0.0}
    module, params = tiny.make_model(tiny.make_config(encoder=True, fusion=fusion))
    batch = tiny.rows(module.layout, ("I U2 A3",))
    np.testing.assert_array_equal(forward(module, params, batch), forward(module, params, other(batch, "image")))
    module, params = tiny.make_model(tiny.make_config(encoder=True, fusion={"connector": connector}))
    assert not np.array_equal(forward(module, params, batch), forward(module, params, other(batch, "image")))


# ---- every modality


@pytest.mark.parametrize("name", tiny.fusions())
def test_clips_and_sounds_move_what_may_see_them(name):
    model = tiny.make_config(media=True, context=32, **tiny.FUSIONS[name])
    module, params = tiny.make_model(model)
    batch = tiny.rows(module.layout, ("U1 V A2", "U1 S A1 S7 U1 A1"))
    before, step = np.asarray(forward(module, params, batch)[0]), np.cumsum(batch.ar[0])
    for modality, number in (("video", 1), ("audio", 2)):
        changed = (np.asarray(forward(module, params, other(batch, modality))[0]) != before).any(-1)
        first = getattr(batch, modality).at[0, 0]
        np.testing.assert_array_equal(changed, (batch.document[0] == number) & (step >= step[first]))


@pytest.mark.parametrize("name", tiny.fusions("q_former", "pooled", "encoder_decoder", "experts"))
def test_every_parameter_is_trained(name):
    """But the weights that experts have for media in the last block, whose results nothing reads."""
    module, params = tiny.make_model(tiny.make_config(**tiny.FUSIONS[name]))
    # Two pictures in a document: of one alone there is nothing to weigh.
    batch = tiny.rows(module.layout, ("U1 I I A2", "U2 A3"), ("U3 A8 U2 A4",))

    def loss(params):
        total, weight = objectives.tokens(step_lib.token_scores(module, params, batch), batch)["loss"]
        return total / weight

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        path = sharding.path_name(path)
        last = path.startswith("backbone/block_1/") and "image_" in path
        unread = last and ("mlp" in path or "query" in path or "out" in path)
        assert np.isfinite(grad).all() and (np.abs(grad).max() > 0) != unread, path


def test_the_latest_medium_alone():
    """Of each kind: a sound after a picture leaves the picture seen; a second picture hides the first."""
    values = tiny.FUSIONS["cross_attention, latest"]
    module, params = tiny.make_model(tiny.make_config(media=True, context=32, **values))
    batch = tiny.rows(module.layout, ("U1 I A2 S U1 A2 U1 I A2",))
    sight = module.apply({"params": params}, batch, capture=True)[2]["memory"]
    seen = np.asarray(attention.visible(sight)[0])
    (first, second), (sound, _) = batch.image.at[0], batch.audio.at[0]
    end = int((batch.document[0] > 0).sum())
    audio = module.layout.offset("audio")
    for vectors, start, stop in ((slice(0, 4), first, second), (slice(4, 8), second, end), (audio, sound, end)):
        expected = (np.arange(32) >= start) & (np.arange(32) < stop)
        np.testing.assert_array_equal(seen[:, vectors].reshape(32, -1).all(1), expected)
        np.testing.assert_array_equal(seen[:, vectors].reshape(32, -1).any(1), expected)
    all_of_them = dataclasses.replace(sight, k_kind=None)
    assert np.asarray(attention.visible(all_of_them))[0, end - 1, :4].all()


def test_the_latest_turn_alone():
    """Of a source: each answer sees its own question and all pictures, also those of earlier turns; no later ones."""
    module, params = tiny.make_model(tiny.make_config(context=32, **tiny.FUSIONS["encoder_decoder, latest"]))
    batch = tiny.rows(module.layout, ("I U2 A3 U3 A1 I U1 A2", "U2 A1"))
    sight = module.apply({"params": params}, batch, capture=True)[2]["memory"]
    seen, source = np.asarray(attention.visible(sight)[0]), batch.source
    step, turn = np.cumsum(batch.ar[0]), np.cumsum(batch.ar[0])[source.at[0]]
    for t in np.flatnonzero(batch.document[0] > 0):
        mine = (source.document[0] == batch.document[0, t]) & (turn <= step[t])
        newest = turn[mine & (source.slot[0] < 0)].max()
        np.testing.assert_array_equal(seen[t], mine & ((source.slot[0] >= 0) | (turn == newest)))
    assert len(set(turn[source.document[0] == 1])) == 3 and not seen[batch.document[0] == 0].any()


@pytest.mark.parametrize("name", tiny.fusions("resampler", "q_former"))
def test_pictures_side_by_side_are_told_apart(name):
    """Exchanged, they are another row: what queries read of one medium is not read of the other.

    In a memory, pictures of one block are a set, and a q_former's turn is one block: there they stand in two turns.
    """
    module, params = tiny.make_model(tiny.make_config(**tiny.FUSIONS[name]))
    batch = tiny.rows(module.layout, ("I U2 A3 I A2" if name == "q_former, memory" else "I I U2 A3",))
    patch = batch.image.patch.reshape(1, 2, -1, batch.image.patch.shape[-1])[:, ::-1].reshape(batch.image.patch.shape)
    exchanged = batch.replace(image=batch.image.replace(patch=patch))
    assert np.abs(forward(module, params, batch) - forward(module, params, exchanged)).max() > 1e-2


@pytest.mark.parametrize("name", tiny.fusions("q_former", "cross_attention", "experts"))
def test_documents_that_are_one_block(name):
    """As masked ones: two of them behind a causal one. Each keeps to itself, and its picture moves all of it."""
    model = tiny.make_config(context=48, **tiny.FUSIONS[name])
    module, params = tiny.make_model(model)
    module = GPT4V(model, dataclasses.replace(module.layout, wide=True))
    batch = tiny.rows(module.layout, ("U2 A3", "I U2 A3", "U1 I A2"))
    batch = batch.replace(ar=np.where(batch.document >= 2, False, batch.ar))
    before = np.asarray(forward(module, params, batch)[0])
    for number in (1, 2, 3):
        tokens = batch.tokens.copy()
        at = np.flatnonzero(batch.document[0] == number)
        tokens[0, at[-1]] = (tokens[0, at[-1]] + 5) % tiny.VOCAB
        changed = (np.asarray(forward(module, params, batch.replace(tokens=tokens))[0]) != before).any(-1)
        assert set(np.flatnonzero(changed)) <= set(at) and changed.any()
    after = np.asarray(forward(module, params, other(batch, "image"))[0])
    np.testing.assert_array_equal((after != before).any(-1), batch.document[0] >= 2)


# ---- connectors


@pytest.mark.parametrize("mean", [True, False])
def test_merged_patches_against_numpy(mean):
    """Two pictures of odd grids, 3 x 5 and 2 x 1, and padding: each vector holds the patches of its box, row by row."""
    grids, E = [(1, 3, 5), (1, 2, 1)], 4
    x = np.random.default_rng(0).standard_normal((1, 20, E)).astype(np.float32)
    index, item, size = np.zeros((1, 20, 3), np.int32), np.zeros((1, 20), np.int32), np.zeros((1, 3, 3), np.int32)
    expected, start = [], 0
    for number, (_, rows, columns) in enumerate(grids, 1):
        n = rows * columns
        index[0, start : start + n] = np.indices((1, rows, columns)).reshape(3, -1).T
        item[0, start : start + n], size[0, number - 1] = number, (1, rows, columns)
        picture = x[0, start : start + n].reshape(rows, columns, E)
        for r in range(0, rows, 2):
            for c in range(0, columns, 2):
                box = np.zeros((2, 2, E), np.float32)
                there = picture[r : r + 2, c : c + 2]
                box[: there.shape[0], : there.shape[1]] = there
                expected.append(there.mean((0, 1)) if mean else box.reshape(-1))
        start += n
    at = np.array([[0, 7, -1]], np.int32)
    found = media._sources(batch_lib.Media(x, index, item, at, size), 9, (1, 2, 2))
    merged = np.asarray(media._merged(jnp.asarray(x), found, mean))
    assert len(expected) == 7 and merged.shape == (1, 9, E if mean else 4 * E)
    np.testing.assert_allclose(merged[0, :7], expected, rtol=1e-6)
    assert not merged[0, 7:].any()


def test_native_pictures_are_merged_in_the_stream():
    """A picture moves only its own document, from where it stands on, beside another of another shape."""
    image = {"size": 8, "resize": "native"}
    module, params = tiny.make_model(tiny.make_config(context=32, image=image, fusion={"connector": "pixel_shuffle"}))
    layout = module.layout
    assert [layout.count("image", shape) for shape in ((8, 8), (8, 2), (6, 8), (2, 2))] == [4, 2, 4, 1]
    assert layout.encoded("image") == 2 * 4 and layout.budget("image") == (2, 32)
    pictures = [chat.Piece("user", medium=chat.Medium("image", k, shape)) for k, shape in enumerate([(8, 8), (6, 2)])]
    made = [chat.document([one, *tiny.pieces("U1 A2")], tiny.SPECIAL, layout) for one in pictures]
    batch = packing.stack([packing.fill(made, tiny.reader(layout), layout)])
    before, step = np.asarray(forward(module, params, batch)[0]), np.cumsum(batch.ar[0])
    for number, at in enumerate(batch.image.at[0], 1):
        patch = np.where((batch.image.item == number)[..., None], 255 - batch.image.patch, batch.image.patch)
        after = np.asarray(forward(module, params, batch.replace(image=batch.image.replace(patch=patch)))[0])
        expected = (batch.document[0] == number) & (step >= step[at])
        np.testing.assert_array_equal((after != before).any(-1), expected)


class Encoded(nn.Module):
    """media.encoded, as an embedder has it."""

    config: config.Image
    inject: int = 0

    @nn.compact
    def __call__(self, x, media_):
        return media.encoded(self.config, x, media_, config.Compute(), self.inject)


def test_which_layers_are_taken():
    """`layer` leaves out the blocks behind it and the last norm; what is injected are results of earlier blocks."""
    block = config.Backbone(depth=3, width=8, heads=2)
    image = config.Image(size=4, patch=2, encoder=block)
    x, item = jax.random.normal(jax.random.key(0), (1, 4, 8)), jnp.ones((1, 4), jnp.int32)
    only = batch_lib.Media(x, jnp.zeros((1, 4, 3), jnp.int32), item, item[:, :1], item[:, :3])
    params = Encoded(image).init(jax.random.key(1), x, only)["params"]

    def features(layer, inject=0):
        return Encoded(dataclasses.replace(image, layer=layer), inject).apply({"params": params}, x, only)

    last, deep = features(-1, 2)
    np.testing.assert_allclose(deep, [features(layer)[0] for layer in (-3, -2)], atol=1e-6)
    third = Block(block, "global", rotary=False).apply(
        {"params": params["encoder"]["block_2"]}, deep[1], None, attention.bidirectional(item))[0]  # fmt: skip
    unit = third * jax.lax.rsqrt(jnp.square(third).mean(-1, keepdims=True) + block.norm_eps)
    np.testing.assert_allclose(last, unit * params["encoder"]["norm"]["scale"], atol=1e-5)
    six = dataclasses.replace(image, encoder=dataclasses.replace(block, depth=6))
    taps = [media.encoder(six, config.Compute(), inject).taps for inject in (0, 1, 2, 5)]
    assert taps == [(), (2,), (1, 3), (0, 1, 2, 3, 4)]


@pytest.mark.parametrize("name, picture, clip, sound", [
    ("concat", 4, 8, 3), ("prefix_lm", 4, 8, 3), ("cross_attention", 1, 1, 1), ("resampler", 3, 3, 3),
    ("resampler, memory", 1, 1, 1), ("q_former", 2, 2, 2), ("pooled", 1, 1, 1), ("encoder_decoder", 4, 8, 3),
    ("experts", 4, 8, 3), ("pool", 1, 2, 2), ("pixel_shuffle", 1, 2, 2),
])  # fmt: skip
def test_positions_of_media(name, picture, clip, sound):
    """2 x 2 patches; 2 x 2 x 2; 5 frames in patches of 2."""
    layout = tiny.make_module(tiny.make_config(media=True, **tiny.FUSIONS[name])).layout
    assert [layout.count(*x) for x in (("image", (4, 4)), ("video", (4,)), ("audio", (5,)))] == [picture, clip, sound]
    text = tiny.document("I U2 A3", layout)
    assert (len(text), len(text.source)) == ((5, 7) if name == "encoder_decoder" else (picture + 8, 0))


def test_what_an_encoder_reads_and_the_decoder_says():
    """The user's turns are the source; each is seen from the answer on that follows it."""
    layout = tiny.make_module(tiny.make_config(context=32, **tiny.FUSIONS["encoder_decoder"])).layout
    made = tiny.document("I U2 A3 U1 A2", layout)
    special = tiny.SPECIAL
    asked = [special["<user>"], *[special["<image>"]] * 4]
    assert list(made.source[:5]) == asked and made.source[7] == special["<user>"] and len(made.source) == 9
    assert made.tokens[0] == made.tokens[5] == special["<assistant>"] and len(made) == 9
    assert made.source_at == (*[0] * 7, *[5] * 2) and made.ar.all()
    batch = tiny.rows(layout, ("U1 A1", "I U2 A3 U1 A2"))
    np.testing.assert_array_equal(batch.source.at[0, 2:11], [3] * 7 + [8] * 2)
    np.testing.assert_array_equal(batch.source.slot[0, 3:7], range(4))
    assert batch.image.at[0, 0] == 3


# ---- blocks computed otherwise


@pytest.mark.parametrize("name", tiny.fusions("experts"))
def test_a_loop_of_blocks_is_the_list(name):
    values = tiny.FUSIONS[name] if name != "injected" else {"depth": 3, "encoder": True, "fusion": {"inject": 2}}
    module, params = tiny.make_model(tiny.make_config(**values))
    batch = tiny.rows(module.layout, ("I U2 A3", "U1 I A2"))

    def gradient(module):
        return jax.jit(jax.grad(lambda p: step_lib.token_scores(module, p, batch).nats.sum()))(params)

    loop = GPT4V(module.config, module.layout, config.Compute(scan=1, remat="full"))
    for a, b in zip(*(jax.tree.leaves(gradient(m)) for m in (module, loop)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * max(np.abs(a).max(), 1))


def test_patterns():
    base = config.Backbone(depth=6, pattern=("local", "global"), window=4)
    assert base.also("gated", 3).kinds == ("local", "global", "local+gated", "global", "local", "global+gated")
    assert base.first("inject", 2).kinds == ("local", "global+inject", "local+inject", "global", "local", "global")
    assert config.Model(fusion=config.Fusion("pooled")).decoder.kinds == ("global", "global+pooled") * 2
    two = config.Model(fusion=config.Fusion("encoder_decoder"))
    assert two.decoder.kinds == ("global+cross",) * 4 and two.encoder == two.backbone


# ---- bad input


@pytest.mark.parametrize("values, message", [
    ({"fusion": {"kind": "cross_atention"}}, "kind='cross_atention' is none of .*did you mean 'cross_attention'"),
    ({"fusion": {"connector": "mlp2x"}}, "connector='mlp2x' is none of .*did you mean 'mlp2x_gelu'"),
    ({"fusion": {"kind": "resampler", "into": "memry"}}, "into='memry' .*did you mean 'memory'"),
    ({"fusion": {"tokens": 0}}, "tokens=0 must be 1 or more"),
    ({"fusion": {"kind": "pooled", "every": 9}}, "fusion.every=9 is beyond backbone.depth=4"),
    ({"fusion": {"inject": 4}}, "fusion.inject=4 must be less than backbone.depth=4"),
    ({"fusion": {"kind": "pooled", "inject": 1}}, "inject=1 adds to patches in the stream: kind='pooled' has none"),
    ({"fusion": {"kind": "resampler", "inject": 1}}, "inject=1 adds to patches in the stream: kind='resampler'"),
    ({"fusion": {"latest": True}}, "latest=True is for a memory"),
    ({"image": {"size": 8, "patch": 4}, "fusion": {"gain": 0.0}}, "gain=0.0 is a connector's, and without an encoder"),
    ({"image": {"size": 8, "patch": 4, "position": "rope", "encoder": {"width": 21, "heads": 3}}}, "head_dim=7 must"),
    ({"image": {"size": 8, "patch": 4, "layer": -2}}, "image.layer=-2 must be from -1"),
    ({"backbone": {"pattern": ["global+gated"]}}, "gated, pooled, inject are set by model.fusion"),
    ({"backbone": {"pattern": ["global+cros"]}}, "pattern='cros' .*did you mean 'cross'"),
    ({"causal": False, "fusion": {"kind": "encoder_decoder"}}, "has a causal decoder"),
])  # fmt: skip
def test_bad_input(values, message):
    with pytest.raises(config.InputError, match=message):
        config.parse({"model": values})


def test_a_mask_by_item_and_by_latest_step():
    """q_item, k_item: a key of an item is seen by its own queries alone; k_kind: of each kind the latest."""
    one = jnp.ones((1, 3), jnp.int32)
    sight = attention.Sight(one, one, one, one, q_item=jnp.array([[1, 2, 0]]), k_item=jnp.array([[1, 0, 2]]))
    expected = [[True, True, False], [False, True, True], [False, True, False]]
    np.testing.assert_array_equal(attention.visible(sight)[0], expected)
    keys, kind = jnp.array([[1, 2, 2, 3]]), jnp.array([[1, 1, 2, 1]])
    sight = functools.partial(attention.Sight, one, jnp.array([[1, 2, 3]]), jnp.ones((1, 4), jnp.int32), keys)
    expected = [[True, False, False, False], [False, True, True, False], [False, False, True, True]]
    np.testing.assert_array_equal(attention.visible(sight(k_kind=kind))[0], expected)
