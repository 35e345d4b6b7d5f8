"""Folders that do not fit, are damaged or want to run code: each is refused, and the message names the thing."""

import errno
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt4v_jax import config
from gpt4v_jax.interop import families, hf
from gpt4v_jax.interop import folder as folder_lib
from tests.interop import tiny

NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
SHARDS = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"


@pytest.fixture
def llama(tmp_path):
    return tiny.folder(tmp_path / "llama")


@pytest.fixture
def sharded(tmp_path):
    path = tiny.folder(tmp_path / "llama", save={"shard_bytes": 8000})
    assert tuple(sorted(file.name for file in path.glob("*.safetensors"))) == SHARDS
    return path


def refused(folder: Path, *named: str) -> None:
    """Loading says all of this."""
    with pytest.raises(config.InputError) as error:
        hf.load(folder)
    for name in named:
        assert name in str(error.value), error.value
    assert "\n" not in str(error.value)


# ---- tensors that do not fit


def test_a_folder_loads(llama):
    assert hf.load(llama).family.model_type == "llama"


def spoil(folder, missing=(), extra=None, **changed):
    there = {name: x for name, x in tiny.tensors(folder).items() if name not in missing}
    tiny.write(folder, there | (extra or {}) | changed)


def test_a_missing_tensor(llama):
    spoil(llama, missing=[QUERY])
    refused(llama, f"missing {QUERY}")


def test_an_extra_tensor(llama):
    spoil(llama, extra={"model.layers.1.self_attn.q_proj.bias": np.zeros(16, np.float32)})
    refused(llama, "extra model.layers.1.self_attn.q_proj.bias (16,)")


def test_an_extra_layer(llama):
    spoil(llama, extra={QUERY.replace("1", "2"): np.zeros((16, 16), np.float32)})
    refused(llama, f"extra {QUERY.replace('1', '2')}")


def test_a_tensor_of_another_shape(llama):
    spoil(llama, extra={QUERY: np.zeros((16, 12), np.float32)})
    refused(llama, f"{QUERY} has shape (16, 12), the config says (16, 16)")


def test_a_transposed_tensor(llama):
    gate = "model.layers.0.mlp.gate_proj.weight"
    spoil(llama, extra={gate: np.ascontiguousarray(tiny.tensors(llama)[gate].T)})
    refused(llama, f"{gate} has shape (16, 24), the config says (24, 16)")


def test_all_that_does_not_fit_is_named_at_once(llama):
    spoil(llama, missing=[NORM], extra={"odd": np.zeros(3, np.float32), QUERY: np.zeros(7, np.float32)})
    refused(llama, f"missing {NORM}", "extra odd (3,)", f"{QUERY} has shape (7,)")


def test_a_dtype_that_is_not_read(llama):
    spoil(llama, extra={QUERY: np.zeros((16, 16), np.int8)})
    refused(llama, "model.safetensors", QUERY, "I8")


# ---- config.json


def test_an_unknown_model_type(llama):
    tiny.change(llama, model_type="lama")
    refused(llama, "config.json", "model_type='lama'", "gpt2, llama, mistral", "did you mean 'llama'")


def test_no_model_type(llama):
    (llama / "config.json").write_text("{}")
    refused(llama, "config.json: model_type=")


@pytest.mark.parametrize("text, named", [("{", "no JSON"), ("[1]", "list"), ("\xff", "no JSON"), ("", "no JSON")])
def test_a_config_that_is_no_object(llama, text, named):
    (llama / "config.json").write_bytes(text.encode("latin-1"))
    refused(llama, "config.json", named)


def test_no_config(llama):
    (llama / "config.json").unlink()
    refused(llama, "config.json")


def test_no_folder(tmp_path):
    (tmp_path / "a file").write_text("")
    refused(tmp_path / "a file", "a file is no folder")
    refused(tmp_path / "absent here", "absent here is no folder")


