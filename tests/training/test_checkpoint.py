"""Checkpoints: bit-equal on any mesh, damage found and passed over, kept as asked, nothing lost to a kill or a disk."""

import functools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import config, sharding
from gpt4v_jax.training import checkpoint, checksums, leaves, optim
from gpt4v_jax.training import step as step_lib
from tests import tiny

ROOT = Path(__file__).parent.parent.parent
METRIC = "questions/accuracy"


@functools.cache
def initial(name="adamw", ema=False, seed=0, **changes):
    model = tiny.make_module(tiny.make_config(**{"depth": 1} | changes))
    tx = optim.make(config.Optim(name=name), 10, step_lib.abstract_params(model))
    return step_lib.init_state(model, tx, seed, sharding.make_mesh(config.Mesh()), ema)


def state_of(step=0, **changes):
    """A state of its own: to restore into one is to give it up."""
    state = jax.tree.map(jnp.copy, initial(**changes))
    return state.replace(step=jax.device_put(np.int32(step), state.step.sharding))


def noisy(step, seed=0, **changes):
    """A state in which no leaf equals its initial value, or another one's."""
    rng = np.random.default_rng(seed)
    state = state_of(step, **changes)
    values = jax.tree.map(
        lambda x: jax.device_put((rng.normal(size=x.shape) * 99).astype(x.dtype), x.sharding), state
    )
    return values.replace(step=state.step)


def small(step, value=0.0):
    """The smallest state, for what does not depend on what is in it."""
    params = {"text": {"embed": {"table": jnp.full((3, 4), value)}}}
    return step_lib.State(jnp.int32(step), params, {"count": jnp.int32(step)})


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


def saved(folder, *states, **options):
    checkpoints = checkpoint.Checkpoints(folder, **options)
    for state in states:
        checkpoints.save(state)
    checkpoints.close()
    return folder / "checkpoints"


def contents(folder):
    """Every path below with all that a reader might change of it."""
    return {p: (p.stat().st_mtime_ns, p.stat().st_ino, p.is_file() and p.read_bytes()) for p in folder.rglob("*")}


# ---- what was saved comes back


@pytest.mark.parametrize("name, ema", [("adamw", True), ("muon", False)])
def test_restore_is_bit_equal(tmp_path, name, ema):
    state = noisy(7, name=name, ema=ema)
    saved(tmp_path, state)
    said = []
    reader = checkpoint.Checkpoints(tmp_path, say=said.append)
    assert reader.latest() == reader.best() == 7
    fresh = state_of(name=name, ema=ema, seed=1)
    places = jax.tree.map(lambda x: x.sharding, fresh)
    restored = reader.restore(fresh, 7)
    equal(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state) and not said
    assert jax.tree.map(lambda x: x.sharding, restored) == places
    assert all(x.is_deleted() for x in jax.tree.leaves(fresh)), "the memory of two states was held"
    abstract, mesh = jax.eval_shape(lambda: state.params), sharding.make_mesh(config.Mesh())
    equal(reader.restore_params(abstract, mesh, 7), state.ema if ema else state.params)


def test_the_state_may_be_given_away_at_once(tmp_path):
    """The next step writes over its memory while the file is being written."""
    values = np.random.default_rng(0).normal(size=(512, 1024)).astype(np.float32)
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    state = small(1).replace(params={"text": {"embed": {"table": jnp.asarray(values)}}})
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(state)
    state = overwrite(state)
    checkpoints.close()
    restored = checkpoint.Checkpoints(tmp_path).restore(state, 1)
    np.testing.assert_array_equal(restored.params["text"]["embed"]["table"], values)
    assert int(restored.opt_state["count"]) == 1


def test_a_state_of_parameters_alone(tmp_path):
    """As an imported model's is: its step is a number, and it has no optimizer."""
    state = step_lib.State(0, initial().params, {})
    folder = saved(tmp_path, state)
    assert {path.name for path in folder.glob("0/*/")} == {"params"}
    reader = checkpoint.Checkpoints(tmp_path, read_only=True)
    mesh = sharding.make_mesh(config.Mesh())
    equal(reader.restore_params(jax.eval_shape(lambda: state.params), mesh, reader.best()), state.params)
    with pytest.raises(config.InputError, match="checkpoints/0 holds a model without the state of an optimizer: .*run"):
        reader.restore(state_of(), 0)


