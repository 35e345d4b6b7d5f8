"""Analytic FLOPs against published counts, against the mask itself, and against XLA's of small unrolled models."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.interop import hf
from gpt4v_jax.model import attention, flops, presets
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.model.image import ImageTower
from gpt4v_jax.model.towers import Towers
from gpt4v_jax.training import step as step_lib


def layout_of(model: config.Model, **changes) -> batch_lib.Layout:
    return dataclasses.replace(batch_lib.layout(model, config.Data(image=config.Budget(1))), **changes)


def test_gpt2():
    model = config.parse(presets.MODELS["gpt2"], config.Model)
    counts = flops.forward(model, batch_lib.layout(model, config.Data()))
    T, d, L, V = 1024, 768, 12, 50257
    matrices, attention, head = 2 * T * L * 12 * d**2, L * 4 * T**2 * d, 2 * T * d * V
    assert counts == {"backbone": matrices + attention, "head": head}
    assert round(sum(counts.values()) / 1e9, 2) == 291.65


@pytest.mark.parametrize("name, published", [
    ("clip-image-b/32", 8.82),
    ("clip-image-b/16", 35.13),
    ("clip-image-l/14", 162.03),
    ("clip-image-l/14-336", 381.92),
    ("siglip-image-b/16-224", 35.42),
    ("siglip-image-so400m/14-224", 220.35),
    ("siglip-image-so400m/14-384", 670.35),
])  # fmt: skip
def test_published_image_towers(name, published):
    """GFLOPs a picture, to the digits of open_clip's docs/model_profile.csv; bidirectional, so there is one count."""
    full, causal = (flops.parts(presets.named(name), causal=causal) for causal in (False, True))
    assert round(sum(full.values()) / 1e9, 2) == published
    assert causal == full


def test_image_tower_by_part():
    """CLIP's B/32 and SigLIP's B/16, whose pool is one query's attention and an MLP."""
    d, n = 768, 49
    assert flops.parts(presets.named("clip-image-b/32")) == {
        "image/embed": 2 * n * 32 * 32 * 3 * d,
        "encoder/attention": 12 * (2 * (n + 1) * 4 * d**2 + 4 * (n + 1) ** 2 * d),
        "encoder/mlp": 12 * 2 * (n + 1) * 8 * d**2,
        "head": 2 * d * 512,
    }
    n = 196
    pool = 2 * 2 * d**2 + 2 * n * 2 * d**2 + 4 * n * d + 2 * 8 * d**2  # query, out; keys, values; attention; MLP
    assert flops.parts(presets.named("siglip-image-b/16-224"))["pool"] == pool
    features = config.parse(presets.IMAGES["clip-image-b/32"] | {"pool": "none"}, config.Image)
    assert flops.parts(features)["head"] == 50 * 2 * d * 512  # unpooled, the head reads every vector