@pytest.mark.parametrize("values, named", [
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type='longrope'"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale"),
    ({"hidden_act": "gelu_fast"}, "hidden_act='gelu_fast'"),
    ({"hidden_act": None}, "activation"),
    ({"num_hidden_layers": "three"}, "backbone.depth='three'"),
    ({"num_hidden_layers": 2.0}, "backbone.depth=2.0"),
    ({"num_hidden_layers": 0}, "depth=0"),
    ({"num_key_value_heads": 3}, "kv_heads=3"),
    ({"rope_scaling": "linear"}, "llama"),
    ({"rope_theta": "high"}, "high"),
])  # fmt: skip
def test_a_value_that_is_not_supported(values, named):
    with pytest.raises(config.InputError, match="somewhere/config.json: ") as error:
        families.read_config({"model_type": "llama"} | tiny.THEIRS["llama"] | values, "somewhere/config.json")
    assert named in str(error.value)


@pytest.mark.parametrize("model_type, key, value", [
    ("gpt2", "scale_attn_by_inverse_layer_idx", True), ("gpt2", "add_cross_attention", True),
    ("bert", "position_embedding_type", "relative_key"), ("bert", "is_decoder", True),
    ("vit", "num_channels", 1), ("gemma3_text", "use_bidirectional_attention", True),
])  # fmt: skip
def test_a_choice_that_we_do_not_have(model_type, key, value):
    with pytest.raises(config.InputError, match=f"{key}={value!r} is not supported"):
        families.read_config({"model_type": model_type, key: value})


@pytest.mark.parametrize("kind, ours", [
    ({"factor": 4.0}, config.RopeScaling("linear", 4.0)),
    ({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 16},
     config.RopeScaling("llama3", 8.0, 16, 1.0, 3.0)),
    ({"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0, "attention_factor": 1.5},
     config.RopeScaling("yarn", 4.0, 16, beta_fast=16.0, attention=1.5)),
])  # fmt: skip
def test_three_ways_to_say_the_same_rope(kind, ours):
    base = {k: v for k, v in tiny.THEIRS["llama"].items() if k != "rope_theta"} | {"model_type": "llama"}
    new = families.read_config(base | {"rope_parameters": {"rope_type": ours.kind, "rope_theta": 900.0} | kind})
    old = families.read_config(base | {"rope_theta": 900.0, "rope_scaling": {"rope_type": ours.kind} | kind})
    older = families.read_config(base | {"rope_theta": 900.0, "rope_scaling": {"type": ours.kind} | kind})
    assert new == old == older
    assert new.backbone.rope_theta == 900 and new.backbone.rope_scaling == ours


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_both_names_of_the_dtype(llama, key):
    values = json.loads((llama / "config.json").read_text())
    values.pop("dtype")
    (llama / "config.json").write_text(json.dumps(values | {key: "float32"}))
    tiny.same(hf.load(llama).params, tiny.imported("llama").params)


# ---- safetensors


def header(*spans, data: int) -> bytes:
    names = {f"t{i}": {"dtype": "F32", "shape": [4], "data_offsets": span} for i, span in enumerate(spans)}
    text = json.dumps(names).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


DAMAGED = {
    "empty": b"",
    "short": b"\x05\x00",
    "a huge header": struct.pack("<Q", 1 << 60) + b"{}",
    "a header of no JSON": struct.pack("<Q", 8) + b"no json!",
    "an offset past the end": header([0, 16], data=8),
    "overlapping tensors": header([0, 16], [8, 24], data=24),
    "a size of another shape": header([0, 12], data=12),
    "a pickle": pickle.dumps([1, 2, 3] * 10),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file(llama, damage):
    (llama / "model.safetensors").write_bytes(DAMAGED[damage])
    refused(llama, "model.safetensors is no whole safetensors file")


def test_a_file_cut_short(llama):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(llama, "model.safetensors is no whole safetensors file")


def test_no_weights(llama):
    (llama / "model.safetensors").unlink()
    refused(llama, "neither model.safetensors nor model.safetensors.index.json")


# ---- shards


def index(folder: Path, **changed: str | None) -> None:
    """Moves names to other files in the index; None: the name is left out."""
    values = json.loads((folder / folder_lib.INDEX).read_text())
    values["weight_map"] = {k: v for k, v in (values["weight_map"] | changed).items() if v}
    (folder / folder_lib.INDEX).write_text(json.dumps(values))


def test_a_missing_shard(sharded):
    (sharded / SHARDS[1]).unlink()
    refused(sharded, f"{SHARDS[1]} is missing")


def test_a_shard_that_the_index_does_not_name(sharded):
    (sharded / "model-00004-of-00004.safetensors").write_bytes((sharded / SHARDS[0]).read_bytes())
    refused(sharded, "model-00004-of-00004.safetensors", "does not name it")


def test_a_tensor_that_the_index_does_not_name(sharded):
    index(sharded, **{NORM: None})
    refused(sharded, NORM, "does not name it")


def test_an_index_that_names_another_file(sharded):
    index(sharded, **{NORM: SHARDS[0]})
    refused(sharded, f"says that {SHARDS[0]} holds {NORM}: it does not")


def test_an_index_that_names_a_tensor_of_no_file(sharded):
    index(sharded, odd=SHARDS[0])
    refused(sharded, f"says that {SHARDS[0]} holds odd: it does not")


def test_a_tensor_in_two_shards(sharded):
    (sharded / SHARDS[1]).write_bytes((sharded / SHARDS[0]).read_bytes())
    refused(sharded, "both hold the tensor")


@pytest.mark.parametrize("place", ["../{}", "/{dir}/{}", "sub/../../{}"])
def test_an_index_that_leads_out_of_the_folder(sharded, place):
    (sharded / "sub").mkdir()
    (sharded / SHARDS[2]).rename(sharded.parent / SHARDS[2])
    there = json.loads((sharded / folder_lib.INDEX).read_text())["weight_map"]
    away = place.format(SHARDS[2], dir=sharded.parent)
    index(sharded, **{name: away for name, file in there.items() if file == SHARDS[2]})
    refused(sharded, "outside of the folder")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "[]"])
