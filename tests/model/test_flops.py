"""Analytic FLOPs against a published kind of count, and against XLA's of a small unrolled model."""

import jax
import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model import flops, presets
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training import step as step_lib


def test_gpt2():
    model = config.parse(presets.MODELS["gpt2"], config.Model)
    counts = flops.forward(model, batch_lib.layout(model, config.Data()))
    T, d, L, V = 1024, 768, 12, 50257
    matrices, attention, head = 2 * T * L * 12 * d**2, L * 4 * T**2 * d, 2 * T * d * V
    assert counts == {"backbone": matrices + attention, "head": head}
    assert round(sum(counts.values()) / 1e9, 2) == 291.65


def test_causal_attention_counts_half():
    model = config.Model(vocab=8, context=100, backbone=config.Backbone(depth=3, width=32, heads=2))
    layout = batch_lib.layout(model, config.Data())
    whole, causal = (flops.forward(model, layout, causal)["backbone"] for causal in (False, True))
    assert whole - causal == 3 * 4 * 32 * (100 * 100 - 100 * 101 // 2)
    assert flops.train_step(model, layout, rows=5) == 15 * sum(flops.forward(model, layout).values())


@pytest.mark.parametrize("activation, kv_heads, encoder", [("gelu_tanh", 4, False), ("swiglu", 2, True)])
def test_equals_xla(activation, kv_heads, encoder):
    block = config.Backbone(depth=2, width=128, heads=4, kv_heads=kv_heads, activation=activation)
    image = config.Image(size=32, patch=8, encoder=block if encoder else None)
    model = config.Model(vocab=512, context=64, backbone=block, image=image)  # 64: one chunk, so no half is skipped
    layout = batch_lib.layout(model, config.Data(media=1))
    module, batch = GPT4V(model, layout), batch_lib.empty(layout, 2)
    compiled = jax.jit(lambda p, b: step_lib.forward(module, p, b)).lower(step_lib.abstract_params(module), batch)
    counted = compiled.compile().cost_analysis()["flops"]
    np.testing.assert_allclose(2 * sum(flops.forward(model, layout).values()), counted, rtol=0.05)


def test_parameters_by_module():
    model = config.Model(vocab=8, context=4, tied=False, backbone=config.Backbone(depth=1, width=16, heads=2))
    counts = flops.parameters(step_lib.abstract_params(GPT4V(model, batch_lib.layout(model, config.Data()))))
    assert counts == {"text": 8 * 16, "head": 8 * 16, "backbone": 12 * 16**2 + 3 * 16}
