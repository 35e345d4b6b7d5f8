"""python -m gpt4v_jax.interop: a folder becomes a run, the run generates and becomes a folder again; and bad input."""

import dataclasses
import importlib
import json
import shutil
import string

import numpy as np
import pytest
from absl.testing import flagsaver

from gpt4v_jax import command, config
from gpt4v_jax.data import packing
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.generate import decode
from gpt4v_jax.generate import prompts as prompts_lib
from gpt4v_jax.interop import hf
from gpt4v_jax.training import checkpoint, workdir
from gpt4v_jax.training.step import State
from tests.interop import test_llama2c, tiny

interop = importlib.import_module("gpt4v_jax.interop.__main__")
LETTERS = "".join(sorted(string.ascii_lowercase + " .,!?"))  # of the tokenizer, by id
END = 2  # the letter that ends an answer


def say(capsys, monkeypatch, *args) -> tuple[int, str, str]:
    """-> (exit status, stdout, stderr) of the command."""
    monkeypatch.setattr("sys.argv", ["interop", *map(str, args)])
    capsys.readouterr()
    with flagsaver.flagsaver():
        try:
            command.run(interop.main, arguments=("the action", "the folder"))
            status = 0
        except SystemExit as ended:
            status = ended.code
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """-> the folder with a llama, a t5 and a siglip, and with `run`, the llama's workdir."""
    path = tmp_path_factory.mktemp("interop")
    tokenizer = tokenizer_lib.train("char", [LETTERS], 0)
    assert tokenizer.vocab <= 32
    for model_type, more in (("llama", {"eos_token_id": END}), ("t5", {"decoder_start_token_id": 3}), ("siglip", {})):
        text = "" if model_type == "siglip" else tokenizer.to_json()
        tiny.folder(path / model_type, model_type, save={"tokenizer": text}, **more)
    return path


@pytest.fixture
def run(folders, capsys, monkeypatch):
    """-> the workdir of the imported llama."""
    if not (folders / "run").exists():
        status, out, err = say(capsys, monkeypatch, "import", folders / "llama", f"--workdir={folders / 'run'}")
        assert status == 0 and "llama, " in out and "error" not in err, err
    return folders / "run"


def test_a_folder_becomes_a_run(folders, run):
    trained, model = workdir.restore(run), hf.load(folders / "llama")
    assert trained.step == 0 and trained.run.model == model.config and trained.run.data.end == (LETTERS[END],)
    tiny.same(trained.params, model.params)


def test_the_run_generates_what_the_folder_s_model_does(folders, run):
    """Greedily, and up to the folder's own end token."""
    trained, model = workdir.restore(run), hf.load(folders / "llama")
    assert trained.tokenizer.special["<end>"] == END
    prompt = prompts_lib.prompt(trained, "hello")
    batch = packing.stack([packing.fill([prompt], lambda key: None, trained.layout)])
    logits, _ = decode.prefill(trained.model, model.params, batch, 64)
    answer = decode.generate(trained, [prompt], (), max_new_tokens=20)[0]
    assert answer.tokens[0] == int(np.argmax(logits[0])) and len(answer.tokens) == 20
    end = answer.tokens[5]
    tokenizer = tokenizer_lib.load(run / "tokenizer.json", (trained.tokenizer.token(end),))
    cut = decode.generate(dataclasses.replace(trained, tokenizer=tokenizer), [prompt], (), max_new_tokens=20)[0]
    assert cut.tokens == answer.tokens[: answer.tokens.index(end)] and cut.finish == "stop"