def test_causal_attention_counts_half():
    model = config.Model(vocab=8, context=100, backbone=config.Backbone(depth=3, width=32, heads=2))
    layout = batch_lib.layout(model, config.Data())
    whole, causal = (flops.forward(model, layout, causal)["backbone"] for causal in (False, True))
    assert whole - causal == 3 * 4 * 32 * (100 * 100 - 100 * 101 // 2)
    assert flops.train_step(model, layout, rows=5) == 15 * sum(flops.forward(model, layout).values())
    assert flops.train_step(model, layout, rows=5, causal=True) == 15 * sum(flops.forward(model, layout, True).values())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("positions, window", [(12, 0), (12, 1), (12, 5), (12, 12), (12, 40), (1, 3)])
def test_pairs_are_those_of_the_mask(positions, window, causal):
    document = jnp.ones((1, positions), jnp.int32)
    step = jnp.cumsum(document, axis=1) if causal else document
    mask = attention.visible(attention.within(document, step, reach=positions), window)
    assert flops.pairs(positions, causal, window) == int(mask.sum())


def test_which_attention_is_halved():
    """Causal count: local blocks by their window, cross attention, the source and a bidirectional stream whole."""
    T, d = 64, 32
    block = config.Backbone(depth=3, width=d, heads=2, pattern=("local", "global"), window=8)
    model = config.Model(vocab=8, context=T, backbone=block)
    full, causal = (flops.parts(model, layout_of(model), count) for count in (False, True))
    saved = 2 * (T * T - flops.pairs(T, True, 8)) + (T * T - T * (T + 1) // 2)
    assert full["backbone/attention"] - causal["backbone/attention"] == saved * 4 * d
    assert full["backbone/mlp"] == causal["backbone/mlp"] == 3 * 2 * T * 8 * d**2

    source = config.Backbone(depth=2, width=d, heads=2)
    pair = config.Model(vocab=8, context=T, source=source, backbone=dataclasses.replace(source, pattern=("cross",)))
    full, causal = (flops.parts(pair, layout_of(pair), count) for count in (False, True))
    changed = {name for name in full if full[name] != causal[name]}
    assert changed == {"backbone/attention"}
    assert full["backbone/cross"] == full["source/attention"] == 2 * (2 * T * 4 * d**2 + 4 * T * T * d)

    both_ways = config.Model(vocab=8, context=T, causal=False, backbone=source)
    assert flops.parts(both_ways, layout_of(both_ways), True) == flops.parts(both_ways, layout_of(both_ways))
    towers = presets.named("clip-b/32")
    full, causal = (flops.parts(towers, causal=count) for count in (False, True))
    assert {name for name in full if full[name] != causal[name]} == {"text/backbone/attention"}


@pytest.mark.parametrize("name", ["gpt2", "llama-3.1-8b", "qwen3-0.6b", "gemma-2b", "bert-base-uncased", "t5-small"])
def test_every_matrix_once_a_position(name):
    """Attention's two products aside, a position costs 2 FLOPs for every entry of every matrix, the head's included."""
    model = presets.named(name)
    T = 2
    layout = layout_of(model, context=T, source=T if model.source else 0)
    kernels = sum(math.prod(x.shape) for path, x in hf.abstract_params(model).items() if path.endswith("kernel"))
    matrices = kernels + model.tied * model.vocab * model.backbone.width
    stacks = [model.backbone, *[model.backbone, model.source] * bool(model.source)]  # cross attention, and the source
    products = sum(c.depth * 4 * T * T * c.heads * c.head_dim for c in stacks)
    assert sum(flops.parts(model, layout).values()) == 2 * T * matrices + products


def test_pictures_in_a_stream():
    """Each is encoded by itself, its class token with it; then the patches alone go through the connector."""
    encoder = config.Backbone(depth=3, width=32, heads=2)
    image = config.Image(size=12, patch=4, class_token=True, encoder=encoder)
    model = config.Model(vocab=8, context=64, backbone=config.Backbone(depth=1, width=48, heads=2), image=image)
    counts = flops.parts(model, batch_lib.layout(model, config.Data(image=config.Budget(5))))
    assert {name: count for name, count in counts.items() if name.startswith("image/")} == {
        "image/embed": 5 * 2 * 9 * 48 * 32,
        "image/encoder/attention": 5 * 3 * (2 * 10 * 4 * 32**2 + 4 * 10**2 * 32),
        "image/encoder/mlp": 5 * 3 * 2 * 10 * 8 * 32**2,
        "image/connector": 5 * 2 * 9 * 32 * 48,
    }
    assert flops.forward(model, batch_lib.layout(model, config.Data(image=config.Budget(5))))["image"] == sum(
        count for name, count in counts.items() if name.startswith("image/")
    )


def test_embeddings_of_pairs():
    """A vector of each medium that a row may hold, and one of its text, through one map each."""
    data = config.Data(image=config.Budget(5))
    model = config.Model(vocab=8, context=64, backbone=config.Backbone(depth=1, width=48, heads=2),
                         image=config.Image(size=12, patch=4), embed=16)  # fmt: skip
    assert flops.parts(model, batch_lib.layout(model, data))["projection"] == (5 + 5) * 2 * 48 * 16


# ---- XLA's own count. Rows are 64 positions, one chunk of queries, so that XLA, too, lets every query meet every key.

BLOCK = config.Backbone(depth=2, width=128, heads=4)
LAYER = dataclasses.replace(BLOCK, norm="layer", bias=config.BIASES)
PICTURE = config.Image(size=64, patch=8)


def model_with(block=BLOCK, **values) -> config.Model:
    return config.Model(**{"vocab": 512, "context": 64, "backbone": block} | values)


def block_with(**values) -> config.Backbone:
    return dataclasses.replace(BLOCK, **values)


XLA = {
    "plain": model_with(image=config.Image(size=32, patch=8)),
    "gated, grouped queries, an encoder": model_with(
        block_with(activation="swiglu", kv_heads=2), image=config.Image(size=32, patch=8, encoder=BLOCK)
    ),
    "geglu, wide heads, norms around": model_with(
        block_with(activation="geglu", head_dim=64, hidden=192, norm_place="sandwich", qk_norm=True), tied=False
    ),
    "windows": model_with(block_with(pattern=("local", "global"), window=16, depth=3)),
    "an encoder and a decoder": model_with(
        block_with(pattern=("cross",), buckets=8), source=block_with(depth=1, buckets=8), position="none"
    ),
    "bidirectional, with a head": model_with(
        dataclasses.replace(LAYER, norm_place="post"), causal=False, head_hidden="gelu", head_bias=True, token_types=2
    ),
    "class token in a stream": model_with(
        image=dataclasses.replace(PICTURE, class_token=True, encoder=dataclasses.replace(LAYER, width=64, hidden=256))
    ),
    "gated cross attention": model_with(
        block_with(depth=3), image=config.Image(size=32, patch=8), fusion=config.Fusion("cross_attention")
    ),
    "resampler, projected": model_with(
        image=config.Image(size=64, patch=8, encoder=BLOCK),
        fusion=config.Fusion("resampler", tokens=16, depth=2, connector="mlp2x_gelu"),
    ),
    "q_former into a memory": model_with(
        image=config.Image(size=64, patch=8), fusion=config.Fusion("q_former", tokens=32, into="memory"),
    ),
    "pooled": model_with(image=config.Image(size=32, patch=8), fusion=config.Fusion("pooled", every=1, tokens=64)),
    "encoder and decoder over media": dataclasses.replace(
        model_with(image=config.Image(size=32, patch=8), fusion=config.Fusion("encoder_decoder")), source_context=48
    ),
    "experts": model_with(image=config.Image(size=32, patch=8), fusion=config.Fusion("experts")),
    "shuffled and injected, an earlier layer": model_with(
        image=config.Image(size=64, patch=8, layer=-2, encoder=block_with(depth=4)),
        fusion=config.Fusion(connector="pixel_shuffle", inject=1),
    ),
    "class token": dataclasses.replace(PICTURE, class_token=True, pool="class", classes=100, encoder=LAYER),
    "MAP pool": dataclasses.replace(PICTURE, pool="map", encoder=LAYER),
    "unpooled, gated": dataclasses.replace(
        PICTURE, classes=300, class_token=True, encoder=block_with(activation="swiglu", bias=config.BIASES)
    ),
    "towers": config.Towers(
        dataclasses.replace(PICTURE, class_token=True, pre_norm=True, pool="class", classes=96, encoder=LAYER),
        model_with(dataclasses.replace(LAYER, width=96, head_dim=24, hidden=384)), width=96,
    ),
}  # fmt: skip


def counted_by_xla(ours, layout: batch_lib.Layout | None, rows: int) -> float:
    """XLA's FLOPs of a whole forward pass, logits included."""
    if isinstance(ours, config.Model):
        module, batch = GPT4V(ours, layout), batch_lib.empty(layout, rows)
        forward = jax.jit(lambda p, b: step_lib.forward(module, p, b))
        return forward.lower(step_lib.abstract_params(module), batch).compile().cost_analysis()["flops"]
    image = ours.image if isinstance(ours, config.Towers) else ours
    M, p = image.grid**2, image.patch**2 * 3
    inputs = (np.zeros((rows, M, p), np.uint8), np.zeros((rows, M, 3), np.int32))
    if isinstance(ours, config.Towers):
        inputs = (*inputs, batch_lib.empty(layout_of(ours.text), rows))
    module = Towers(ours) if isinstance(ours, config.Towers) else ImageTower(ours)
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.jit(module.apply).lower(variables, *inputs).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("ours", XLA.values(), ids=XLA)
def test_equals_xla(ours):
    """The whole model, unrolled: XLA counts norms, softmax and activations, too."""
    layout = layout_of(ours) if isinstance(ours, config.Model) else None
    counted = counted_by_xla(ours, layout, rows=2)
    np.testing.assert_allclose(2 * sum(flops.parts(ours, layout).values()), counted, rtol=0.05)


def test_equals_xla_with_a_shorter_source():
    model = XLA["an encoder and a decoder"]
    layout = layout_of(model, source=24)
    counted = sum(flops.parts(model, layout).values())
    assert counted < sum(flops.parts(model, layout_of(model)).values())
    np.testing.assert_allclose(2 * counted, counted_by_xla(model, layout, rows=2), rtol=0.05)


# ---- parameters


def test_parameters_by_module():
    model = config.Model(vocab=8, context=4, tied=False, backbone=config.Backbone(depth=1, width=16, heads=2))
    counts = flops.parameters(step_lib.abstract_params(GPT4V(model, batch_lib.layout(model, config.Data()))))
    assert counts == {"text": 8 * 16, "head": 8 * 16, "backbone": 12 * 16**2 + 3 * 16}


@pytest.mark.parametrize("path, module, part", [
    ("text/embed/table", "text", "text/embed"),
    ("backbone/block_10/attention/query/kernel", "backbone", "backbone/attention"),
    ("backbone/block_0/attention/key_norm/scale", "backbone", "backbone/attention"),
    ("backbone/block_0/cross/out/bias", "backbone", "backbone/cross"),
    ("backbone/block_3/cross_norm/scale", "backbone", "backbone/norms"),
    ("backbone/norm/bias", "backbone", "backbone/norms"),
    ("encoder/block_1/mlp_scale/value", "encoder", "encoder/scales"),
    ("embed_norm/scale", "embed_norm", "norms"),
    ("image/image/embed/kernel", "image", "image/embed"),
    ("text/text/position/table", "text", "text/position"),
    ("image/pool/mlp/up/kernel", "image", "image/pool"),
    ("fusion/image_resampler/block_0/cross/key/kernel", "fusion", "fusion/image_resampler/cross"),
    ("backbone/block_1/image_mlp/up/kernel", "backbone", "backbone/mlp"),
    ("backbone/block_1/attention/image_query/kernel", "backbone", "backbone/attention"),
    ("backbone/block_1/cross_mlp/up/kernel", "backbone", "backbone/mlp"),
    ("backbone/block_1/cross_mlp_gate/value", "backbone", "backbone/cross"),
    ("image/deep_0_connector/bias", "image", "image/connector"),
    ("backbone/relative/table", "backbone", "backbone/relative"),
    ("head_bias/value", "head_bias", "head_bias"),
])  # fmt: skip
def test_parts(path, module, part):
    assert (flops.module(path), flops.part(path)) == (module, part)


@pytest.mark.parametrize("ours", XLA.values(), ids=XLA)
def test_what_works_has_parameters(ours):
    """FLOPs stand under names that parameters have; a tied head has none of its own."""
    layout = layout_of(ours) if isinstance(ours, config.Model) else None
    parameters = flops.parameters(hf.abstract_params(ours), flops.part)
    working = {name for name, count in flops.parts(ours, layout).items() if count}
    assert working - parameters.keys() == ({"head"} if isinstance(ours, config.Model) and ours.tied else set())
    kernels = {flops.part(path) for path in hf.abstract_params(ours) if path.endswith("kernel")}
    assert kernels <= working
