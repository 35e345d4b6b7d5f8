"""Parameters from another run's checkpoint: which, bit for bit, and every line that says so."""

import dataclasses
import functools
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import config, sharding
from gpt4v_jax.training import checkpoint, lora, partial, step, workdir
from tests import tiny
from tests.training.test_checkpoint import contents, noisy

METRIC = "questions/accuracy"
BASE = config.Config(model=tiny.make_config(depth=1))


def saved(folder: Path, *states, metrics=(), evaluated=False, **changes) -> Path:
    """A run's folder: its config and its checkpoints. changes: of its config."""
    run = dataclasses.replace(BASE, **changes)
    if evaluated:
        run = dataclasses.replace(run, eval=config.Eval(evaluators=("questions",), best=METRIC))
    workdir.write(folder / "config.json", config.to_json(run))
    checkpoints = checkpoint.Checkpoints(folder, run.eval.best, keep_last=9)
    for i, state in enumerate(states):
        checkpoints.save(state)
        if evaluated:
            checkpoints.record(int(state.step), {METRIC: metrics[i]})
    checkpoints.close()
    return folder


@functools.cache
def params_of(**changes):
    return tiny.make_model(tiny.make_config(**{"depth": 1} | changes), seed=1)[1]


def load(folder, pattern="", params=None):
    run = dataclasses.replace(BASE, init_from=config.InitFrom(run=str(folder), run_parameters=pattern))
    params = params_of() if params is None else params
    loaded, lines = partial.load(params, run)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    return flat(loaded), lines


def flat(params):
    return flax.traverse_util.flatten_dict(params, sep="/")


def from_there(loaded, state):
    """The paths whose values are those of the checkpoint; the others must be as they were."""
    theirs, ours = flat(state.params if state.ema is None else state.ema), flat(params_of())
    taken = set()
    for path, x in loaded.items():
        if path in theirs and np.array_equal(x, theirs[path]):
            taken.add(path)
        elif path in ours and ours[path].shape == x.shape:
            np.testing.assert_array_equal(x, ours[path])
    return taken


@pytest.mark.parametrize("ema", [False, True])
def test_all_of_it(tmp_path, ema):
    state = noisy(7, ema=ema)
    folder = saved(tmp_path / "run", state)
    before = contents(folder)
    loaded, lines = load(folder)
    assert from_there(loaded, state) == set(loaded) and contents(folder) == before
    count, kind = sum(x.size for x in loaded.values()), "moving average of the weights" if ema else "weights"
    assert lines[0] == f"init_from.run  {folder} (step 7, {kind}): {len(loaded)} parameters, {count:,} values"
    assert lines[2:] == ["  skipped, in the folder and not taken: nothing", "  newly initialised: nothing"]


def test_a_pattern_and_another_model(tmp_path):
    """Two blocks and a head of its own here, one block there, and only the backbone is asked for."""
    state = noisy(7)
    loaded, lines = load(saved(tmp_path / "run", state), "^backbone/", params_of(depth=2, tied=False))
    taken = from_there(loaded, state)
    assert taken == {path for path in flat(state.params) if path.startswith("backbone/")}
    assert "head/kernel" in loaded and any(path.startswith("backbone/block_1/") for path in loaded)
    loaded_line, skipped, new = lines[1:]
    assert loaded_line.startswith("  loaded: ") and "backbone/block_{i}/attention/key/kernel" in loaded_line
    assert skipped.startswith("  skipped") and "text/embed/table" in skipped and "backbone" not in skipped
    assert "newly initialised: " in new and "head/kernel" in new and "backbone/block_{i}/mlp/up/kernel" in new


def test_the_best_step_is_taken(tmp_path):
    states = [noisy(1, seed=1), noisy(2, seed=2)]
    folder = saved(tmp_path / "run", *states, metrics=(0.9, 0.1), evaluated=True)
    loaded, lines = load(folder)
    assert "(step 1, weights)" in lines[0] and from_there(loaded, states[0]) == set(loaded)
    (folder / "checkpoints/1/manifest.json").unlink()
    loaded, lines = load(folder)
    assert "(step 2, weights)" in lines[0] and from_there(loaded, states[1]) == set(loaded)
    assert (folder / "checkpoints/1").exists(), "another run's folder is not ours to change"