@pytest.mark.parametrize("more", [[], ["--family=llama"], ["--shard_mb=1"]])
def test_the_run_becomes_the_folder_again(folders, run, tmp_path, capsys, monkeypatch, more):
    status, out, err = say(capsys, monkeypatch, "export", run, f"--out={tmp_path / 'again'}", *more)
    assert status == 0 and "at step 0" in out, err
    one, two = tiny.tensors(folders / "llama"), tiny.tensors(tmp_path / "again")
    assert one.keys() == two.keys()
    for name, x in one.items():
        np.testing.assert_array_equal(x, two[name])
    assert (folders / "llama" / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()
    there = [json.loads((f / "tokenizer.json").read_text()) for f in (folders / "llama", tmp_path / "again")]
    assert there[0] == there[1]
    settings = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == LETTERS[END]


def test_another_dtype(folders, run, tmp_path, capsys, monkeypatch):
    say(capsys, monkeypatch, "export", run, f"--out={tmp_path / 'half'}", "--dtype=bfloat16")
    kept = hf.load(tmp_path / "half", dtype="keep").params
    assert {x.dtype.name for x in tiny.flat(kept).values()} == {"bfloat16"}
    status, *_ = say(capsys, monkeypatch, "import", tmp_path / "half", f"--workdir={tmp_path / 'w'}")
    tiny.same(workdir.restore(tmp_path / "w").params, hf.load(tmp_path / "half").params)
    assert status == 0


def test_an_encoder_decoder_answers(folders, tmp_path, capsys, monkeypatch):
    status, _, err = say(capsys, monkeypatch, "import", folders / "t5", f"--workdir={tmp_path / 'w'}")
    assert status == 0, err
    trained = workdir.restore(tmp_path / "w")
    assert trained.run.data.start == (LETTERS[3],)
    prompt = prompts_lib.prompt(trained, "hello")
    assert prompt.tokens.tolist() == [3] and list(prompt.source) == trained.tokenizer.encode("hello")
    asked = [prompts_lib.prompt(trained, text) for text in ("hello", "what is it?")]
    texts = [decode.generate(trained, [prompt], (), 8)[0].text for prompt in asked]
    assert len(texts[0]) > 0 and texts[0] != texts[1]


def test_all_end_tokens_and_a_forced_first_one(tmp_path, capsys, monkeypatch):
    """generation_config.json's list counts before config.json's one; BART's forced first token starts the answer."""
    tokenizer = tokenizer_lib.train("char", [LETTERS], 0).to_json()
    ids = {"decoder_start_token_id": 3, "forced_bos_token_id": 5, "eos_token_id": 7}
    tiny.folder(tmp_path / "bart", "bart", save={"tokenizer": tokenizer}, **ids)
    (tmp_path / "bart/generation_config.json").write_text('{"eos_token_id": [7, 9], "decoder_start_token_id": 3}')
    status, _, err = say(capsys, monkeypatch, "import", tmp_path / "bart", f"--workdir={tmp_path / 'w'}")
    assert status == 0, err
    trained = workdir.restore(tmp_path / "w")
    assert trained.tokenizer.ends == (7, 9)
    assert prompts_lib.prompt(trained, "hello").tokens.tolist() == [3, 5]
    # Whichever of the two ends comes first ends the answer.
    drawn = decode.generate(trained, [prompts_lib.prompt(trained, "hello")], (), 16)[0].tokens
    assert not {7, 9} & set(drawn)


def test_an_import_that_was_interrupted_is_not_built_upon(folders, tmp_path, capsys, monkeypatch):
    args = ("import", folders / "llama", f"--workdir={tmp_path / 'w'}")
    assert say(capsys, monkeypatch, *args)[0] == 0
    (tmp_path / "w/config.json").unlink()
    status, _, err = say(capsys, monkeypatch, *args)
    assert status == 2 and "holds a run already, or a part of one" in err


def test_a_llama2c_file_becomes_a_run(tmp_path, capsys, monkeypatch):
    model, tokenizer = test_llama2c.write(tmp_path)
    args = [model, f"--workdir={tmp_path / 'w'}"]
    status, _, err = say(capsys, monkeypatch, "import", *args)
    assert status == 2 and "--tokenizer is missing" in err
    status, _, err = say(capsys, monkeypatch, "import", *args, f"--tokenizer={tokenizer}")
    assert status == 0, err
    trained = workdir.restore(tmp_path / "w")
    assert trained.tokenizer.special["<end>"] == 1 and trained.tokenizer.prompt("ab")[0] == 1


def test_a_run_s_image_encoder(tmp_path, capsys, monkeypatch):
    """A model with pictures cannot go out as a llama, but its encoder can go out alone."""
    tower = tiny.imported("siglip_vision_model", vision_use_head=False)
    llama = tiny.imported("llama")
    model = dataclasses.replace(llama.config, image=tower.config)
    params = llama.params | {"image": tower.params | {"connector": {
        "kernel": np.zeros((16, 16), np.float32), "bias": np.zeros(16, np.float32)}}}  # fmt: skip
    checkpoints = checkpoint.Checkpoints(tmp_path / "w")
    checkpoints.save(State(0, params, {}))
    checkpoints.wait()
    workdir.describe(tmp_path / "w", config.Config(model=model), tokenizer_lib.train("char", [LETTERS], 0))
    args = ["export", tmp_path / "w", f"--out={tmp_path / 'out'}"]
    status, _, err = say(capsys, monkeypatch, *args, "--family=llama")
    assert status == 2 and "a llama cannot have image" in err and not (tmp_path / "out").exists()
    status, _, err = say(capsys, monkeypatch, *args, "--family=siglip_vision_model", "--part=image")
    assert status == 0, err
    assert hf.load(tmp_path / "out").config == tower.config
    tiny.same(hf.load(tmp_path / "out").params, tower.params)


@pytest.mark.parametrize("name, said", [
    ("llama", ["llama, 21 tensors in 1 files", '"width": 16', "as config.Model"]),
    ("siglip", ["siglip, ", "as config.Towers"]),
])  # fmt: skip
def test_inspect(folders, capsys, monkeypatch, name, said):
    status, out, _ = say(capsys, monkeypatch, "inspect", folders / name)
    n = sum(x.size for x in tiny.tensors(folders / name).values())
    assert status == 0 and f"parameters {n:,} (" in out
    for text in said:
        assert text in out


def test_inspect_tells_what_is_not_read(tmp_path, capsys, monkeypatch):
    folder = tiny.folder(tmp_path / "bert", "bert")
    tiny.write(folder, tiny.tensors(folder) | {"bert.pooler.dense.bias": np.zeros(16, np.float32)})
    status, out, _ = say(capsys, monkeypatch, "inspect", folder)
    assert status == 0 and "not read: bert.pooler.dense.bias" in out


@pytest.mark.parametrize("args, message", [
    ([], "the action is missing"),
    (["import"], "the folder is missing"),
    (["imprt", "{dir}/llama"], "the action='imprt' is none of import, export, inspect, merge (did you mean 'import'?)"),
    (["import", "{dir}/llama", "{dir}/t5"], "unexpected argument"),
    (["import", "{dir}/llama"], "--workdir is missing"),
    (["import", "{dir}/llama", "--workdir={dir}/run"], "holds a run already"),
    (["import", "{dir}/siglip", "--workdir={new}"], "siglip is an encoder (config.Towers), not a language model"),
    (["import", "{dir}/siglip", "--workdir={new}"], "init_from.image="),
    (["import", "{dir}/absent here", "--workdir={new}"], "absent here is no folder"),
    (["import", "{dir}/absent.bin", "--workdir={new}", "--tokenizer=x"], "absent.bin cannot be read"),
    (["import", "{dir}/llama", "--workdir={new}", "--tokenizer={dir}/no.json"], "no.json is missing"),
    (["import", "{dir}/llama", "--workdir={new}", "--tokenizer={dir}/llama/config.json"], "is no tokenizer"),
    (["import", "{dir}/llama", "--workdir={new}", "--dtype=int8"], "dtype='int8' is none of float32"),
    (["import", "{bare}", "--workdir={new}"], "tokenizer.json is missing: give a tokenizer.json with --tokenizer"),
    (["export", "{dir}/run"], "--out is missing"),
    (["export", "{dir}/run", "--out={dir}/llama"], "llama is there already"),
    (["export", "{dir}/run", "--out={new}", "--family=gpt2"], "a gpt2: activation_function='swiglu'"),
    (["export", "{dir}/run", "--out={new}", "--family=lama"], "did you mean 'llama'"),
    (["export", "{dir}/run", "--out={new}", "--shard_mb=0"], "shard_mb=0 must be 1 or more"),
    (["export", "{dir}/run", "--out={new}", "--part=image", "--family=vit"], "image.encoder is None"),
    (["export", "{dir}/llama", "--out={new}"], "unknown config key"),
    (["export", "{dir}", "--out={new}"], "holds no run"),
    (["inspect", "{dir}/run"], "holds neither model.safetensors"),
    (["inspect", "{dir}"], "config.json cannot be read"),
])  # fmt: skip
def test_bad_input(args, message, folders, run, tmp_path, capsys, monkeypatch):
    shutil.copytree(folders / "llama", tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    args = [arg.format(dir=folders, new=tmp_path / "new", bare=tmp_path / "bare") for arg in args]
    status, out, err = say(capsys, monkeypatch, *args)
    assert status == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert not out and not (tmp_path / "new").exists()


def test_a_tokenizer_larger_than_the_model_is_told(folders, tmp_path, capsys, monkeypatch):
    large = tokenizer_lib.train("char", [string.printable], 0)
    (tmp_path / "large.json").write_text(large.to_json())
    args = ["import", folders / "llama", f"--workdir={tmp_path / 'w'}", f"--tokenizer={tmp_path / 'large.json'}"]
    status, out, _ = say(capsys, monkeypatch, *args)
    assert status == 0 and "the tokenizer has 100 tokens, the model 32" in out