def test_parameters_keep_the_dtype_in_which_they_were_saved(tmp_path):
    state = noisy(1)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
    saved(tmp_path, state.replace(params=half))
    reader = checkpoint.Checkpoints(tmp_path, read_only=True)
    equal(reader.restore_params(jax.eval_shape(lambda: state.params), sharding.make_mesh(config.Mesh()), 1), half)


def test_another_dtype_is_converted_and_said(tmp_path):
    state = noisy(1)
    cast = functools.partial(jax.tree.map, lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x)
    saved(tmp_path, state)
    said = []
    target = state_of()
    target = target.replace(opt_state=cast(target.opt_state))
    restored = checkpoint.Checkpoints(tmp_path, say=said.append).restore(target, 1)
    equal(restored, state.replace(opt_state=cast(state.opt_state)))
    count = sum(x.dtype == jnp.float32 for x in jax.tree.leaves(state.opt_state))
    line, = said
    assert re.search(rf"checkpoints/1: optimizer: \S+ and {count - 1} more: float32 there, converted to bfloat16", line)


# ---- what does not fit is named, with both sides


@pytest.mark.parametrize("changes, first, there, here", [
    ({"hidden": 48}, "backbone/block_0/mlp/down/kernel", r"\(32, 16\)", r"\(48, 16\)"),
    ({"depth": 2}, "backbone/block_1/attention/key/kernel", "absent", r"\(16, 2, 8\)"),
    ({"tied": False}, "head/kernel", "absent", r"\(16, 32\)"),
])  # fmt: skip
def test_another_model_is_refused(tmp_path, changes, first, there, here):
    saved(tmp_path / "a", state_of(3))
    saved(tmp_path / "b", state_of(3, **changes))
    mesh = sharding.make_mesh(config.Mesh())
    for folder, target, sides in [("a", state_of(**changes), (there, here)), ("b", state_of(), (here, there))]:
        reader = checkpoint.Checkpoints(tmp_path / folder)
        message = f"{folder}/checkpoints/3 holds another model: parameter {first} is {sides[0]} there and {sides[1]} in"
        with pytest.raises(config.InputError, match=message):
            reader.restore(target, 3)
        assert not target.step.is_deleted(), "what could not be restored into is still there"
        with pytest.raises(config.InputError, match=message):
            reader.restore_params(jax.eval_shape(lambda target=target: target.params), mesh, 3)


@pytest.mark.parametrize("change, message", [
    (lambda s: {"opt_state": {"n": s.params}}, r"another optimizer's state: 1/0/count is \(\) there and absent in"),
    (lambda s: {"opt_state": jax.tree.map(lambda x: x[None], s.opt_state)},
     r"another optimizer's state: 1/0/count is \(\) there and \(1,\) in"),
    (lambda s: {"opt_state": jax.tree.map(lambda x: x.astype("float32"), s.opt_state)},
     r"another optimizer's state: 1/0/count is \(\) int32 there and \(\) float32 in this config; use its config.optim"),
    (lambda s: {"opt_state": {}}, "holds the state of an optimizer, and this run has none"),
    (lambda s: {"watch": None}, "holds the memory of a guard, and this run has none"),
    (lambda s: {"watch": s.watch.replace(seen=jnp.zeros(2))}, r"guard's memory: seen is \(\) there and \(2,\) in"),
    (lambda s: {"ema": None}, "holds a moving average of the weights, and config.optim.ema=0 keeps none"),
    (lambda s: {"ema": {"text": s.ema["text"]}},
     r"another moving average of the weights: parameter backbone/block_0/attention/key/kernel is \(16, 2, 8\) there"),
])  # fmt: skip
def test_another_optimizer_guard_or_average_is_refused(tmp_path, change, message):
    saved(tmp_path, state_of(3, ema=True))
    state = state_of(ema=True)
    with pytest.raises(config.InputError, match=f"checkpoints/3 holds .*{message}|checkpoints/3 {message}"):
        checkpoint.Checkpoints(tmp_path).restore(state.replace(**change(state)), 3)


