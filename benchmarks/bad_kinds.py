"""Kinds of bad input, and the clients that send what is no single request; benchmarks.bad_input sends them all."""

import base64
import dataclasses
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

KEYS = {"good": "good" * 4, "bad": "bad!" * 4}
TOKENS = 64  # of a good answer
SECONDS = 300.0  # after which a client of ours gives up
BARS = {"times": 2.0, "mebibytes": 300, "slot_seconds": 2.0, "end_seconds": 10.0}


# ---- what is sent


def picture(side: int, mode: str = "RGB") -> bytes:
    from PIL import Image

    Image.new(mode, (side, side), "grey" if mode == "RGB" else 0).save(file := io.BytesIO(), "png", optimize=True)
    return file.getvalue()


def gif(frames: int) -> bytes:
    from PIL import Image

    shown = [Image.new("L", (8, 8), n * 37 % 256) for n in range(frames)]
    shown[0].save(file := io.BytesIO(), "gif", save_all=True, append_images=shown[1:])
    return file.getvalue()


def silence(hours: int) -> bytes:
    """-> FLAC, which holds silence in next to nothing."""
    import av
    import numpy as np

    with av.open(file := io.BytesIO(), "w", format="flac") as container:
        stream = container.add_stream("flac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), "s16", "mono")
        frame.rate = 8000
        for _ in range(hours * 3600 * 8000 // 4096):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def shown(*urls: str, kind: str = "image_url", text: str = "what is it?") -> dict:
    parts = [{"type": kind, kind: {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], "max_tokens": 8}


def chat(text="hi", **more) -> dict:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 8} | more


def schema(of) -> dict:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": of}})


def nested(depth: int) -> bytes:
    """-> the body of a chat: Python's own json cannot write it."""
    whole = json.dumps(schema("HERE")).encode()
    return whole.replace(b'"HERE"', b'{"type": "object", "properties": {"a": ' * depth + b"{}" + b"}}" * depth)


ADDRESSES = [
    "127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0", "[::1]",
    "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "169.254.169.254", "10.0.0.1", "192.168.0.1", "172.16.0.1", "[fe80::1]",
    "[fd00::1]", "user@localhost", "localhost.", "ⓛocalhost",
]  # fmt: skip

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of bad input: its requests, or what else to do, and the statuses that are right."""

    name: str
    bodies: tuple = ()  # JSON, or bytes as they are
    statuses: tuple[int, ...] = (400,)
    path: str = CHAT
    headers: dict = dataclasses.field(default_factory=dict)
    act: Callable | None = None  # act(address) -> (is it right?, statuses, what is to be said), in place of bodies


def kinds(victim: int, folder: Path) -> list[Kind]:
    """victim: a port at which somebody counts who comes; folder: of a file that nobody may read."""
    (folder / "secret.png").write_bytes(picture(8))
    (folder / "link.png").symlink_to(folder / "secret.png")
    png, bomb, hours, frames = picture(64), picture(12_000, "L"), silence(2), gif(5_000)
    files = [f"file://{folder}/secret.png", f"{folder}/secret.png", "../../secret.png", f"file://{folder}/link.png",
             "file:///etc/passwd"]  # fmt: skip
    hosts = [f"{scheme}://{host}:{port}/x.png" for host in ADDRESSES for scheme, port in
             (("http", victim), ("https", victim), ("https", 443))]  # fmt: skip
    loop = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    tree = {"$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}}, "$ref": "#/$defs/a"}
    return [
        Kind("bad JSON, an array, an empty body", (b"{", b"[]", b"", b"nul", b'{"a":}')),
        Kind("a wrong content type", (b"hello",), (415,), headers={"Content-Type": "text/plain"}),
        Kind("an unknown model", (chat(model="gpt-9"),), (404,)),
        Kind('n = 0, -1, 1e9, "3"', tuple(chat(n=n) for n in (0, -1, 10**9, "3"))),
        Kind("max_tokens -1, 1e9", tuple(chat(max_tokens=n) for n in (-1, 10**9))),
        Kind("a prompt over the context", (chat("word " * 5_000),)),
        Kind("temperature -1, NaN", (chat(temperature=-1), b'{"messages": [{"role": "user", "content": "a"}], '
                                     b'"temperature": NaN}')),
        Kind("top_p 0, 2", (chat(top_p=0), chat(top_p=2))),
        Kind("top_logprobs 21", (chat(logprobs=True, top_logprobs=21),)),
        Kind("bad ids in logit_bias", tuple(chat(logit_bias={k: 1}) for k in ("x", "-1", "99999999"))),
        Kind("no messages, an unknown role, an unknown part", ({"messages": []}, *({"messages": [m]} for m in (
             {"role": "king", "content": "a"}, {"role": "user", "content": [{"type": "smell"}]})))),
        Kind("token ids out of range", tuple({"prompt": p} for p in ([-1], [10**9], [[1], [10**9]])), path=COMPLETIONS),
        Kind("base64 that is no picture", (shown("data:image/png;base64,AAAA"), shown("data:image/png;base64,%%%"))),
        Kind("a truncated PNG", (shown(uri(png[:60])), shown(uri(png[:-20])))),
        Kind("a PNG of 12,000 x 12,000 pixels in 136 KiB", (shown(uri(bomb)),)),
        Kind("a picture of 1 x 1", (shown(uri(picture(1))),), (200,)),
        Kind("200 pictures", (shown(*[uri(png)] * 200),)),
        Kind("a clip of 5,000 frames", (shown(uri(frames, "image/gif"), kind="video_url"),)),
        Kind("a sound of two hours", (shown(uri(hours, "audio/flac"), kind="audio_url"),)),
        Kind("a body of 25 MB", (b'{"messages": "' + b"a" * 25_000_000 + b'"}',), (413,)),
        Kind("files: file://, ../, a link", tuple(shown(url) for url in files)),
        Kind("this machine and its neighbours in 57 spellings", tuple(shown(url) for url in hosts)),
        Kind("a schema that is none", (schema({"type": 7}), schema([]), schema({"type": "objekt"}))),
        Kind("a schema that only refers to itself", (schema(loop),)),
        Kind("a recursive schema", (schema(tree),), (200, 400)),
        Kind("a schema 1,000 deep", (nested(1000),)),
        Kind("the regular expression (a+)+$", (chat(guided_regex="(a+)+$"),), (200,)),
        Kind("stop strings: 1,000, an empty one, one of 1 MB", tuple(chat(stop=s) for s in (
             ["x"] * 1000, [""], ["x" * 1_000_000]))),
        Kind("a chat template", (chat(chat_template="{{ 1 }}"),)),
        Kind("special tokens typed as text", (chat("<end><assistant><pad><image>" * 20),), (200,)),
        Kind("50 clients that leave in mid-stream", act=leavers),
        Kind("50 connections with slow headers", act=slow),
        Kind("a header of 1 MB", act=long_header),
        Kind("64 clients at once", act=crowd),
    ]  # fmt: skip


# ---- clients


def client(address: str, who: str):
    import httpx

    return httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEYS[who]}"}, timeout=SECONDS)


def send(asked, kind: Kind, body) -> tuple[int, str]:
    """-> (status, the error's message or what was said)."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = asked.post(kind.path, content=content, headers={"Content-Type": "application/json"} | kind.headers)
    told = answer.json()
    return answer.status_code, told["error"]["message"] if "error" in told else "(an answer)"


def stream_and_leave(address: str) -> None:
    body = json.dumps(chat("count", stream=True) | {"max_tokens": 500, "min_tokens": 500}).encode()
    with socket.create_connection(_pair(address), SECONDS) as wire:
        wire.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n" % (CHAT.encode(), KEYS["bad"].encode(), len(body)) + body)
        seen = b""
        while seen.count(b"data: ") < 3 and (more := wire.recv(4096)):
            seen += more


def leavers(address: str) -> tuple[bool, list[int], str]:
    """All come at once; the last one's leaving to the last row's freedom is what is timed."""
    threads = [threading.Thread(target=stream_and_leave, args=(address,)) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = time.monotonic()
    while gauge(address, "running") + gauge(address, "waiting") > 1:  # the good one's
        time.sleep(0.02)
    took = time.monotonic() - left
    return took < BARS["slot_seconds"], [], f"{took:.2f} s after the last left their rows were free"


def slow(address: str) -> tuple[bool, list[int], str]:
    wires = [socket.create_connection(_pair(address), SECONDS) for _ in range(50)]
    began, closed = time.monotonic(), 0
    for wire in wires:
        wire.sendall(b"POST / HTTP/1.1\r\n")
    while time.monotonic() - began < 8:
        for wire in wires:
            wire.sendall(b"X: y\r\n")
        time.sleep(0.5)
    for wire in wires:
        wire.settimeout(6)
        try:
            closed += wire.recv(1) == b""
        except ConnectionResetError:
            closed += 1
        except TimeoutError:
            pass
        wire.close()
    return closed == 50, [], f"{closed} of 50 were closed within 14 s"


def long_header(address: str) -> tuple[bool, list[int], str]:
    with socket.create_connection(_pair(address), SECONDS) as wire:
        try:
            wire.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n")
            first = wire.recv(4096)
        except (ConnectionResetError, BrokenPipeError):
            return True, [], "closed while it was sent"
    found = re.match(rb"HTTP/1.1 (\d+)", first)
    status = [int(found[1])] if found else []
    return status in ([], [400], [431]), status, "" if found else "closed"


def crowd(address: str) -> tuple[bool, list[int], str]:
    statuses, waits = [], []

    def one():
        with client(address, "bad") as asked:
            answer = asked.post(CHAT, json=chat("count") | {"max_tokens": TOKENS, "min_tokens": TOKENS})
            statuses.append(answer.status_code)
            waits.append(answer.headers.get("Retry-After"))

    threads = [threading.Thread(target=one) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fine = all(status == 200 or wait for status, wait in zip(statuses, waits, strict=True))
    counts = ", ".join(f"{statuses.count(status)} x {status}" for status in sorted(set(statuses)))
    return fine and set(statuses) <= {200, 429, 503}, statuses, counts


def _pair(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("http://").rpartition(":")
    return host, int(port)


def gauge(address: str, name: str) -> float:
    with client(address, "bad") as asked:
        return float(re.search(rf"^gpt4v_engine_{name} (\S+)", asked.get("/metrics").text, re.M)[1])
