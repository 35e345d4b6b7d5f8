"""Pictures: patches and a linear map are a convolution; an encoder attends within one picture."""

import jax
import numpy as np
import pytest

from gpt4v_jax.data import transforms
from gpt4v_jax.model.image import ImageEmbed, PatchEmbed
from tests import tiny


@pytest.mark.parametrize("patch_norm", [False, True])
def test_patches_and_linear_are_a_convolution(patch_norm):
    size, patch, width = 6, 2, 5
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    image = tiny.make_config(size=size, patch_norm=patch_norm).image
    index = np.zeros((1, 9, 3), np.int32)
    index[0, :, 1:] = [(row, column) for row in range(3) for column in range(3)]
    embed = PatchEmbed(image, width)
    variables = embed.init(jax.random.key(0), transforms.patchify(picture, patch)[None], index)
    params = jax.tree.map(np.asarray, variables["params"])
    kernel = params["embed"]["kernel"].reshape(patch, patch, 3, width)
    bias = np.arange(width)
    params["embed"]["bias"] = bias.astype(np.float32)
    if patch_norm:  # away from their first values, 1 and 0
        scale = np.linspace(0.5, 2, width, dtype=np.float32)
        params["content_norm"] = {"scale": scale, "bias": np.ones(width, np.float32)}
    x = embed.apply({"params": params}, transforms.patchify(picture, patch)[None], index)[0]

    pixels = picture / 127.5 - 1  # -1 to 1
    for row in range(3):
        for column in range(3):
            window = pixels[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            if patch_norm:
                window = (window - window.mean()) / np.sqrt(window.var() + 0.01)
            convolved = (window[..., None] * kernel).sum((0, 1, 2)) + bias
            if patch_norm:
                convolved = (convolved - convolved.mean()) / np.sqrt(convolved.var() + 0.01)
                convolved = convolved * params["content_norm"]["scale"] + 1
            position = params["position"]["table"][row * 3 + column]
            np.testing.assert_allclose(x[row * 3 + column], convolved + position, atol=1e-5)


@pytest.mark.parametrize("encoder", [False, True])
def test_a_picture_is_encoded_alone(encoder):
    """Of a row's two pictures, pixels of one change features of that one: with an encoder all, without the patch's."""
    model, params = tiny.make_model(tiny.make_config(encoder=encoder))
    embed = ImageEmbed(model.config, model.layout)
    batch = tiny.rows(model.layout, ("I U1", "I A1"))
    step = np.cumsum(batch.ar, axis=1)
    features = jax.jit(lambda media: embed.apply({"params": params["image"]}, media, batch.document, step).x[0])
    patch = batch.image.patch.copy()
    patch[0, 5] ^= 255  # the second picture's second patch
    changed = (features(batch.image) != features(batch.image.replace(patch=patch))).any(-1)
    np.testing.assert_array_equal(changed, [False] * 4 + ([True] * 4 if encoder else [False, True, False, False]))


def test_where_a_picture_lies():
    """A picture takes the document and the step of its first placeholder; an unused place has document 0."""
    model, params = tiny.make_model(tiny.make_config())
    batch = tiny.rows(model.layout, ("U1 A1", "U2 I A1"))
    step = np.cumsum(batch.ar, axis=1)
    embed = ImageEmbed(model.config, model.layout)
    segment = embed.apply({"params": params["image"]}, batch.image, batch.document, step)
    first = int(batch.image.at[0, 0])
    asked = batch.tokens[0, first - 2 : first]
    np.testing.assert_array_equal(batch.tokens[0, first - 3 : first + 5], [2, *asked, 4, 4, 4, 4, 3])
    np.testing.assert_array_equal(segment.document, [[2] * 4 + [0] * 4])
    np.testing.assert_array_equal(segment.step, [[step[0, first]] * 4 + [0] * 4])
    np.testing.assert_array_equal(segment.item, [[1] * 4 + [0] * 4])