@pytest.mark.parametrize("item, message", [
    ("opt_state", "checkpoints/3 holds a model without the state of an optimizer"),
    ("watch", "checkpoints/3 holds no memory of the guard"),
    ("ema", "checkpoints/3 holds no moving average of the weights, and config.optim.ema asks for one: set it to 0, or"),
])  # fmt: skip
def test_an_item_that_was_not_saved_is_named(tmp_path, item, message):
    saved(tmp_path, state_of(3, ema=True).replace(**{item: None}))
    with pytest.raises(config.InputError, match=message):
        checkpoint.Checkpoints(tmp_path).restore(state_of(ema=True), 3)


def test_a_step_that_is_not_there(tmp_path):
    saved(tmp_path, small(3), small(4))
    with pytest.raises(config.InputError, match="checkpoints has no step 5; it has 3, 4"):
        checkpoint.Checkpoints(tmp_path).restore(small(0), 5)


# ---- damage


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the whole steps 1 and 2, each evaluated; not to be changed."""
    folder = tmp_path_factory.mktemp("two")
    checkpoints = checkpoint.Checkpoints(folder, METRIC)
    for step in (1, 2):
        checkpoints.save(noisy(step, seed=step, ema=True))
        checkpoints.record(step, {METRIC: step / 10})
    checkpoints.close()
    return folder


@pytest.fixture
def copy(two, tmp_path):
    return Path(shutil.copytree(two, tmp_path / "run"))


def passed_over(folder, path, what, read_only=True, good=1):
    """The step that is used instead, and the line that names `path`."""
    said = []
    reader = checkpoint.Checkpoints(folder, METRIC, read_only=read_only, say=said.append)
    assert reader.latest() == good
    line = said[-1]
    assert len(said) == 1 and re.fullmatch(rf"{re.escape(str(path))}: ({what}): going on from step {good}", line), said
    return reader


def test_sixteen_flipped_bits_of_sixteen_are_found(copy):
    rng = random.Random(0)
    files = sorted(path for path in (copy / "checkpoints/2").rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    chosen = [*files[:3], *rng.choices(files, sizes, k=12), copy / "checkpoints/2" / checksums.NAME]
    for path in chosen:
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        if path.name == checksums.NAME:  # then it is that line, or the file that the line is about
            said = []
            reader = checkpoint.Checkpoints(copy, METRIC, read_only=True, say=said.append)
            assert reader.latest() == 1 and len(said) == 1
        else:
            reader = passed_over(copy, path, r"its content is not what was written \(sha256 differs\)")
        assert reader.best() == 1
        with pytest.raises(config.InputError, match="checkpoints/2/.*; it has 1, 2"):
            reader.restore(state_of(ema=True), 2)
        path.write_bytes(content)
    reader = checkpoint.Checkpoints(copy, read_only=True)
    assert reader.latest() == 2
    equal(reader.restore(state_of(ema=True), 2), noisy(2, seed=2, ema=True))
    assert len(chosen) == 16


@pytest.mark.parametrize("name", ["params/manifest.ocdbt", "optimizer/_METADATA", "manifest.json", checksums.NAME])
def test_a_deleted_or_a_truncated_file(copy, name):
    path = copy / "checkpoints/2" / name
    path.write_bytes(path.read_bytes()[:-7])
    passed_over(copy, path, "its content.*|is not a whole list of checksums")
    path.unlink()
    passed_over(copy, path, "is missing")


def test_a_step_of_an_older_version_is_called_that(copy):
    path = copy / "checkpoints/2"
    (path / checksums.NAME).unlink()
    (path / "position").mkdir()
    passed_over(copy, path, "has no checksums; an older version of gpt4v_jax wrote it, and can read it")


def test_an_empty_folder_named_like_a_step(copy):
    path = copy / "checkpoints/300"
    path.mkdir()
    passed_over(copy, path, "is an empty folder", read_only=False, good=2)
    alone = copy.parent / "alone"
    assert not checkpoint.exists(alone)
    (alone / "checkpoints/300").mkdir(parents=True)
    assert not checkpoint.exists(alone) and checkpoint.exists(copy)
    said = []
    checkpoints = checkpoint.Checkpoints(alone, say=said.append)
    assert checkpoints.latest() is None and checkpoints.best() is None and "300: is an empty folder" in said[0]
    checkpoints.save(small(300))
    checkpoints.close()
    assert checkpoints.latest() == 300


def test_a_step_under_another_number(copy):
    (copy / "checkpoints/2").rename(copy / "checkpoints/20")
    passed_over(copy, copy / "checkpoints/20/manifest.json", "is of step 2")


def test_a_damaged_step_is_moved_aside_and_saved_again(copy):
    (copy / "checkpoints/2/manifest.json").unlink()
    writer = passed_over(copy, copy / "checkpoints/2/manifest.json", "is missing", read_only=False)
    assert writer.steps() == [1] and (copy / "checkpoints/2.damaged/params").is_dir()
    state = writer.restore(state_of(ema=True), 1)
    writer.save(state.replace(step=state.step + 1))
    writer.close()
    assert writer.latest() == 2 and writer.steps() == [1, 2]
    equal(writer.restore(state_of(ema=True), 2).params, noisy(1, seed=1, ema=True).params)


@pytest.mark.parametrize("read_only", [True, False])
def test_without_a_whole_step_nothing_starts_anew(copy, read_only):
    for step in (1, 2):
        (copy / f"checkpoints/{step}/manifest.json").unlink()
    before, said = contents(copy), []
    assert checkpoint.exists(copy)
    for _ in range(2):
        reader = checkpoint.Checkpoints(copy, METRIC, read_only=read_only, say=said.append)
        for ask in (reader.latest, reader.best):
            with pytest.raises(config.InputError, match="every checkpoint in .* is damaged: put a copy"):
                ask()
    assert len(said) == 8 and all("manifest.json: is missing: no other step is left" in line for line in said)
    after = contents(copy)
    assert {path: x[1:] for path, x in before.items()} == {path: x[1:] for path, x in after.items()}


def test_leftovers_are_removed_by_a_writer_alone(copy):
    folder = copy / "checkpoints"
    left = ["3.unfinished", "3.unfinished.orbax-checkpoint-tmp", "1.deleted"]
    for name in left:
        shutil.copytree(folder / "2", folder / name)
    before, said = contents(copy), []
    reader = checkpoint.Checkpoints(copy, read_only=True, say=said.append)
    assert reader.latest() == 2 and contents(copy) == before and not said
    assert checkpoint.Checkpoints(copy, say=said.append).latest() == 2
    assert len(said) == 1 and all(name in said[0] for name in left)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_reading_writes_nothing(copy, tmp_path):
    before = contents(copy)
    reader = checkpoint.Checkpoints(copy, METRIC, read_only=True)
    params, mesh = jax.eval_shape(lambda: initial().params), sharding.make_mesh(config.Mesh())
    reader.restore_params(params, mesh, reader.best())
    reader.restore(state_of(ema=True), reader.latest())
    reader.close()
    assert contents(copy) == before
    reader = checkpoint.Checkpoints(tmp_path / "none", read_only=True)
    assert reader.latest() is None and reader.best() is None and not (tmp_path / "none").exists()


# ---- what is kept


def kept(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("options, expected", [
    ({}, [4, 5]), ({"keep_last": 1}, [5]), ({"keep_last": 3}, [3, 4, 5]), ({"keep_last": 9}, [1, 2, 3, 4, 5]),
    ({"keep_last": 1, "keep_every": 2}, [2, 4, 5]),
])  # fmt: skip
def test_the_newest_and_the_multiples_are_kept(tmp_path, options, expected):
    saved(tmp_path, *map(small, range(1, 6)), **options)
    assert kept(tmp_path) == expected


@pytest.mark.parametrize("mode, best", [("max", 2), ("min", 3)])
def test_the_best_is_kept_beside_the_newest(tmp_path, mode, best):
    checkpoints = checkpoint.Checkpoints(tmp_path, METRIC, mode, keep_last=1)
    for step, value in [(1, np.nan), (2, 0.9), (3, 0.1), (4, 0.6), (5, np.nan), (6, None)]:
        checkpoints.save(small(step))
        if value is not None:
            checkpoints.record(step, {METRIC: value, "other": 0.0})
    checkpoints.close()
    reader = checkpoint.Checkpoints(tmp_path, METRIC, mode, read_only=True)
    assert (reader.best(), reader.latest()) == (best, 6) and kept(tmp_path) == [best, 6]
    assert checkpoint.Checkpoints(tmp_path, read_only=True).best() == 6, "no metric is named"
    assert checkpoint.Checkpoints(tmp_path, "other/one", read_only=True).best() == 6, "it was never measured"


def test_a_step_is_recorded_twice(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, METRIC)
    checkpoints.save(small(1))
    checkpoints.record(1, {METRIC: 0.1})
    checkpoints.save(small(2))
    checkpoints.record(2, {METRIC: 0.2})
    checkpoints.record(1, {METRIC: 0.3})
    assert checkpoints.best() == 1 and checkpoints.latest() == 2
    checkpoints.close()


@pytest.mark.parametrize("step, best", [(1, 2), (2, 1)])
def test_a_damaged_metric_is_no_metric(copy, step, best):
    path, said = copy / f"checkpoints/{step}/metrics.json", []
    path.write_text(path.read_text().replace(f"0.{step}", "-0.5"))
    assert checkpoint.Checkpoints(copy, METRIC, read_only=True, say=said.append).best() == best
    assert len(said) == 1 and said[0].startswith(f"{path}: its content is not what was written")
    path.unlink()
    assert checkpoint.Checkpoints(copy, METRIC, read_only=True, say=said.append).best() == best
    assert said[1:] == [f"{path}: is missing: step {step} counts as not evaluated"]


def test_the_same_step_again_replaces_it(tmp_path):
    saved(tmp_path, small(1, 0.0), small(1, 5.0))
    assert kept(tmp_path) == [1]
    restored = checkpoint.Checkpoints(tmp_path).restore(small(0), 1)
    assert float(restored.params["text"]["embed"]["table"][0, 0]) == 5


# ---- disks


def test_a_full_disk(tmp_path):
    """Files may be 64 KB at most, in a process of its own: the error of a disk is the system's, not ours."""
    done = run_self("full_disk", tmp_path)
    assert done.returncode == 0, done.stderr
    error, there, after = json.loads(done.stdout)
    assert error == (
        f"the checkpoint of step 2 could not be written to {tmp_path}/checkpoints: {os.strerror(27)}; step 1 is there"
    )
    assert there == ["1"] and after == [1, 3], "nothing half-written is left, and when there is room the run goes on"
    assert "Traceback" not in done.stderr, done.stderr