def test_an_index_without_names(sharded, text):
    (sharded / folder_lib.INDEX).write_text(text)
    refused(sharded, folder_lib.INDEX)


# ---- nothing that a folder brings is executed


class Trap:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.npz"])
def test_a_pickle_is_refused_unread(llama, tmp_path, name):
    (llama / "model.safetensors").unlink()
    trap = Trap(tmp_path / "touched")
    if name.endswith(".npz"):
        np.savez(llama / name, model=np.array([trap], object))
    else:
        (llama / name).write_bytes(pickle.dumps(trap))
    refused(llama, name, "can run code")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code"])
def test_code_of_its_own_is_refused(llama, file, key):
    tiny.change(llama, file, **{key: {"AutoModel": "modeling.Model"}})
    refused(llama, file, key, "refused")


# ---- what older and other writers do


def test_a_tied_model_may_repeat_its_table(tmp_path):
    folder = tiny.folder(tmp_path / "llama", tie_word_embeddings=True)
    spoil(folder, extra={"lm_head.weight": tiny.tensors(folder)["model.embed_tokens.weight"]})
    loaded = hf.load(folder)
    assert loaded.config.tied and "head" not in loaded.params
    tiny.same(loaded.params, tiny.imported("llama", tie_word_embeddings=True).params)


def test_a_tied_model_with_another_head_is_untied(tmp_path):
    folder = tiny.folder(tmp_path / "llama", tie_word_embeddings=True)
    head = tiny.tensors(folder)["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    spoil(folder, extra={"lm_head.weight": head})
    loaded = hf.load(folder)
    assert not loaded.config.tied
    np.testing.assert_array_equal(loaded.params["head"]["kernel"], head.T)


def test_a_repeat_that_differs_and_is_no_head_is_refused(tmp_path):
    folder = tiny.folder(tmp_path / "bart", "bart")
    spoil(folder, extra={"model.encoder.embed_tokens.weight": np.zeros((32, 16), np.float32)})
    refused(folder, "model.encoder.embed_tokens.weight repeats model.shared.weight, but they differ")


def test_older_names_of_bert(tmp_path):
    folder = tiny.folder(tmp_path / "bert", "bert")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
           for name, x in tiny.tensors(folder).items()}  # fmt: skip
    assert "bert.embeddings.LayerNorm.beta" in old
    tiny.write(folder, old)
    tiny.same(hf.load(folder).params, tiny.imported("bert").params)