def test_dtype_and_place_are_ours(tmp_path):
    state = noisy(7)
    mesh = sharding.make_mesh(config.Mesh())
    target = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of())
    target = jax.device_put(target, sharding.params_sharding(target, mesh))
    loaded, lines = load(saved(tmp_path / "run", state), "^text/", target)
    np.testing.assert_array_equal(loaded["text/embed/table"], state.params["text"]["embed"]["table"].astype("bfloat16"))
    assert loaded["text/embed/table"].sharding == flat(target)["text/embed/table"].sharding
    assert lines[2] == "  text/embed/table: float32 there, converted to bfloat16"


@pytest.mark.parametrize("on_mesh", [False, True])
def test_of_a_run_with_lora_the_merged_matrices(tmp_path, on_mesh):
    """And LoRA's leaves of this run are new, whatever that run has under their names."""
    c = config.LoRA(rank=2, alpha=6.0, pattern="attention/out/kernel$|mlp/up")
    rng = np.random.default_rng(3)
    theirs = lora.added(params_of(), c, 0)
    theirs |= {"lora": jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape), x.dtype), theirs["lora"])}
    folder = saved(tmp_path / "run", step.State(7, theirs, {}), lora=c)
    here = lora.added(params_of(), config.LoRA(rank=2, pattern="out/kernel$"), 1)
    if on_mesh:
        here = jax.device_put(here, sharding.params_sharding(here, sharding.make_mesh(config.Mesh())))
    loaded, lines = load(folder, params=here)
    wanted = flat(lora.merged(theirs, c))
    for path, x in loaded.items():
        if path.startswith("lora/"):
            np.testing.assert_array_equal(x, flat(here)[path], err_msg=path)
        else:
            np.testing.assert_array_equal(x, wanted[path], err_msg=path)
    out = "backbone/block_0/attention/out/kernel"
    a, b = (flat(theirs)[f"lora/{out}/{name}"] for name in "ab")
    np.testing.assert_allclose(loaded[out], flat(theirs)[out] + 3 * np.einsum("nhr,rd->nhd", a, b), atol=1e-5)
    assert "(step 7, weights with its LoRA of rank 2): 13 parameters" in lines[0] and "lora" not in lines[1]
    assert lines[2].endswith("not taken: nothing") and "newly initialised: lora/backbone/block_{i}" in lines[3]
    loaded, lines = load(folder, "^text/")
    assert "LoRA" not in lines[0] and "lora/" not in "".join(lines[1:])


def test_parts_that_the_run_had_not(tmp_path):
    """A text model, here with pictures and another fusion; and a model with pictures, here without."""
    text, both = tiny.make_config(depth=1, size=0), tiny.make_config("prefix_lm", depth=1, media=True, axes=3)
    state = step.State(7, tiny.make_model(text, seed=2)[1], {})
    folder = saved(tmp_path / "text", state, model=text)
    workdir.write(folder / "tokenizer.json", "mine")
    run = dataclasses.replace(BASE, model=both, init_from=config.InitFrom(run=str(folder)))
    partial.check(run, Words("mine"))
    loaded, lines = partial.load(tiny.make_model(both, seed=1)[1], run)
    first = flat(tiny.make_model(both, seed=1)[1])
    for path, x in flat(loaded).items():
        media = path.startswith(("image/", "video/", "audio/"))
        np.testing.assert_array_equal(x, first[path] if media else flat(state.params)[path], err_msg=path)
    assert lines[2] == "  another model.fusion.kind: 'concat' there, 'prefix_lm' here"
    assert lines[3].endswith("not taken: nothing") and len(lines) == 5
    new = lines[4].removeprefix("  newly initialised: ").split(", ")
    assert {name.split("/")[0] for name in new} == {"image", "video", "audio"} and "image/image/embed/kernel" in new

    folder = saved(tmp_path / "both", step.State(7, tiny.make_model(both, seed=2)[1], {}), model=both)
    workdir.write(folder / "tokenizer.json", "mine")
    run = dataclasses.replace(BASE, model=text, init_from=config.InitFrom(run=str(folder)))
    partial.check(run, Words("mine"))
    _, lines = partial.load(tiny.make_model(text, seed=1)[1], run)
    skipped = lines[3].removeprefix("  skipped, in the folder and not taken: ").split(", ")
    assert {name.split("/")[0] for name in skipped} == {"image", "video", "audio"} and lines[4].endswith(": nothing")