def full_disk(folder):
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(small(1))
    checkpoints.wait()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(2**16,)).astype(np.float32))
    big = small(2).replace(params={"text": {"embed": {"table": noise}}})
    checkpoints.save(big)
    error = ""
    try:
        checkpoints.save(small(3))
    except config.InputError as raised:
        error = str(raised)
    there = sorted(path.name for path in checkpoints.folder.iterdir())
    checkpoints.restore(small(0), checkpoints.latest())
    checkpoints.save(small(3))
    checkpoints.close()
    print(json.dumps([error, there, checkpoints.steps()]))


@pytest.mark.parametrize("place", ["write", "rename"])
def test_an_error_while_finishing_is_raised_and_the_run_goes_on(tmp_path, monkeypatch, place):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(small(1))
    checkpoints.wait()

    def fails(*_, **__):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(checksums if place == "write" else Path, place, fails)
        checkpoints.save(small(2))
        with pytest.raises(config.InputError, match="step 2 could not .*: No space left on device; step 1 is there"):
            checkpoints.wait()
    assert kept(tmp_path) == [1] and checkpoints.latest() == 1
    checkpoints.wait()
    checkpoints.save(small(2, 3.0))
    checkpoints.close()
    assert checkpoints.latest() == 2 and float(jax.tree.leaves(checkpoints.restore(small(0), 2).params)[0][0, 0]) == 3