def test_gpt2_without_a_prefix_and_with_its_masks(tmp_path):
    folder = tiny.folder(tmp_path / "gpt2", "gpt2")
    bare = {name.removeprefix("transformer."): x for name, x in tiny.tensors(folder).items()}
    masks = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 48, 48), np.float32)) for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": np.array(-1e4, np.float32) for i in range(2)}
    tiny.write(folder, bare | masks)
    tiny.same(hf.load(folder).params, tiny.imported("gpt2").params)


# ---- a folder appears whole or not at all


def test_nothing_is_overwritten(llama):
    before = (llama / "model.safetensors").read_bytes()
    with pytest.raises(config.InputError, match="llama is there already"):
        hf.save(tiny.imported("llama", seed=1), llama)
    assert (llama / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_save_leaves_nothing_behind(tmp_path, monkeypatch, failing):
    calls, real = [], hf.save_file

    def full(tensors, path, **options):
        calls.append(path)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, **options)

    monkeypatch.setattr(hf, "save_file", full)
    with pytest.raises(config.InputError, match="llama cannot be written: .*No space left"):
        hf.save(tiny.imported("llama"), tmp_path / "llama", shard_bytes=8000)
    assert len(calls) == failing and not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_said_leaves_nothing_behind(tmp_path):
    with pytest.raises(config.InputError):
        hf.save(hf.Imported(tiny.FAMILIES["gpt2"], tiny.imported("llama").config, {}, {}), tmp_path / "sub" / "gpt2")
    assert not list(tmp_path.iterdir())


# ---- what the reference does with rarer keys


@pytest.mark.parametrize("kind, rope, missing", [
    ("linear", {}, "factor"), ("llama3", {"factor": 8.0, "high_freq_factor": 4.0}, "low_freq_factor"),
    ("llama3", {"low_freq_factor": 1.0, "high_freq_factor": 4.0}, "factor"),
])  # fmt: skip
def test_a_rope_without_its_numbers(kind, rope, missing):
    theirs = {"model_type": "llama"} | tiny.THEIRS["llama"] | {"rope_scaling": {"rope_type": kind} | rope}
    with pytest.raises(config.InputError, match=f"rope_type='{kind}' needs {missing}"):
        families.read_config(theirs)


def test_yarn_without_a_factor_has_that_of_its_contexts():
    rope = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}
    theirs = {"model_type": "llama"} | tiny.THEIRS["llama"] | {"rope_scaling": rope}
    assert families.read_config(theirs).backbone.rope_scaling.factor == 48 / 16


def test_the_original_context_beside_the_rope_counts():
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    theirs = {"model_type": "llama", "original_max_position_embeddings": 12, "rope_scaling": rope}
    assert families.read_config(tiny.THEIRS["llama"] | theirs).backbone.rope_scaling.original == 12


def test_two_ropes_are_one_too_many():
    rope = {"rope_type": "linear", "factor": 2.0}
    theirs = {"model_type": "llama", "rope_scaling": rope, "rope_parameters": rope | {"rope_theta": 10.0}}
    with pytest.raises(config.InputError, match="rope_parameters and rope_scaling"):
        families.read_config(tiny.THEIRS["llama"] | theirs)


def test_mistral_slides_in_every_layer():
    theirs = tiny.THEIRS["mistral"] | {"layer_types": ["full_attention", "sliding_attention"]}
    assert families.read_config({"model_type": "mistral"} | theirs).backbone.kinds == ("local", "local")


def test_clip_s_second_spelling_counts():
    """And whole: what it does not say is the default, not what the first one says."""
    theirs = {"model_type": "clip", "text_config": {"hidden_size": 64, "hidden_act": "gelu"}, "vision_config": None}
    theirs |= {"text_config_dict": {"hidden_act": "quick_gelu"}, "vision_config_dict": {"layer_norm_eps": 1e-3}}
    ours = families.read_config(theirs)
    assert ours.text.backbone.activation == "quick_gelu" and ours.image.encoder.norm_eps == 1e-3
    assert ours.text.backbone.width == 512


@pytest.mark.parametrize("model_type, values, named", [
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    ("vit", {"preprocessor": {"do_normalize": False}}, "do_normalize=False"),
    ("clip", {"preprocessor": {"rescale_factor": 1.0}}, "rescale_factor=1.0"),
])  # fmt: skip
def test_other_choices_are_refused(model_type, values, named):
    with pytest.raises(config.InputError, match="is not supported") as error:
        families.read_config({"model_type": model_type} | values)
    assert named in str(error.value)


