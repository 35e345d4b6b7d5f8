"""Every family against the Hugging Face implementation, on models of random weights."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from benchmarks import parity  # noqa: E402
from gpt4v_jax.interop import families, hf  # noqa: E402
from gpt4v_jax.interop.families import FAMILIES  # noqa: E402
from gpt4v_jax.model import attention  # noqa: E402
from tests.interop import tiny  # noqa: E402

BOUND = 1e-4  # of max |difference| / standard deviation

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def cases():
    """One case a family in make test; make soak and make parity run all of them."""
    seen = set()
    for name in parity.CASES:
        family = name.partition(",")[0]
        yield pytest.param(name, marks=pytest.mark.soak) if family in seen else name
        seen.add(family)


@pytest.mark.parametrize("name", list(cases()))
def test_a_family_equals_its_reference(name, tmp_path):
    """Outputs, cached decoding, and every tensor after import and export."""
    result = parity.compare(name, tmp_path)
    assert result["difference"] <= BOUND and result["argmax"] == 1, result
    assert result["missing"] == result["unexpected"] == result["differing"] == 0, result
    assert result["tensors"] > 10 and result["parameters"] > 10_000, result
    if parity.CASES[name].kind in ("decoder", "seq2seq"):
        assert result["cached"] <= BOUND and result["greedy"] == parity.NEW, result
        assert result["cached_equals_uncached"], result


# A bug of each sort; make parity plants all of parity.PLANTED.
BUGS = ("rope theta 10,000 for 700", "eps 1e-6 for 1e-5", "exact GELU for tanh", "a query matrix transposed",
        "window 9 for 8", "relative positions up to 30 for 15", "pixel mean of ViT for CLIP")  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_seen(name, tmp_path):
    _, without, with_bug = parity.planted(name, tmp_path)
    assert without <= BOUND < with_bug


def test_every_family_has_a_case():
    assert {name.partition(",")[0] for name in parity.CASES} == set(FAMILIES)


@pytest.mark.parametrize("buckets, longest", [(32, 128), (12, 15), (8, 20), (64, 100)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_are_those_of_t5(buckets, longest, both_ways):
    from transformers.models.t5.modeling_t5 import T5Attention

    behind = np.arange(-200, 201)
    theirs = T5Attention._relative_position_bucket(torch.tensor(-behind), both_ways, buckets, longest).numpy()
    ours = attention.bucket(jnp.array(behind), buckets, longest, both_ways)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(jax.jit(lambda x: attention.bucket(x, buckets, longest, both_ways))(behind), theirs)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_the_reference(model_type):
    """A config.json leaves out what has its default value, so that a wrong default is a silent error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.CONFIG_MAPPING[model_type]()
    theirs = json.loads(config.to_json_string(use_diff=False))
    assert len(theirs) > 10
    assert families.read_config({"model_type": model_type}) == families.read_config(theirs)


@pytest.mark.parametrize("name, size", [("clip_vision_model", 48), ("dinov2", 48), ("siglip_vision_model", 48)])
def test_the_reference_s_processor_makes_pictures_of_the_right_size(name, size, tmp_path):
    """A crop of 224 is the default of some of them."""
    from PIL import Image

    hf.save(tiny.imported(name, image_size=size), tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    picture = processor(Image.new("RGB", (64, 80)), return_tensors="pt")["pixel_values"]
    assert tuple(picture.shape) == (1, 3, size, size)