def test_a_mistake_of_ours_is_no_full_disk(tmp_path, monkeypatch):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    monkeypatch.setattr(checksums, "write", lambda *_, **__: 1 // 0)
    checkpoints.save(small(1))
    with pytest.raises(ZeroDivisionError):
        checkpoints.close()


def test_room_for_one_checkpoint(tmp_path, monkeypatch):
    said = []
    checkpoints = checkpoint.Checkpoints(tmp_path, say=said.append)
    state = state_of(ema=True)
    size = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state, state.watch, state.ema)))

    def with_free(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, free))
        checkpoints.check_room(state)

    with pytest.raises(config.InputError, match=f"{tmp_path}/checkpoints: its disk has .* MB free, a check.* MB"):
        with_free(size)
    assert not said
    with_free(size + 2 * 2**20)
    assert len(said) == 1 and "3 of them will lie there" in said[0]
    with_free(10**9)
    assert len(said) == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    """Before the first step. Root may write anywhere, so it is somebody else who tries."""
    if os.geteuid() == 0:
        os.chmod(tmp_path, 0o755)
        done = run_self("read_only_folder", tmp_path)
        assert done.stdout == f"{tmp_path}/checkpoints cannot be written: Permission denied", done
    (tmp_path / "file").write_text("")
    with pytest.raises(config.InputError, match="file/checkpoints cannot be written: Not a directory"):
        checkpoint.Checkpoints(tmp_path / "file")


