"""The whole model: who sees whom (by gradients), packing, every variant's first loss, pictures, the cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model import attention, fusion
from gpt4v_jax.training import objectives
from gpt4v_jax.training import step as step_lib
from tests import tiny

T = 24
ROWS = {
    "text": ("U4 A6 U2 A5",),
    "picture in mid-stream": ("U2 A2 U1 I A4",),
    "pictures side by side": ("U1 I I A4",),
    "picture first and last": ("I U2 A3 I",),
    "packed": ("I U2 A3", "U1 I A2"),
    "packed text": ("U2 A3", "U1 A2", "U1 A1"),
}


def allowed(batch: batch_lib.Batch, row: int = 0) -> np.ndarray:
    """[T,T]: does the mask law let position t see position u? From the row's documents and blocks, by hand."""
    document, block = batch.document[row], np.cumsum(batch.ar[row])
    law = np.zeros((T, T), bool)
    for t in range(T):
        for u in range(T):
            law[t, u] = document[t] != 0 and document[t] == document[u] and block[u] <= block[t]
    return law


@functools.cache
def influence_of(kind: str, position: str, where: str = "stream"):
    """-> (model, f), f(batch) [T,S,D] = d (random projection of logit_t) / d (vector s of the fused stream, of the text
    before the fusion, or of the source)."""
    model, params = tiny.make_model(tiny.make_config(**tiny.FUSIONS[kind], context=T, position=position))
    direction = jax.random.normal(jax.random.key(1), (tiny.VOCAB,))

    def influence(batch):
        def projected(added):
            with pytest.MonkeyPatch.context() as patch:
                name = model.config.fusion.kind
                real = fusion.KINDS[name]

                class Moved(real):
                    def __call__(self, segments, *args):
                        if where == "text":
                            text = segments[0]
                            return super().__call__([text.replace(x=text.x + added), *segments[1:]], *args)
                        fused = super().__call__(segments, *args)
                        return fused.replace(**{where: getattr(fused, where) + added})

                patch.setitem(fusion.KINDS, name, Moved)
                return step_lib.forward(model, params, batch)[0] @ direction

        length = batch.source.tokens.shape[1] if where == "source" else T
        return jax.jacrev(projected)(jnp.zeros((length, model.config.backbone.width)))

    return model, jax.jit(influence)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", tiny.fusions(
    "concat", "prefix_lm", "cross_attention", "encoder_decoder", "experts"
))  # fmt: skip
def test_causality_by_gradient(kind, name, shown):
    model, influence = influence_of(kind, "learned" if kind == "prefix_lm" else "rope")
    batch = tiny.rows(model.layout, ROWS[name])
    moved = np.asarray(influence(batch))
    assert np.isfinite(moved).all()
    moved, law = (moved != 0).any(-1), allowed(batch)
    # What is added at u stays in u's residual stream, though padding sees nobody, not even itself.
    expected = law | np.eye(T, dtype=bool)
    np.testing.assert_array_equal(moved, expected)
    ahead, prefix = np.triu(law, 1).any(), model.layout.prefix
    wide = prefix == "media" and model.layout.count("image") > 1
    assert ahead == (wide and ("picture" in name or name == "packed") or prefix == "media+prompt"), "as it should"
    shown(f"{kind}, {name}: (query, key) pairs by gradient that are forbidden; that are missing",
          f"{(moved & ~expected).sum()}; {(expected & ~moved).sum()}", "0; 0")  # fmt: skip


@pytest.mark.parametrize("name", ["picture in mid-stream", "packed"])
@pytest.mark.parametrize("kind", ["q_former", pytest.param("q_former, memory", marks=pytest.mark.soak)])
def test_causality_of_text_that_queries_read(kind, name):
    """A text's token moves what may see it, whether by the stream or by the pictures whose queries read it."""
    model, influence = influence_of(kind, "rope", "text")
    batch = tiny.rows(model.layout, ROWS[name])
    moved = (np.asarray(influence(batch)) != 0).any(-1)
    text = batch.slot[0] < 0
    np.testing.assert_array_equal(moved[:, text], (allowed(batch) | np.eye(T, dtype=bool))[:, text])
    assert not moved[:, ~text].any(), "in its place stands a picture's vector"


@pytest.mark.parametrize("name", ["picture in mid-stream", "packed"])
def test_causality_of_the_source(name):
    """What the encoder reads moves its own document, from the answer on that follows it."""
    model, influence = influence_of("encoder_decoder", "rope", "source")
    batch = tiny.rows(model.layout, ROWS[name])
    moved = (np.asarray(influence(batch)) != 0).any(-1)
    source, step = batch.source, np.cumsum(batch.ar[0])
    law = batch.document[0][:, None] == source.document[0]
    law &= (source.document[0] > 0) & (step[source.at[0]] <= step[:, None])
    np.testing.assert_array_equal(moved, law)


