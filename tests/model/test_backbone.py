"""Where a block's norms, scales and biases stand, by hand; and an encoder that the stream reads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.generate import decode
from gpt4v_jax.model import attention, layers
from gpt4v_jax.model.backbone import Attention, Backbone
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training import step as step_lib

C = config.Backbone(depth=1, width=8, heads=2, hidden=12)


def normal(seed, *shape):
    return jnp.array(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def drawn(params, seed=0):
    """Parameters drawn anew, so that scales and biases are not their initial 0 and 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape) * 0.5, jnp.float32), params)


# ---- one block, by hand


@pytest.mark.parametrize("place", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_where_the_norms_stand(place, layer_scale, norm):
    c = dataclasses.replace(C, norm_place=place, layer_scale=layer_scale, norm=norm, bias=config.BIASES)
    x, sight = normal(1, 1, 5, 8), attention.within(jnp.ones((1, 5), jnp.int32), jnp.arange(5)[None], reach=0)
    backbone = Backbone(c, rotary=True)
    at = jnp.arange(5)[None, :, None]
    params = drawn(jax.eval_shape(backbone.init, jax.random.key(0), x, at, sight)["params"])
    p = params["block_0"]

    def normed(name, value, of=p):
        return layers.Norm(c.norm, c.norm_eps).apply({"params": of[name]}, value)

    def scaled(name, value):
        return value * p[name]["value"] if layer_scale else value

    def attend(value):
        module = Attention(c, 1.0, rope=(c.rope_theta, c.rope_scaling))
        return module.apply({"params": p["attention"]}, value, at, sight)[0]

    def mlp(value):
        return layers.MLP(c.hidden, c.activation, True).apply({"params": p["mlp"]}, value)

    if place == "pre":
        y = x + scaled("attention_scale", attend(normed("attention_norm", x)))
        y = y + scaled("mlp_scale", mlp(normed("mlp_norm", y)))
    elif place == "post":
        y = normed("attention_norm", x + scaled("attention_scale", attend(x)))
        y = normed("mlp_norm", y + scaled("mlp_scale", mlp(y)))
    else:
        y = x + scaled("attention_scale", normed("attention_post_norm", attend(normed("attention_norm", x))))
        y = y + scaled("mlp_scale", normed("mlp_post_norm", mlp(normed("mlp_norm", y))))
    assert ("norm" in params) == (place != "post"), "the last norm of a post-norm stack is its last block's"
    y = y if place == "post" else normed("norm", y, params)
    np.testing.assert_allclose(backbone.apply({"params": params}, x, at, sight)[0], y, atol=1e-5)


@pytest.mark.parametrize("part, names", [
    ("qkv", {"attention/query", "attention/key", "attention/value"}), ("out", {"attention/out"}),
    ("mlp", {"mlp/up", "mlp/gate", "mlp/down"}),
])  # fmt: skip
def test_which_matrices_have_biases(part, names):
    c = dataclasses.replace(C, bias=(part,), activation="geglu")
    x, sight = normal(1, 1, 5, 8), attention.bidirectional(jnp.ones((1, 5), jnp.int32))
    block = jax.eval_shape(Backbone(c).init, jax.random.key(0), x, None, sight)["params"]["block_0"]
    found = {f"{a}/{b}" for a, inner in block.items() for b, p in inner.items() if isinstance(p, dict) and "bias" in p}
    assert found == names


def hidden_of(c, x, params=None):
    sight = attention.within(jnp.ones(x.shape[:2], jnp.int32), jnp.arange(x.shape[1])[None], reach=0)
    backbone, at = Backbone(c, rotary=True), jnp.arange(x.shape[1])[None, :, None]
    if params is None:
        params = drawn(jax.eval_shape(backbone.init, jax.random.key(0), x, at, sight)["params"])
    return np.asarray(jax.jit(backbone.apply)({"params": params}, x, at, sight)[0]), params


def test_a_local_block_has_its_own_theta_without_scaling():
    """pattern says which block is local: by window and by theta it is the block of a model of that kind alone."""
    x, scaling = normal(1, 1, 9, 8), config.RopeScaling("linear", 4.0)
    c = dataclasses.replace(C, depth=1, pattern=("local",), window=3, local_theta=50.0, rope_theta=9000.0,
                            rope_scaling=scaling)  # fmt: skip
    local, params = hidden_of(c, x)
    same = dataclasses.replace(c, local_theta=0.0, rope_theta=50.0, rope_scaling=config.RopeScaling())
    np.testing.assert_array_equal(local, hidden_of(same, x, params)[0])
    globally, _ = hidden_of(dataclasses.replace(c, pattern=("global",)), x, params)
    same = dataclasses.replace(c, pattern=("global",), window=0, local_theta=0.0)
    np.testing.assert_array_equal(globally, hidden_of(same, x, params)[0])
    assert np.abs(local[0, :2] - globally[0, :2]).max() > 1e-3, "theta differs"
    inherits = dataclasses.replace(c, local_theta=0.0)
    wide = dataclasses.replace(inherits, window=9)
    np.testing.assert_array_equal(hidden_of(wide, x, params)[0], globally)
    moved = x.at[0, 0].add(1.0)
    changed = np.abs(hidden_of(inherits, moved, params)[0] - hidden_of(inherits, x, params)[0]).max((0, 2))
    assert (changed[:3] > 1e-3).all() and (changed[3:] == 0).all(), "one local block sees 3 positions"


# ---- an encoder that the stream reads

VOCAB, SOURCE, T = 20, 7, 6
STACK = config.Backbone(depth=2, width=8, heads=2, hidden=12)
KINDS = {
    "learned": {"position": "learned"},
    "relative": {"position": "none", "stack": {"buckets": 8, "bucket_distance": 10}},
    "rope": {"position": "rope"},
}


@functools.cache
def reader(kind):
    """-> (a model with an encoder, its parameters)."""
    position, stack = KINDS[kind]["position"], dataclasses.replace(STACK, **KINDS[kind].get("stack", {}))
    c = config.Model(vocab=VOCAB, context=12, position=position, init_std=1.0, source=stack,
                     backbone=dataclasses.replace(stack, pattern=("cross",)))  # fmt: skip
    module = GPT4V(c, batch_lib.layout(c, config.Data()))
    return module, drawn(step_lib.abstract_params(module))


def batch_of(tokens, document, source, source_document):
    tokens, document, source, source_document = map(np.int32, (tokens, document, source, source_document))

    def positions(document):
        """Restarting with every document."""
        i = np.arange(document.shape[1])
        first = np.array([[np.argmax(row == d) for d in row] for row in document])
        return (i - first)[..., None].astype(np.int32)

    zeros = np.zeros_like(tokens)
    first = np.array([[np.argmax(row == d) for d in of] for row, of in zip(document, source_document, strict=True)])
    return batch_lib.Batch(
        tokens=tokens, slot=zeros - 1, position=positions(document), document=document,
        ar=np.ones(tokens.shape, bool), target=zeros, weight=zeros.astype(np.float32),
        source=batch_lib.Source(source, positions(source_document), source_document, first, first * 0 - 1),
    )  # fmt: skip


forward = jax.jit(step_lib.forward, static_argnums=0)
step = jax.jit(decode.step, static_argnums=0)


def logits_of(module, params, batch):
    return np.asarray(forward(module, params, batch))


def tokens(seed, *shape):
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_a_source_and_other_rows_sources_have_no_influence(kind):
    module, params = reader(kind)
    stream, source = tokens(0, 2, T), tokens(1, 2, SOURCE)
    real = np.arange(SOURCE) < [[4], [7]]
    before = logits_of(module, params, batch_of(stream, np.ones((2, T)), source, real))
    other = np.where(real, source, 19 - source)  # padding has other tokens
    other[1] = tokens(2, SOURCE)  # and the second row another source
    after = logits_of(module, params, batch_of(stream, np.ones((2, T)), other, real))
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 0.1
    alone = logits_of(module, params, batch_of(stream[:1], np.ones((1, T)), source[:1, :4], np.ones((1, 4))))
    np.testing.assert_allclose(before[:1], alone, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_sees_all_of_its_source(kind):
    """The last token of the source reaches the first position of the stream."""
    module, params = reader(kind)
    stream, source = tokens(0, 1, T), tokens(1, 1, SOURCE)
    other = source.copy()
    other[0, -1] = (other[0, -1] + 1) % VOCAB
    ones = np.ones((1, T)), np.ones((1, SOURCE))
    before, after = (logits_of(module, params, batch_of(stream, ones[0], s, ones[1])) for s in (source, other))
    assert (np.abs(before - after).max((0, 2)) > 1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_row_read_their_own_source(kind):
    """Two documents in a row are each what they are alone, in the stream and in the source."""
    module, params = reader(kind)
    stream, source = tokens(0, 1, T), tokens(1, 1, SOURCE)
    packed = batch_of(stream, [[1, 1, 2, 2, 2, 0]], source, [[1, 1, 1, 2, 2, 2, 0]])
    together = logits_of(module, params, packed)
    for at, source_at in ((slice(0, 2), slice(0, 3)), (slice(2, 5), slice(3, 6))):
        part, part_source = stream[:, at], source[:, source_at]
        alone = batch_of(part, np.ones_like(part), part_source, np.ones_like(part_source))
        np.testing.assert_allclose(together[:, at], logits_of(module, params, alone), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached_with_a_padded_source(kind):
    """Prompts of one token and of two; the source is read once, at prefill."""
    module, params = reader(kind)
    stream, source = tokens(0, 2, T), tokens(1, 2, SOURCE)
    real = (np.arange(SOURCE) < [[4], [7]]).astype(np.int32)
    whole = logits_of(module, params, batch_of(stream, np.ones((2, T)), source, real))
    prompts = batch_of(stream[:, :2], [[1, 0], [1, 1]], source, real)
    logits, cache = decode.prefill(module, params, prompts, 8)
    for n in range(5):
        at = np.array([n, n + 1])
        np.testing.assert_allclose(logits, whole[[0, 1], at], atol=1e-5)
        if n < 4:
            logits, cache = step(module, params, jnp.array(stream[[0, 1], at + 1]), cache)


def test_a_reader_without_a_source_is_an_error():
    module, params = reader("rope")
    batch = dataclasses.replace(batch_of(tokens(0, 1, T), np.ones((1, T)), [[1]], [[1]]), source=None)
    with pytest.raises(ValueError, match="batch.source is None"):
        logits_of(module, params, batch)