def read_only_folder(folder):
    os.chmod(folder.parent, 0o755)
    os.chmod(folder.parent.parent, 0o755)
    os.seteuid(65534)
    try:
        checkpoint.Checkpoints(folder)
    except config.InputError as error:
        print(str(error).partition(";")[0], end="")


# ---- kill -9


KILLS = ["a part of the checksums", "before the rename", "while removing what is not kept"]


def test_killed_at_any_moment_the_run_resumes(tmp_path):
    """Three moments, in processes that run side by side. They die in step 2; what goes on is step 1 or 2, and whole."""
    runs = [start_self("killed", tmp_path / str(i), str(i)) for i in range(len(KILLS))]
    for i, process in enumerate(runs):
        process.communicate()
        assert process.returncode == 9, KILLS[i]
        folder = tmp_path / str(i)
        names = {path.name for path in (folder / "checkpoints").iterdir()}
        assert len(names) == 2, "something is left behind"
        said = []
        checkpoints = checkpoint.Checkpoints(folder, keep_last=1, say=said.append)
        last = 2 if i == 2 else 1
        assert checkpoints.latest() == last and len(said) == 1 and "left by a process that was stopped" in said[0]
        restored = checkpoints.restore(small(0), last)
        assert int(restored.opt_state["count"]) == last
        checkpoints.save(small(2))
        checkpoints.close()
        assert kept(folder) == [2], KILLS[i]


def killed(folder, moment):
    def die(*_, **__):
        os._exit(9)

    checkpoints = checkpoint.Checkpoints(folder, keep_last=1)
    checkpoints.save(small(1))
    checkpoints.wait()
    if moment == "0":
        checksums._write_list = lambda folder, listed: die((folder / checksums.NAME).write_text("0" * 64))
    elif moment == "1":
        Path.rename = lambda path, to: die() if path.name == "2.unfinished" else os.rename(path, to)
    else:
        shutil.rmtree = lambda path, *_, **__: die((path / "manifest.json").unlink()) if path.exists() else None
    checkpoints.save(small(2))
    checkpoints.close()


def test_killed_while_it_writes(tmp_path):
    """The signal comes when a save has just been started."""
    for kill_at in (2, 7):
        process = start_self("writes_on", tmp_path)
        for _ in range(kill_at):
            step = int(process.stdout.readline())
        process.kill()
        process.communicate()
        checkpoints = checkpoint.Checkpoints(tmp_path)
        latest = checkpoints.latest()
        assert latest >= step - 1, "a save begins when the one before it is done"
        assert int(checkpoints.restore(small(0), latest).opt_state["count"]) == latest


def writes_on(folder):
    checkpoints = checkpoint.Checkpoints(folder)
    start = checkpoints.latest() or 0
    for step in range(start + 1, start + 1000):
        checkpoints.save(small(step))
        print(step, flush=True)


# ---- other devices


def test_any_number_of_devices(tmp_path):
    """Saved on a mesh of 8 x 1, restored on 4 x 2 and on one device, all bits the same."""
    devices = {"JAX_NUM_CPU_DEVICES": "8"}
    done = run_self("other_devices", tmp_path, **devices)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8", "8", "1"]


