"""Published sizes: the parameters of a preset, counted by eval_shape, equal a closed form."""

import math

import jax
import jax.numpy as jnp
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model import flops, presets
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.model.image import ImageTower
from gpt4v_jax.training import step as step_lib


def count_model(name: str) -> int:
    model = config.parse(presets.MODELS[name], config.Model)
    # The stream's length changes no parameter (learned positions go by model.context): a short one is quick.
    layout = batch_lib.Layout(model.vocab, context=2, size=0, patch=16, items=0, prefix="none")
    return sum(flops.parameters(step_lib.abstract_params(GPT4V(model, layout))).values())


@pytest.mark.parametrize("name, depth, width, published", [
    ("gpt2", 12, 768, 124_439_808),
    ("gpt2-medium", 24, 1024, 354_823_168),
    ("gpt2-large", 36, 1280, 774_030_080),
    ("gpt2-xl", 48, 1600, 1_557_611_200),
])  # fmt: skip
def test_gpt2(name, depth, width, published):
    V, T, L, d = 50257, 1024, depth, width
    attention = 4 * d * d + 4 * d  # query, key, value, out, with biases
    mlp = 2 * d * 4 * d + 4 * d + d  # up and down, with biases
    norms = 2 * 2 * d  # two in a block, scale and bias
    assert attention + mlp + norms == 12 * d**2 + 13 * d
    closed = V * d + T * d + L * (12 * d**2 + 13 * d) + 2 * d  # the head is the embedding
    assert count_model(name) == closed == published


@pytest.mark.parametrize("name, depth, width, hidden, key_width, vocab, published", [
    ("llama-2-7b", 32, 4096, 11008, 4096, 32000, 6_738_415_616),
    ("llama-2-13b", 40, 5120, 13824, 5120, 32000, 13_015_864_320),
    ("llama-3.1-8b", 32, 4096, 14336, 1024, 128256, 8_030_261_248),
])  # fmt: skip
def test_llama(name, depth, width, hidden, key_width, vocab, published):
    V, L, d, F, k = vocab, depth, width, hidden, key_width
    block = 2 * d * d + 2 * d * k + 3 * d * F + 2 * d  # query and out, key and value, swiglu, two norms
    assert count_model(name) == V * d + L * block + d + d * V == published


@pytest.mark.parametrize("name, depth, width, patch, published", [
    ("vit-ti/16", 12, 192, 16, 5_717_416),
    ("vit-s/16", 12, 384, 16, 22_050_664),
    ("vit-b/16", 12, 768, 16, 86_567_656),
    ("vit-b/32", 12, 768, 32, 88_224_232),
    ("vit-l/16", 24, 1024, 16, 304_326_632),
    ("vit-h/14", 32, 1280, 14, 632_045_800),
])  # fmt: skip
def test_vit(name, depth, width, patch, published):
    L, d, p, n = depth, width, patch, (224 // patch) ** 2
    # patches with bias; positions of the n patches, the class token and its position; blocks; last norm; the head
    closed = d * (3 * p * p + 1) + d * (n + 2) + L * (12 * d**2 + 13 * d) + 2 * d + 1000 * (d + 1)
    vit = ImageTower(config.parse(presets.IMAGES[name], config.Image))
    patches, index = jnp.zeros((1, n, 3 * p * p), jnp.uint8), jnp.zeros((1, n, 3), jnp.int32)
    shapes = jax.eval_shape(vit.init, jax.random.key(0), patches, index)["params"]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == closed == published


def test_a_config_takes_a_preset():
    values = config.default()
    values.model.update(presets.MODELS["llama-3.1-8b"])
    assert config.from_flag(values).model == config.parse(presets.MODELS["llama-3.1-8b"], config.Model)
