"""What was written is what is there: every flip, cut and loss is found and named; sha256sum agrees."""

import contextlib
import os
import pathlib
import random
import shutil
import subprocess

import pytest

from gpt4v_jax.training import checksums

LAST = "z/last.json"
FILES = {"a": b"first", "params/d/0": bytes(range(256)) * 40, "params/empty": b"", "a b": b"a space", LAST: b"{}"}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        path = tmp_path / "step" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    checksums.write(tmp_path / "step", LAST)
    return tmp_path / "step"


def test_what_was_written_is_whole(folder):
    assert checksums.damage(folder, LAST) == ""
    lines = (folder / checksums.NAME).read_text().splitlines()
    assert sorted(line[66:] for line in lines) == sorted(FILES) and lines[-1].endswith(f"  {LAST}")


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum here")
def test_sha256sum_reads_the_list(folder):
    command = ["sha256sum", "--check", "--strict", checksums.NAME]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == len(FILES), done
    (folder / "a").write_bytes(b"firsT")
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 1


def test_single_bits(folder):
    """Of the list itself, whose every character counts, and of each file."""
    rng = random.Random(0)
    for name in (checksums.NAME, *FILES):
        path, content = folder / name, (folder / name).read_bytes()
        bits = range(8 * len(content))
        for bit in rng.sample(bits, min(len(bits), 400 if name == checksums.NAME else 8)):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            wrong = checksums.damage(folder, LAST)
            assert wrong, f"bit {bit} of {name}"
            assert name == checksums.NAME or wrong == f"{name}: its content is not what was written (sha256 differs)"
        path.write_bytes(content)
    assert checksums.damage(folder, LAST) == ""


def test_a_list_cut_short_anywhere(folder):
    path = folder / checksums.NAME
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert checksums.damage(folder, LAST) == f"{checksums.NAME}: is not a whole list of checksums", length


@pytest.mark.parametrize("name", FILES)
def test_a_deleted_and_a_truncated_file(name, folder):
    content = (folder / name).read_bytes()
    if content:
        (folder / name).write_bytes(content[:-1])
        assert checksums.damage(folder, LAST).startswith(f"{name}: its content")
    (folder / name).unlink()
    assert checksums.damage(folder, LAST) == f"{name}: is missing"


def test_no_list_and_what_is_not_listed(folder):
    (folder / ".DS_Store").write_text("none of ours")
    assert checksums.damage(folder, LAST) == ""
    (folder / checksums.NAME).unlink()
    assert checksums.damage(folder, LAST) == f"{checksums.NAME}: is missing"


def test_a_folder_in_place_of_a_file(folder):
    (folder / "a").unlink()
    (folder / "a").mkdir()
    assert checksums.damage(folder, LAST) == "a: cannot be read (Is a directory)"


def test_one_name_alone(folder):
    (folder / "a").write_text("other")
    assert checksums.damage(folder, LAST, [LAST]) == "" and checksums.damage(folder, LAST, ["a"])
    assert checksums.damage(folder, LAST, ["unknown"]).startswith("unknown: is missing")


def test_a_file_that_is_added(folder):
    """It is listed, the list ends as before; what killed us in the middle left a whole folder behind."""

    class Killed(Exception):
        pass

    def rename(path, to):
        if not left:
            raise Killed
        left.pop()
        return real(path, to)

    real, left = pathlib.Path.rename, []
    for renames, old in ((2, False), (3, True)):  # a new file, and one anew
        for killed_at in range(renames + 1):
            for path in [*folder.glob("metrics.json*"), *folder.glob("*.new")]:
                path.unlink(missing_ok=True)
            checksums.write(folder, LAST)
            if old:
                checksums.add(folder, "metrics.json", "old")
            left[:] = [None] * killed_at
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pathlib.Path, "rename", rename)
                with contextlib.nullcontext() if killed_at == renames else pytest.raises(Killed):
                    checksums.add(folder, "metrics.json", "new")
            assert checksums.damage(folder, LAST) == "", killed_at
        assert checksums.damage(folder, LAST, ["metrics.json"]) == ""
        assert (folder / "metrics.json").read_text() == "new"
    (folder / "metrics.json").write_text("another")
    assert checksums.damage(folder, LAST).startswith("metrics.json: its content")


def test_all_is_on_the_disk_before_it_returns(tmp_path, monkeypatch):
    """Every file and every folder is synced, the list included."""
    synced, real = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.add(os.fstat(handle).st_ino), real(handle)))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "file").write_text("x")
    checksums.write(tmp_path, "d/file")
    paths = [tmp_path, *tmp_path.rglob("*")]
    assert len(paths) == 4 and synced == {path.stat().st_ino for path in paths}