def test_prefix_lm_sees_picture_and_prompt_whole():
    """The law that the gradients obey is the right one: all before the first trained token is one block."""
    model, _ = influence_of("prefix_lm", "learned")
    law = allowed(tiny.rows(model.layout, ("I U2 A3 U1 A1",)))
    expected = np.tril(np.ones((T, T), bool))
    expected[:8, :8] = True  # <user>, 4 patches, two tokens, <assistant>
    expected[17:] = expected[:, 17:] = False
    np.testing.assert_array_equal(law, expected)


@pytest.mark.parametrize("kind", [*tiny.fusions(), "an encoder"])
def test_a_picture_moves_what_may_see_it(kind):
    """Another second picture, or a black one, changes logits just where the mask law allows."""
    model, params = tiny.make_model(tiny.make_config(**tiny.FUSIONS.get(kind, {"encoder": True}), context=T))
    forward = jax.jit(lambda batch: step_lib.forward(model, params, batch)[0])
    batch = tiny.rows(model.layout, ("U1 I A2", "U1 A1 I A1"))
    before = np.asarray(forward(batch))
    first = batch.image.at[0, 1]
    stands = "<assistant>" if model.layout.source else "<image>"  # what follows it, where it is in the source
    assert batch.tokens[0, first] == tiny.SPECIAL[stands] and batch.document[0, first] == 2
    for pixels in (0, 255 - batch.image.patch[0, 4:]):
        patch = batch.image.patch.copy()
        patch[0, 4:] = pixels
        changed = (np.asarray(forward(batch.replace(image=batch.image.replace(patch=patch)))) != before).any(-1)
        np.testing.assert_array_equal(changed, allowed(batch)[:, first])
        assert changed.any() and not changed[:first].any()


@pytest.mark.parametrize("kind", tiny.fusions())
def test_packed_rows_equal_separate_rows(kind, shown):
    position = "learned" if kind in ("concat", "prefix_lm") else "rope"
    model, params = tiny.make_model(tiny.make_config(**tiny.FUSIONS[kind], context=T, position=position))
    texts = ("I U2 A3", "U1 I A2")
    logits = jax.jit(lambda batch: step_lib.forward(model, params, batch))
    packed = logits(tiny.rows(model.layout, texts))[0]
    separate = logits(tiny.rows(model.layout, *[(text,) for text in texts]))
    lengths = [len(tiny.document(text, model.layout)) for text in texts]
    np.testing.assert_allclose(packed[: lengths[0]], separate[0, : lengths[0]], atol=1e-5)
    np.testing.assert_allclose(packed[lengths[0] : sum(lengths)], separate[1, : lengths[1]], atol=1e-5)
    off = np.abs(packed[: lengths[0]] - separate[0, : lengths[0]]).max()
    shown(f"{kind}: packed against alone, |logit difference|", f"{off:.1e}", "1e-05")


# Every pair of values of two settings occurs in some row.
VARIANTS = [
    # norm, activation, bias, kv_heads, qk_norm, tied, position, kind, encoder, embed_norm, patch_norm
    ("rms", "gelu_tanh", True, 2, False, True, "learned", "concat", True, True, False),
    ("layer", "gelu", False, 1, True, False, "rope", "prefix_lm", False, False, True),
    ("layer", "swiglu", True, 1, False, False, "rope", "prefix_lm", True, True, False),
    ("rms", "swiglu", False, 2, True, True, "learned", "concat", False, False, True),
    ("rms", "gelu_tanh", False, 1, True, False, "learned", "prefix_lm", True, False, False),
    ("layer", "gelu_tanh", True, 2, False, False, "rope", "concat", False, False, True),
    ("rms", "gelu", True, 1, True, True, "rope", "concat", True, True, True),
    ("layer", "gelu", False, 2, False, True, "learned", "prefix_lm", False, True, False),
]


@pytest.mark.parametrize(
    "norm, activation, bias, kv_heads, qk_norm, tied, position, kind, encoder, embed_norm, patch_norm", VARIANTS
)
def test_variants_start_at_ln_v_and_train_every_parameter(
    norm, activation, bias, kv_heads, qk_norm, tied, position, kind, encoder, embed_norm, patch_norm
):
    model, params = tiny.make_model(tiny.make_config(
        kind, encoder=encoder, init_std=0.02, tied=tied, position=position, norm=norm, activation=activation,
        bias=config.BIASES if bias else (), kv_heads=kv_heads, qk_norm=qk_norm, embed_norm=embed_norm,
        patch_norm=patch_norm, depth=1,
    ))  # fmt: skip
    batch = tiny.rows(model.layout, ("I U2 A3", "U1 I A2"), ("U3 A8 U2 A4",))

    def loss(params):
        total, weight = objectives.tokens(step_lib.token_scores(model, params, batch), batch)["loss"]
        return total / weight

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(float(value) / np.log(tiny.VOCAB) - 1) < 0.05
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(grad).all(), path
        # A bias of all keys shifts all scores of a query alike, which softmax does not see: no gradient but with rope.
        assert np.abs(grad).max() > 0 or path.endswith("key/bias"), path


