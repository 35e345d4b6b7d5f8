"""Serve a trained model over HTTP, by OpenAI's endpoints (docs/serve.md).

python -m gpt4v_jax.serve --workdir runs/digits_world
python -m gpt4v_jax.serve --workdir runs/digits_world --host 0.0.0.0 --api_keys keys.txt
"""

import ipaddress
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path

from absl import flags

from gpt4v_jax import command, config
from gpt4v_jax.generate import weights
from gpt4v_jax.interop.folder import trim
from gpt4v_jax.serve import api, guards, protocol
from gpt4v_jax.serve import moderation as moderation_lib
from gpt4v_jax.serve.engine import Engine
from gpt4v_jax.serve.server import Settings
from gpt4v_jax.training import workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of a trained run", allow_override=True)
_WEIGHTS = flags.DEFINE_enum("weights", "float32", weights.KINDS, "int8: a quarter of the memory; w8a8: "
                             "as little, and faster, but answers differ more (docs/generate.md)",
                             allow_override=True)  # fmt: skip
_STEP = flags.DEFINE_integer("step", None, "which checkpoint; otherwise the best", allow_override=True)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "the address to listen at; 0.0.0.0: all of this machine's")
_PORT = flags.DEFINE_integer("port", 8000, "0: a free one")
_NAME = flags.DEFINE_string("name", None, "of the model; otherwise the folder's name")
_SLOTS = flags.DEFINE_integer("slots", 8, "requests that are decoded at a time")
_QUEUED = flags.DEFINE_integer("queued", 64, "requests that may wait")
_PREFIX_BYTES = flags.DEFINE_integer("prefix_bytes", 512 << 20, "of memory for what prompts begin with, so that it is "
                                     "read once; 0: nothing is remembered")  # fmt: skip
_KEYS = flags.DEFINE_string("api_keys", None, "a file of keys, one a line, or a name and a key; otherwise those in the "
                            "environment's GPT4V_API_KEYS, separated by commas. None: everybody may ask")  # fmt: skip
_SECONDS = flags.DEFINE_float("seconds", 300.0, "a request is cut when it has taken so long")
_MAX_BODY = flags.DEFINE_integer("max_body", 25_000_000, "bytes of a request's body")
_MAX_MEDIA = flags.DEFINE_integer("max_media", 16, "media of a request")
_CONNECTIONS = flags.DEFINE_integer("connections", 256, "requests at a time; twice as many connections may be open")
_MODERATION = flags.DEFINE_string("moderation", None, "a file that says what requests and answers may not say "
                                  "(docs/moderation.md)")  # fmt: skip
_ALLOW_HOSTS = flags.DEFINE_multi_string("allow_hosts", [], "a host from which media may be fetched by https; may be "
                                         "given several times. None: nothing is fetched")  # fmt: skip
_TRANSCRIBE = flags.DEFINE_string("transcribe", "what is said?", "what /v1/audio/transcriptions asks of a sound")
_WARM = flags.DEFINE_bool("warm", True, "compile before listening what texts will need; otherwise the first ones wait")
LEAST_KEY = 16  # characters: shorter ones are guessed


def _give_back() -> None:
    """Returns freed memory to the system, now and then: much of compiling, and some of every large body."""
    while True:
        trim()
        time.sleep(10)


def main() -> None:
    config.at_least(1, slots=_SLOTS.value, queued=_QUEUED.value, max_body=_MAX_BODY.value,
                    connections=_CONNECTIONS.value)  # fmt: skip
    config.at_least(0, max_media=_MAX_MEDIA.value, prefix_bytes=_PREFIX_BYTES.value)
    if not 0 <= _PORT.value < 2**16:
        raise config.InputError(f"--port={_PORT.value} must be from 0 to {2**16 - 1}")
    if not 0 < _SECONDS.value < 1e9:
        raise config.InputError(f"--seconds={_SECONDS.value} must be above 0, and finite")
    folder = Path(_WORKDIR.value)
    keys = read_keys(_KEYS.value, os.environ.get("GPT4V_API_KEYS", ""))
    moderation = moderation_lib.load(Path(_MODERATION.value)) if _MODERATION.value is not None else None
    guard = guards.Guard(guards.Limits(tuple(_ALLOW_HOSTS.value)))
    trained = weights.turned(workdir.restore(folder, _STEP.value), _WEIGHTS.value)
    settings = Settings(
        _NAME.value or folder.resolve().name, guard, moderation, keys=keys, seconds=_SECONDS.value,
        max_body=_MAX_BODY.value, max_media=_MAX_MEDIA.value, queued=_QUEUED.value, connections=_CONNECTIONS.value,
        transcribe=_TRANSCRIBE.value,
    )  # fmt: skip
    listening = listen(_HOST.value, _PORT.value)  # before anything is compiled: a port that is taken is said at once
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for name in ("jax", "absl", "uvicorn.error", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    engine = Engine(trained, _SLOTS.value, _QUEUED.value, _PREFIX_BYTES.value)
    for what in engine.warm() if _WARM.value else ():
        print(f"compiles {what}", flush=True)
    threading.Thread(target=_give_back, name="memory", daemon=True).start()
    host, port = listening.getsockname()[:2]
    reads = ", ".join(["text", *(name for name in ("image", "video", "audio") if trained.layout.reads(name))])
    print(f"{settings.name}: step {trained.step}, {reads}; http://{f'[{host}]' if ':' in host else host}:{port}/v1",
          flush=True)  # fmt: skip
    if not keys and not ipaddress.ip_address(host).is_loopback:
        print(f"warning: --host={_HOST.value} is open to other machines and there are no keys: everybody who reaches "
              "it may ask; give --api_keys", flush=True)  # fmt: skip
    try:
        app = api.create(trained, engine, settings)
        protocol.HttpServer(app, host, port, 2 * settings.connections).run([listening])
    finally:
        engine.close(2.0)


def read_keys(path: str | None, environment: str) -> tuple[tuple[str, str], ...]:
    """-> (whose it is, the key) of a file's lines, "KEY" or "NAME KEY", or of the environment's, by commas."""
    lines = environment.split(",")
    if path is not None:
        try:
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise config.InputError(f"--api_keys={path} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        if len(parts) > 2 or len(parts[-1]) < LEAST_KEY:
            raise config.InputError(f"key {number} must be 'KEY' or 'NAME KEY', with {LEAST_KEY} characters or more")
        found.append((parts[0] if len(parts) == 2 else f"key {number}", parts[-1]))
    if path is not None and not found:
        raise config.InputError(f"--api_keys={path} has no key: write one a line")
    return tuple(found)


def listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol_, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol_)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise config.InputError(f"--host={host} --port={port} cannot be listened at: {error.strerror}") from error
    return made


if __name__ == "__main__":
    command.run(main, required=("workdir",))
    # A thread inside a compiled program cannot be stopped, and the interpreter would wait for it or die of it.
    sys.stdout.flush()
    os._exit(0)
