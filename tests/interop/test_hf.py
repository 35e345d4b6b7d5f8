"""Out and in again: bit-equal for every family, in shards, in other dtypes, and onto a mesh of eight devices."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import config
from gpt4v_jax.interop import families, hf, table
from gpt4v_jax.interop import folder as folder_lib
from gpt4v_jax.interop.families import FAMILIES
from tests.interop import tiny


def test_every_family_has_a_tiny_model():
    assert set(tiny.THEIRS) == set(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_out_and_in_is_the_same_model(model_type, tmp_path):
    model = tiny.imported(model_type)
    hf.save(model, tmp_path / "saved")
    loaded = hf.load(tmp_path / "saved")
    assert loaded.config == model.config and loaded.family is FAMILIES[model_type]
    tiny.same(loaded.params, model.params)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_config_goes_out_and_in(model_type):
    ours = tiny.imported(model_type).config
    assert families.read_config(json.loads(json.dumps(table.write_config(FAMILIES[model_type], ours)))) == ours


def test_shards_are_one_file_in_pieces(tmp_path):
    model = tiny.imported("llama")
    hf.save(model, tmp_path / "one")
    hf.save(model, tmp_path / "many", shard_bytes=5000)
    shards = list((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2 and all(file.stat().st_size < 5000 + 2000 for file in shards)
    one, many = folder_lib.Folder(tmp_path / "one"), folder_lib.Folder(tmp_path / "many")
    assert one.shapes == many.shapes and one.config == many.config
    for name in one.files:
        np.testing.assert_array_equal(one.tensor(name), many.tensor(name))
    tiny.same(hf.load(tmp_path / "many").params, model.params)
    size = json.loads((tmp_path / "many" / folder_lib.INDEX).read_text())["metadata"]["total_size"]
    assert size == sum(x.nbytes for x in tiny.flat(model.params).values())


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    model = tiny.imported("llama")
    hf.save(model, tmp_path / "saved", shard_bytes=1)
    tiny.same(hf.load(tmp_path / "saved").params, model.params)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_saved_in_half_the_bytes(tmp_path, name):
    """Rounded once, and the same on each of the ways in."""
    model = tiny.imported("llama")
    hf.save(model, tmp_path / "saved", dtype=name)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == name
    rounded = {path: x.astype(hf.DTYPES[name]) for path, x in tiny.flat(model.params).items()}
    for dtype, expected in (("keep", hf.DTYPES[name]), (name, hf.DTYPES[name]), ("float32", jnp.float32)):
        for path, x in tiny.flat(hf.load(tmp_path / "saved", dtype=dtype).params).items():
            assert x.dtype == expected, (dtype, path)
            np.testing.assert_array_equal(x, rounded[path].astype(expected), err_msg=path)


def test_kept_is_as_it_was(tmp_path):
    model = tiny.imported("gpt2", jnp.bfloat16)
    hf.save(model, tmp_path / "saved")
    tiny.same(hf.load(tmp_path / "saved", dtype="keep").params, model.params)
    assert tiny.flat(hf.load(tmp_path / "saved").params)["text/embed/table"].dtype == np.float32


def test_another_dtype_is_refused(tmp_path):
    folder = tiny.folder(tmp_path / "llama")
    with pytest.raises(config.InputError, match="dtype='float8' is none of float32, bfloat16, float16, keep"):
        hf.load(folder, dtype="float8")


def test_keys_that_are_not_the_model_s_go_through(tmp_path):
    model = tiny.imported("t5", decoder_start_token_id=0, eos_token_id=[1, 5], pad_token_id=0)
    hf.save(model, tmp_path / "saved")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "saved" / name).read_text())
        assert (values["decoder_start_token_id"], values["eos_token_id"], values["pad_token_id"]) == (0, [1, 5], 0)


def test_pixel_constants_go_through(tmp_path):
    model = tiny.imported("vit", preprocessor={"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
    assert model.config.mean == (0.1, 0.2, 0.3)
    hf.save(model, tmp_path / "saved")
    assert hf.load(tmp_path / "saved").config == model.config


# ---- what a family cannot say


def changed(ours, section: str = "", **values):
    if section:
        values = {section: dataclasses.replace(getattr(ours, section), **values)}
    return dataclasses.replace(ours, **values)


PICTURES = {"image": config.Image(size=8, patch=4)}


@pytest.mark.parametrize("model_type, section, values, named", [
    ("llama", "backbone", {"norm": "layer"}, "backbone.norm='layer'"),
    ("llama", "backbone", {"activation": "gelu"}, "hidden_act='gelu'"),
    ("llama", "backbone", {"qk_norm": True}, "backbone.qk_norm=True"),
    ("llama", "backbone", {"bias": ("qkv",)}, r"backbone.bias=\('qkv',\)"),
    ("llama", "backbone", {"pattern": ("local",), "window": 4}, r"backbone\.(pattern|window)"),
    ("llama", "", {"position": "learned"}, "position='learned'"),
    ("llama", "", {"causal": False}, "causal=False"),
    ("llama", "", {"embed_scale": 4.0}, "embed_scale=4.0"),
    ("llama", "", {"logit_cap": 3.0}, "logit_cap=3.0"),
    ("llama", "", PICTURES, "image"),
    ("gpt2", "backbone", {"kv_heads": 2}, "backbone.kv_heads=2"),
    ("gpt2", "backbone", {"rope_theta": 5.0}, "backbone.rope_theta=5.0"),
    ("gpt2", "backbone", {"bias": ()}, r"backbone.bias=\(\)"),
    ("gemma", "backbone", {"norm": "rms"}, "backbone.norm='rms'"),
    ("gemma", "", {"embed_scale": 1.0}, "embed_scale=1.0"),
    ("gemma2", "backbone", {"norm_place": "pre"}, "backbone.norm_place='pre'"),
    ("mistral", "backbone", {"pattern": ("local", "global")}, "backbone.pattern"),
    ("bert", "", {"tied": False}, "tied=False"),
    ("t5", "backbone", {"norm_eps": 1e-3}, "norm_eps"),
    ("bart", "", {"position_offset": 0}, "position_offset=0"),
    ("vit", "", {"pre_norm": True}, "pre_norm=True"),
    ("dinov2", "encoder", {"hidden": 40}, "hidden=40"),
    ("siglip_vision_model", "", {"class_token": True}, "class_token=True"),
])  # fmt: skip
def test_what_a_family_cannot_say_is_named(model_type, section, values, named):
    ours = changed(tiny.imported(model_type).config, section, **values)
    with pytest.raises(config.InputError, match=f"a {model_type}[ :].*{named}"):
        table.write_config(FAMILIES[model_type], ours)


def test_training_s_own_values_are_no_difference():
    ours = tiny.imported("llama").config
    ours = dataclasses.replace(ours, init_std=0.5, backbone=dataclasses.replace(ours.backbone, dropout=0.1))
    assert table.write_config(FAMILIES["llama"], ours)["hidden_size"] == 16


def test_another_kind_of_model_is_refused():
    with pytest.raises(config.InputError, match="a vit is a config.Image, not a config.Model"):
        table.write_config(FAMILIES["vit"], tiny.imported("llama").config)


# ---- eight devices


def test_a_mesh_gets_the_same_values_in_parts(tmp_path):
    """Devices are forced before JAX starts, so the work is done in a process of its own."""
    for model_type in MESHED:
        tiny.folder(tmp_path / model_type, model_type)
    flags = {"JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.interop.test_hf", tmp_path], cwd=Path(__file__).parents[2],
        env=os.environ | flags, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "equal\n", done.stderr


MESHED = ("llama", "gpt2", "clip", "t5")


def main(folder: Path):
    import jax

    from gpt4v_jax import sharding

    for shape in ((1, 4, 2), (8, 1, 1)):
        mesh = sharding.make_mesh(config.Mesh(*shape))
        for model_type in MESHED:
            model, loaded = tiny.imported(model_type), hf.load(folder / model_type, mesh=mesh)
            tiny.same(loaded.params, model.params)
            wanted = sharding.params_sharding(model.params, mesh)
            jax.tree.map(lambda x, s: np.testing.assert_equal(x.sharding, s), loaded.params, wanted)
            largest = max(jax.tree.leaves(loaded.params), key=lambda x: x.size)
            held = {part.device: part.data.size for part in largest.addressable_shards}
            assert len(held) == 8 and max(held.values()) <= largest.size // shape[1], held
    print("equal")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