def test_pairs_of_settings_are_covered():
    for i in range(11):
        for j in range(i):
            seen = {(row[i], row[j]) for row in VARIANTS}
            assert len(seen) == len({row[i] for row in VARIANTS}) * len({row[j] for row in VARIANTS}), (i, j)


@pytest.mark.parametrize("kind", ["concat", "prefix_lm"])
def test_cached_decoding_equals_the_whole(kind):
    """A prefill that ends where a block ends, a second chunk with a picture, then tokens one by one."""
    model, params = tiny.make_model(tiny.make_config(kind, context=T, kv_heads=1))
    whole = tiny.rows(model.layout, ("I U2 A3 U1 I A4",), ("U3 A2 U1 A1 U1 A1",))
    hidden = jax.jit(lambda batch: model.apply({"params": params}, batch)[0])(whole)
    one = model.clone(layout=dataclasses.replace(model.layout, items=(1, 0, 0), patches=(4, 0, 0)))  # picture a chunk
    append = jax.jit(lambda batch, cache: one.apply({"params": params}, batch, cache)[:2])
    cache = attention.empty_cache(model.config.backbone, 2, T)
    stream = ("tokens", "slot", "position", "document", "ar", "target", "weight")
    for start, stop in [(0, 14), (14, 18), *((t, t + 1) for t in range(18, T))]:
        part = whole.replace(**{name: getattr(whole, name)[:, start:stop] for name in stream}, image=None)
        if start in (0, 14):  # these chunks have row 0's first and second picture, alone
            items = slice(0, 1) if start == 0 else slice(1, 2)
            patches = slice(4 * items.start, 4 * items.stop)
            image = batch_lib.Media(
                patch=whole.image.patch[:, patches], index=whole.image.index[:, patches],
                item=np.minimum(whole.image.item[:, patches], 1),
                at=np.where(whole.image.at[:, items] >= 0, whole.image.at[:, items] - start, -1),
                size=whole.image.size[:, items],
            )  # fmt: skip
            part = part.replace(slot=np.where(part.slot >= 0, part.slot - patches.start, -1), image=image)
        new, cache = append(part, cache)
        real = (part.document > 0)[..., None]
        np.testing.assert_allclose(new * real, hidden[:, start:stop] * real, atol=1e-5)
    np.testing.assert_array_equal(cache.next_position[:, 0], (whole.document > 0).sum(1))


def test_captured_queries_and_keys_give_the_attention():
    model, params = tiny.make_model(tiny.make_config(context=T))
    batch = tiny.rows(model.layout, ("I U2 A3",))
    _, _, out = jax.jit(lambda b: model.apply({"params": params}, b, capture=True))(batch)
    assert set(out) == {f"block_{i}/{name}" for i in range(2) for name in ("query", "key")}
    q, k = out["block_1/query"], out["block_1/key"]
    law = jnp.array(allowed(batch))[None]
    w = np.asarray(attention.weights(q[:, :, :, None], k, law)[0, :, 0])
    np.testing.assert_array_equal(w > 0, np.broadcast_to(law, w.shape))
    np.testing.assert_allclose(w.sum(-1), np.broadcast_to(law[0].any(-1), w.shape[:2]), atol=1e-5)


def test_dropout_draws_from_the_key_alone():
    model, params = tiny.make_model(tiny.make_config(dropout=0.5))
    batch = tiny.rows(model.layout, ("I U2 A3",))
    forward = jax.jit(lambda keys: step_lib.forward(model, params, batch, keys))
    one, again, other = (forward(step_lib.row_keys(seed, 0, len(batch.tokens))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other) and not np.allclose(one, step_lib.forward(model, params, batch))


@pytest.mark.parametrize("name, text", [("image", "I U2 A3"), ("video", "V U2 A3"), ("audio", "S U2 A3"),
                                        ("source", "U2 A3")])  # fmt: skip
def test_dropout_of_an_encoder_alone(name, text):
    """Of a medium's encoder and of the source's, where the backbone has none."""
    block = config.Backbone(depth=1, width=16, heads=2, hidden=32, dropout=0.5)
    if name == "source":
        made = dataclasses.replace(tiny.make_config(kind="encoder_decoder"), source=block)
    else:
        made = tiny.make_config(media=True, **{name: {"encoder": block}})
    assert made.drops and not made.backbone.dropout and not tiny.make_config().drops
    model, params = tiny.make_model(made)
    batch = tiny.rows(model.layout, (text,))
    forward = jax.jit(lambda keys: step_lib.forward(model, params, batch, keys))
    one, again, other = (forward(step_lib.row_keys(seed, 0, len(batch.tokens))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other) and not np.allclose(one, step_lib.forward(model, params, batch))