def test_gemma_s_older_name_of_its_activation():
    ours = [families.read_config({"model_type": "gemma", "hidden_act": name}) for name in ("gelu", "gelu_pytorch_tanh")]
    assert ours[0] == ours[1]


def test_whole_numbers_as_pixel_constants():
    theirs = {"model_type": "vit", "preprocessor": {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}}
    assert families.read_config(theirs).mean == (0.0, 0.0, 0.0)


def test_an_index_beside_one_file(sharded):
    (sharded / "model.safetensors").write_bytes((sharded / SHARDS[0]).read_bytes())
    with pytest.raises(config.InputError, match="model.safetensors and model.safetensors.index.json"):
        hf.load(sharded)


@pytest.mark.parametrize("hide", [lambda code: {"nested": code}, lambda code: {"a": [1, [code]]}])
def test_code_in_a_section(llama, hide):
    code = {"auto_map": {"AutoModel": "evil.Model"}}
    (llama / "preprocessor_config.json").write_text(json.dumps(hide(code)))
    with pytest.raises(config.InputError, match="preprocessor_config.json has auto_map"):
        hf.load(llama)


@pytest.mark.parametrize("values, named", [
    ({"model_type": ["llama"]}, "is none of"),
    ({"sliding_window_pattern": 0, "model_type": "gemma3_text"}, "no config"),
    ({"hidden_size": 2, "num_attention_heads": 4, "model_type": "gpt2", "n_embd": 2, "n_head": 4}, "width=2"),
])  # fmt: skip
def test_values_that_make_no_model(values, named):
    with pytest.raises(config.InputError, match=named):
        families.read_config(values)


def test_a_json_too_deep_to_read(llama):
    (llama / "config.json").write_text("[" * 200_000)
    with pytest.raises(config.InputError, match="is no JSON"):
        hf.load(llama)


def test_bart_without_its_prefix_and_its_logits_bias(tmp_path):
    bart = tiny.imported("bart")
    hf.save(bart, tmp_path / "bart")
    tensors = load_file(tmp_path / "bart/model.safetensors")
    tensors = {name.removeprefix("model."): x for name, x in tensors.items() if name != "final_logits_bias"}
    save_file(tensors, tmp_path / "bart/model.safetensors")
    loaded = tiny.flat(hf.load(tmp_path / "bart").params)
    assert (loaded.pop("head_bias/value") == 0).all()
    for path, x in tiny.flat(bart.params).items():
        if path != "head_bias/value":
            np.testing.assert_array_equal(loaded[path], x)


def test_values_beyond_float16(llama):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"][:2] = np.nan, 1e6
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(config.InputError, match="float16's 65,504"):
        hf.load(llama, "float16")
    with pytest.raises(config.InputError, match="model.norm.weight has values beyond float16"):
        hf.save(hf.load(llama), llama.parent / "half", dtype="float16")
    assert not (llama.parent / "half").exists()


def test_tables_without_dimensions(llama):
    tensors = load_file(llama / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.array(1.0, np.float32)
    save_file(tensors, llama / "model.safetensors")
    refused(llama, "model.embed_tokens.weight has shape ()")


def test_a_key_of_config_json_named_like_a_section(llama):
    values = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(values | {"generation": 3, "preprocessor": 4}))
    theirs = hf.load(llama).theirs
    assert theirs["generation"] == {} and "preprocessor" not in theirs  # what their own files say


def test_generation_config_and_labels_go_through(llama, tmp_path):
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1], "temperature": 0.6}))
    hf.save(hf.load(llama), tmp_path / "again")
    assert json.loads((tmp_path / "again/generation_config.json").read_text())["eos_token_id"] == [2, 1]
    labels = {"id2label": {"0": "cat", "1": "owl"}, "label2id": {"cat": 0, "owl": 1}}
    vit = tiny.imported("vit", architectures=["ViTForImageClassification"], **labels)
    hf.save(vit, tmp_path / "vit")
    assert json.loads((tmp_path / "vit/config.json").read_text())["id2label"]["1"] == "owl"
