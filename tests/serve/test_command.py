"""python -m gpt4v_jax.serve: its flags, before it listens."""

import importlib
import socket
from unittest import mock

import pytest
from absl.testing import flagsaver

from gpt4v_jax import command, config
from tests.serve import fake

serve = importlib.import_module("gpt4v_jax.serve.__main__")
LONG = "k" * 16


@pytest.mark.parametrize("text, found", [
    (LONG, (("key 1", LONG),)), (f"ada {LONG}\n\n# a comment\n{LONG}2\n", (("ada", LONG), ("key 4", LONG + "2"))),
])  # fmt: skip
def test_keys_of_a_file(tmp_path, text, found):
    (tmp_path / "keys").write_text(text)
    assert serve.read_keys(str(tmp_path / "keys"), "ignored,too") == found


def test_keys_of_the_environment():
    assert serve.read_keys(None, f"{LONG}, bob {LONG}3") == (("key 1", LONG), ("bob", LONG + "3"))
    assert serve.read_keys(None, "") == ()


@pytest.mark.parametrize("text, message", [
    ("short", "16 characters"), (f"a b {LONG}", "'NAME KEY'"), ("", "has no key"), ("# none", "has no key"),
])  # fmt: skip
def test_keys_that_are_none(tmp_path, text, message):
    """The message does not tell the key."""
    (tmp_path / "keys").write_text(text)
    with pytest.raises(config.InputError, match=message) as error:
        serve.read_keys(str(tmp_path / "keys"), "")
    assert LONG not in str(error.value) and "short" not in str(error.value).replace(str(tmp_path), "")
    with pytest.raises(config.InputError, match="cannot be read"):
        serve.read_keys(str(tmp_path / "other"), "")


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(config.InputError, match=f"--port={port} cannot be listened at"):
            serve.listen("127.0.0.1", port)
    with pytest.raises(config.InputError, match="--host=no.such.host.invalid"):
        serve.listen("no.such.host.invalid", 0)
    with serve.listen("127.0.0.1", 0) as made:
        assert made.getsockname()[1]


@pytest.mark.parametrize("args, message", [
    (["--slots=0"], "slots=0"), (["--port=70000"], "--port=70000"), (["--seconds=0"], "--seconds=0"),
    (["--prefix_bytes=-1"], "prefix_bytes=-1"), (["--max_media=-1"], "max_media=-1"),
    (["--max_body=0"], "max_body=0"), ([], "holds no run"),
    (["--api_keys=missing"], "--api_keys=missing"), (["--prot=1"], "prot"),
])  # fmt: skip
def test_bad_flags(capsys, monkeypatch, tmp_path, args, message):
    monkeypatch.setattr("sys.argv", ["serve", f"--workdir={tmp_path}", *args])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        command.run(serve.main, required=("workdir",))
    assert ended.value.code == 2
    assert message in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_the_engine_gets_its_flags(capsys, monkeypatch, tmp_path):
    def engine(trained, *given):
        raise config.InputError(f"asked for {given}")

    for name, instead in (("listen", mock.Mock()), ("logging", mock.Mock()), ("Engine", engine)):
        monkeypatch.setattr(serve, name, instead)
    monkeypatch.setattr(serve.workdir, "restore", lambda *_: fake.trained())
    given = ["--slots=3", "--queued=5", "--prefix_bytes=7"]
    monkeypatch.setattr("sys.argv", ["serve", f"--workdir={tmp_path}", *given])
    with flagsaver.flagsaver(), pytest.raises(SystemExit):
        command.run(serve.main, required=("workdir",))
    assert "asked for (3, 5, 7)" in capsys.readouterr().err
    serve.listen.assert_called_once_with("127.0.0.1", 8000)  # others come in where somebody says so alone