def other_devices(folder):
    from gpt4v_jax.training.step import State, Watch

    def state_on(data, fsdp, devices):
        mesh = sharding.make_mesh(config.Mesh(data, fsdp, 1), devices)
        params = {"text": {"embed": {"table": jnp.arange(64.0).reshape(4, 16)}}}
        watch = Watch(jnp.float32(0.1), jnp.int32(2), jnp.int32(3), jnp.int32(4))
        state = State(jnp.int32(5), params, {"mu": jax.tree.map(lambda x: x / 3, params)}, watch, params)
        return jax.device_put(state, sharding.params_sharding(state, mesh)), mesh

    saved(folder, state_on(1, 8, jax.devices())[0])
    for data, fsdp, devices in [(2, 4, jax.devices()), (8, 1, jax.devices()), (1, 1, jax.devices()[:1])]:
        state, mesh = state_on(data, fsdp, devices)
        expected = jax.device_get(state)
        places = jax.tree.map(lambda x: x.sharding, state)
        reader = checkpoint.Checkpoints(folder)
        params = reader.restore_params(leaves.abstract(state.params), mesh, 5)
        equal(jax.device_get(params), expected.params)
        zeros = jax.device_put(jax.tree.map(np.zeros_like, expected), places)
        restored = reader.restore(zeros, reader.latest())
        equal(jax.device_get(restored), expected)
        assert jax.tree.map(lambda x: x.sharding, restored) == places
        print(len(restored.params["text"]["embed"]["table"].sharding.device_set))


# ---- many processes


def test_two_processes_agree(tmp_path):
    """The first one decides; what fails in it is raised in both, and both go on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    runs = [start_self("one_of_two", tmp_path, address, str(i)) for i in range(2)]
    out = [process.communicate() for process in runs]
    assert [process.returncode for process in runs] == [0, 0], out
    lines = [[line for line in text.splitlines() if not line.startswith("[Gloo]")] for text, _ in out]
    steps = ["found 3 2", "damaged 2", "equal", "kept 2 4"]
    assert [line for line in lines[0] if not line.startswith("error")] == steps
    assert [line for line in lines[1] if not line.startswith("error")] == steps
    errors = [[line for line in of if line.startswith("error")] for of in lines]
    assert "has no step 77; it has 2" in errors[0][0] and "No space left on device; step 2 is there" in errors[0][1]
    assert "the first process of the run stopped" in errors[1][0] and "another process of the run" in errors[1][1]
    assert out[0][1].count("going on from step 2") == 1 and "going on" not in out[1][1], "one of them says it"


def one_of_two(folder, address, index):
    jax.distributed.initialize(address, 2, int(index))
    mesh = sharding.make_mesh(config.Mesh(1, 2, 1, across="fsdp"))

    def state_of(step):
        values = jnp.arange(64, dtype=jnp.float32).reshape(4, 16) * step
        params = {"text": {"embed": {"table": np.asarray(values)}}}
        state = step_lib.State(np.int32(step), params, {"n": np.int32(step)})

        def put(x, place):
            return jax.make_array_from_callback(np.shape(x), place, lambda at: np.asarray(x)[at])

        return jax.tree.map(put, state, sharding.params_sharding(state, mesh))

    checkpoints = checkpoint.Checkpoints(folder, METRIC)
    checkpoints.check_room(state_of(0))
    for step in (1, 2, 3):
        checkpoints.save(state_of(step))
        if step == 2:
            checkpoints.record(step, {METRIC: 1.0})
    checkpoints.close()
    print("found", checkpoints.latest(), checkpoints.best())
    if index == "0":
        (folder / "checkpoints/3/manifest.json").unlink()
    checkpoints = checkpoint.Checkpoints(folder, METRIC)
    step = checkpoints.latest()
    print("damaged", step)
    restored = checkpoints.restore(state_of(0), step)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state_of(step)), strict=True):
        equal(a.addressable_shards[0].data, b.addressable_shards[0].data)
    print("equal")

    def fails(*_, **__):
        raise OSError(28, os.strerror(28))

    with pytest.MonkeyPatch.context() as patch:
        if index == "0":
            patch.setattr(checksums, "write", fails)
        checkpoints.save(state_of(4))
        for ask in (lambda: checkpoints.restore(state_of(0), 77), checkpoints.wait):
            try:
                ask()
            except config.InputError as error:
                print("error", error)
    checkpoints.save(state_of(4))
    checkpoints.close()
    print("kept", *checkpoints.steps())


def start_self(*arguments, **environment):
    """A function of this file in a process of its own."""
    command = [sys.executable, "-m", "tests.training.test_checkpoint", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)


def run_self(*arguments, **environment):
    process = start_self(*arguments, **environment)
    out, err = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