@pytest.mark.parametrize("pattern, changes, message", [
    ("", {"hidden": 48}, r"backbone/block_0/mlp/down/kernel is \(32, 16\) float32 there and \(48, 16\) float32 in this "
                         "config.*run_parameters"),
    ("^nothing$", {}, r"run_parameters='\^nothing\$' matches no parameter that both init_from.run=.* have; there are"),
    ("(", {}, r"run_parameters='\(' is no regular expression: missing \)"),
])  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, pattern, changes, message):
    folder = saved(tmp_path / "run", noisy(7))
    with pytest.raises(config.InputError, match=message):
        load(folder, pattern, params_of(**changes))


def test_the_pattern_that_the_message_names_helps(tmp_path):
    folder, params = saved(tmp_path / "run", noisy(7)), params_of(hidden=48)
    with pytest.raises(config.InputError) as raised:
        load(folder, "", params)
    pattern = str(raised.value).rpartition("such as ")[2].strip("'")
    with pytest.raises(config.InputError, match="parameter backbone/block_0/mlp/up/kernel is"):
        load(folder, pattern, params)


@pytest.mark.parametrize("made, message", [
    ([], "holds no run: config.json is missing"), (["config.json"], "init_from.run=.*/run has no checkpoint yet"),
])  # fmt: skip
def test_a_folder_without_a_checkpoint(tmp_path, made, message):
    for name in made:
        workdir.write(tmp_path / "run" / name, config.to_json(BASE))
    with pytest.raises(config.InputError, match=message):
        load(tmp_path / "run")


def test_another_model_altogether(tmp_path):
    folder = saved(tmp_path / "run", step.State(3, {"text": {"other": jnp.zeros(3)}}, {}))
    with pytest.raises(config.InputError, match="none of its parameters is in this model; .* for example, text/other"):
        load(folder)


class Words:
    """A tokenizer, as far as `check` asks it."""

    def __init__(self, text):
        self._text = text

    def to_json(self):
        return self._text


def check(folder, pattern="", tokenizer="mine", **changes):
    model = dataclasses.replace(BASE.model, **changes)
    init = config.InitFrom(run=str(folder), run_parameters=pattern)
    partial.check(dataclasses.replace(BASE, model=model, init_from=init), Words(tokenizer))


def test_weights_that_would_mean_something_else_are_refused(tmp_path):
    folder = saved(tmp_path, noisy(step=1))
    (folder / "tokenizer.json").write_text("mine")
    check(folder)
    deeper = dataclasses.replace(BASE.model.backbone, depth=3)
    check(folder, context=99, fusion=config.Fusion("prefix_lm"), backbone=deeper)
    relu = dataclasses.replace(BASE.model.backbone, activation="relu")
    with pytest.raises(config.InputError, match="has model.backbone.activation='gelu_tanh', this config 'relu'"):
        check(folder, backbone=relu)
    with pytest.raises(config.InputError, match="has model.embed_scale=1.0, this config 2.0"):
        check(folder, "^text/", embed_scale=2.0)
    picture = dataclasses.replace(BASE.model.image, std=(1.0, 1.0, 1.0))
    with pytest.raises(config.InputError, match="has model.image.std="):
        check(folder, image=picture)
    check(folder, "^backbone/", image=picture)  # no patch is taken
    with pytest.raises(config.InputError, match="has model.axes=1, this config 3"):
        check(folder, axes=3, backbone=dataclasses.replace(BASE.model.backbone, head_dim=8))
    check(folder, "^(text|backbone)/", axes=3)
    check(folder, "^image/", backbone=relu)
    with pytest.raises(config.InputError, match="has another tokenizer: set data.tokenizer="):
        check(folder, tokenizer="other")
    check(folder, "^(?!text/embed|head)", tokenizer="other")


def test_leaves_of_lora_are_no_part_that_is_taken(tmp_path):
    """A pattern that finds lora/image/..., too, takes pictures' parameters alone: the backbone may be another."""
    c = config.LoRA(rank=2, pattern="^image/")
    check(saved(tmp_path, step.State(1, lora.added(params_of(), c, 0), {}), lora=c), "image/",
          backbone=dataclasses.replace(BASE.model.backbone, activation="relu"))  # fmt: skip


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(config.InputError, match="no checkpoint yet"):
        check(saved(tmp_path))
