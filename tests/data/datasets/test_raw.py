"""Raw files are found, unpacked and verified by what they hold; where that fails, the message says what to do."""

import gzip
import hashlib
import sys
import zipfile

import numpy as np
import pytest

from gpt4v_jax.config import InputError
from gpt4v_jax.data.datasets import fsdd, moving_digits, raw

SOURCE = "https://example.org/files/"


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_package_stands_for_its_content(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"text", 1))
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"text", 9, mtime=1))
    assert raw.read("set", "folder", dict.fromkeys(["a.gz", "b.gz"], sha(b"text")), str(tmp_path), SOURCE) == {
        "a.gz": b"text", "b.gz": b"text"}
    (tmp_path / "many").mkdir()
    for name, content in (("y", b"2"), ("x", b"1")):
        (tmp_path / "many" / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as packed:
        packed.mkdir("inner")
        packed.writestr("inner/y", b"2")
        packed.writestr("inner/x", b"1")
    listed = sha(f"{sha(b'1')}  x\n{sha(b'2')}  y\n".encode())  # as sha256sum prints it
    found = raw.read("set", "folder", {"many": listed, "many.zip": listed}, str(tmp_path), SOURCE)
    assert found["many"] == found["many.zip"] == {"x": b"1", "y": b"2"}
    (tmp_path / "many" / "z").touch()
    with pytest.raises(InputError, match="sha256"):
        raw.read("set", "folder", {"many": listed}, str(tmp_path), SOURCE)


@pytest.mark.parametrize("sub", ["", "img-set", "set"])
def test_the_folder_comes_first_and_then_the_download(sub, tmp_path):
    (tmp_path / "data" / sub).mkdir(parents=True)
    (tmp_path / "data" / sub / "one").write_bytes(b"1")
    (tmp_path / "fetched").write_bytes(b"2")
    asked = []
    wanted = {"one": sha(b"1"), "two": sha(b"2")}
    found = raw.read("set", "img-set", wanted, str(tmp_path / "data"), SOURCE,
                     lambda url: asked.append(url) or str(tmp_path / "fetched"))
    assert found == {"one": b"1", "two": b"2"} and asked == [SOURCE + "two"]


def test_what_is_missing_is_named_with_the_remedy(tmp_path):
    def download(url):
        raise ConnectionError

    for fetch in (None, download):
        with pytest.raises(InputError) as error:
            raw.read("set", "img-set", {"one": sha(b"1")}, str(tmp_path), SOURCE, fetch)
        message = str(error.value)
        assert ", ".join(str(tmp_path / sub) for sub in ("", "img-set", "set")) in message
        for part in ("one", "GPT4V_DATA_DIR", "--config.data.dir", SOURCE):
            assert part in message
    with pytest.raises(InputError, match="no folder, since none was given"):
        raw.read("set", "img-set", {"one": sha(b"1")}, "", SOURCE)


@pytest.mark.parametrize("content", [b"other", gzip.compress(b"text", mtime=0)[:10],  # its name is that of a test
                                     b"\x1f\x8b\x08" + b"\0" * 7 + b"\xff" * 9, b"PK\3\4 and no more"])  # fmt: skip
def test_a_wrong_or_broken_file_is_named(content, tmp_path):
    (tmp_path / "one").write_bytes(content)
    with pytest.raises(InputError, match=SOURCE) as error:
        raw.read("set", "img-set", {"one": sha(b"text")}, str(tmp_path), SOURCE)
    assert str(tmp_path / "one") in str(error.value)


@pytest.mark.parametrize(("name", "module"), [("fsdd", "soundfile"), ("moving_digits", "av")])
def test_a_package_that_is_not_there_is_named(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"pip install {module}"):
        if name == "fsdd":
            fsdd.string({("theo", 0, 0): b""}, np.random.default_rng(0))
        else:
            moving_digits.encode(np.zeros((1, 8, 8), np.uint8))
