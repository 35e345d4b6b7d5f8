"""Bytes from clients: what is fetched and what never is, by a TLS server and a victim on this machine."""

import asyncio
import re
import socket
import ssl
import threading
import time

import jax
import numpy as np
import pytest

from gpt4v_jax import config
from gpt4v_jax.serve import fetch, guards
from tests.serve import fake

trustme = pytest.importorskip("trustme")

PUBLIC, PUBLIC_6 = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
BODY = bytes(range(256)) * 300
SECRETS = re.compile(r"0x[0-9a-f]{6,}|object at|Traceback|/usr|/tmp|127\.0\.0\.1|10\.0\.0\.5|169\.254")


def answer(body: bytes = BODY, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in chunks) + end


def to(where: str, status: str = "302 Found") -> bytes:
    return answer(b"", f"Location: {where}", status=status)


class Server:
    """On loopback: sends to each path its bytes. Counts who comes, and keeps what they say."""

    def __init__(self, context: ssl.SSLContext | None = None):
        self.answers, self.hits, self.said, self.done, self.context = {}, 0, [], threading.Event(), context
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                sock = self.listening.accept()[0]
            except OSError:
                return
            self.hits += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        try:
            with self.context.wrap_socket(sock, server_side=True) if self.context else sock as sock:
                said = b""
                while b"\r\n\r\n" not in said:
                    said += sock.recv(4096) or b"\r\n\r\n"
                self.said.append(said.decode())
                found = self.answers.get(said.split()[1].decode(), answer(b"", status="404 Not Found"))
                found(sock) if callable(found) else sock.sendall(found)
                sock.unwrap()
        except (OSError, IndexError, ValueError):
            pass

    def close(self):
        self.done.set()
        self.listening.close()


class World:
    """Names and addresses as tests want them: PUBLIC is the TLS server, every other address the victim."""

    def __init__(self):
        authority = trustme.CA()
        server, self.client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
        authority.issue_cert("example.org", "*.example.org", "xn--bcher-kva.example", PUBLIC).configure_cert(server)
        authority.configure_trust(self.client)
        self.server, self.victim, self.connects, self.asked = Server(server), Server(), [], []
        self.names = {}

    def resolve(self, host: str) -> list[str]:
        """As getaddrinfo does, which takes numbers in every spelling. Others lead inside."""
        self.asked.append(host)
        try:
            return self.names.get(host) or [socket.inet_ntoa(socket.inet_aton(host))]
        except OSError:
            return [host] if ":" in host else ["127.0.0.1"]

    def connect(self, address: str, seconds: float) -> socket.socket:
        self.connects.append(address)
        port = self.server.port if address in (PUBLIC, PUBLIC_6) else self.victim.port
        return socket.create_connection(("127.0.0.1", port), seconds)

    def guard(self, **limits) -> guards.Guard:
        limits = guards.Limits(**{"hosts": ("*",), "seconds": 20.0, "bytes": 100_000} | limits)
        return guards.Guard(limits, self.resolve, self.client, self.connect)

    def read(self, url: str, modality: str = "image", **limits) -> bytes:
        guard = self.guard(**limits)
        try:
            return asyncio.run(guard.read(modality, url))
        finally:
            guard.close()

    def refused(self, url: str, match: str, **limits) -> None:
        with pytest.raises(config.InputError, match=match) as error:
            self.read(url, **limits)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
        assert not SECRETS.search(str(error.value).replace(guards._shown(url), "")), str(error.value)
        assert error.value.__cause__ is None


@pytest.fixture(scope="module")
def _world():
    world = World()
    yield world
    world.server.close(), world.victim.close()


@pytest.fixture
def world(_world):
    _world.names = {name: [PUBLIC] for name in ("example.org", "www.example.org", "xn--bcher-kva.example",
    "other.test")}
    _world.server.answers = {"/a.png": answer()}
    for thing in (_world.connects, _world.asked, _world.server.said):
        thing.clear()
    _world.server.hits = _world.victim.hits = 0
    yield _world
    assert _world.victim.hits == 0


def test_a_file_is_fetched(world, monkeypatch):
    """By the pinned address, with the name in TLS and Host, nothing of the environment and no credentials."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{world.victim.port}")
    world.server.answers["/a.png?x=1&y=%20"] = answer(b"two")
    assert world.read("https://example.org/a.png") == BODY
    assert world.read("https://example.org/a.png?x=1&y=%20#there") == b"two"
    assert world.asked == ["example.org"] * 2 and world.connects == [PUBLIC] * 2
    head = world.server.said[0].lower()
    assert "\r\nhost: example.org\r\n" in head and "\r\naccept-encoding: identity\r\n" in head
    assert "cookie" not in head and "authorization" not in head


def test_a_chat_about_a_picture_at_an_address(world):
    """It is the prompt of the same picture in a data: URI. What may not be asked is a 400."""
    world.names["inside.test"] = ["10.0.0.5"]
    world.server.answers["/p.png"] = answer(picture := fake.png())
    engine = fake.FakeEngine(fake.trained().tokenizer)
    with fake.client(engine, guard=world.guard()) as client:

        def ask(url: str, kind: str = "image_url"):
            parts = [{"type": kind, kind: {"url": url}}, {"type": "text", "text": "what?"}]
            body = fake.say() | {"messages": [{"role": "user", "content": parts}]}
            return client.post("/v1/chat/completions", json=body)

        for url in ("https://example.org/p.png", fake.uri(picture)):
            assert ask(url).json()["choices"][0]["message"]["content"] == fake.SAYS
        for url, kind in (("https://inside.test/p.png", "image_url"), ("https://inside.test/c.avi", "video_url")):
            refused = ask(url, kind)
            assert refused.status_code == 400 and "inside.test" in refused.json()["error"]["message"]
    one, two = ([list(request.prompt.tokens), *request.read(request.prompt.media[0][1])] for request in engine.requests)
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two)) and world.connects == [PUBLIC]


@pytest.mark.parametrize("url", [
    "https://example.org/a.png", "HTTPS://EXAMPLE.ORG/a.png", "https://example.org./a.png",
    "https://example.org:443/a.png",
    "https://example.org:/a.png", "https://ｅxample。org/a.png", "https://bücher.example/a.png",
    "https://BÜCHER.example./a.png", "https://www.example.org/a.png", f"https://{PUBLIC}/a.png",
])  # fmt: skip
def test_spellings_of_what_is_public(world, url):
    assert world.read(url) == BODY


ADDRESSES_4 = [
    "127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7F.1", "0x7f.0x0.0x0.0x1", "0177.0.0.1",
    "017700000001",
    "0177.1", "127.0.0.01", "127.0.0.1.", "00000127.0.0.1", "127.255.255.254", "0", "0.0.0.0", "0x0", "0.0.0.1",
    "10.0.0.5", "10.5", "167772165", "012.0.0.5", "172.16.0.1", "172.31.255.255", "192.168.1.1", "192.168.257",
    "3232235777", "0xC0A80101", "169.254.169.254", "2852039166", "0xA9FEA9FE", "0251.0376.0251.0376", "169.254.43518",
    "100.64.0.1", "100.100.100.200", "198.18.0.1", "192.0.0.192", "192.0.2.1", "192.88.99.1", "203.0.113.1",
    "224.0.0.1",
    "240.0.0.1", "255.255.255.255", "168.63.129.16", "4294967295", "127.0.0.1.nip", "1.2.3", "256.256.256.256", "0x",
    "１２７.０.０.１", "127。0。0。1", "①②⑦.0.0.1", "１６９。２５４。１６９。２５４",
    "0ｘ7f.1", "127%2e0%2e0%2e1", "%31%32%37.0.0.1",
    "127.0.0.1%00.example.org",
]  # fmt: skip
ADDRESSES_6 = [
    "::1", "::", "0:0:0:0:0:0:0:1", "::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:10.0.0.5", "::ffff:8.8.8.8",
    "::127.0.0.1",
    "64:ff9b::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a9fe:a9fe::1",
    "2002:0a00:0005::", "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1", "3fff::1", "fe80::1",
    "fe80::1%eth0", "fe80::1%25eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "100::1", "::1%lo", "1::g", "",
    "v1.a", "::ffff:0:127.0.0.1", PUBLIC_6 + "%eth0",
]  # fmt: skip
NAMES = ["localhost", "LOCALHOST", "localhost.", "localhost.localdomain", "metadata", "metadata.google.internal",
    "a..b.c",
         "ⓛocalhost", "-.-", "a" * 64 + ".org", "", ".", "*", "[::1"]  # fmt: skip
INSIDE = [*ADDRESSES_4, *(f"[{a}]" for a in ADDRESSES_6), *NAMES]


@pytest.mark.parametrize("host", INSIDE)
def test_hosts_that_are_not_public(world, host):
    assert len(INSIDE) > 90
    world.refused(f"https://{host}/a.png", "no public address|host is none|spaces")
    assert not world.connects and not world.server.hits


@pytest.mark.parametrize("address", [*ADDRESSES_4[:1], "10.0.0.5", "169.254.169.254", *filter(None, ADDRESSES_6),
    "junk"])
def test_names_with_addresses_that_are_not_public(world, address):
    """One is enough, wherever it stands: which one is connected to would be chance."""
    for found in ([address], [PUBLIC, address], [address, PUBLIC]):
        world.names["example.org"] = found
        world.refused("https://example.org/a.png", "that host has no public address")
    assert not world.connects
    assert not fetch.public(address)


def test_addresses_that_are_public():
    for address in (PUBLIC, PUBLIC_6, "8.8.8.8", "1.1.1.1", "2a00:1450:4001:82a::200e", "172.32.0.1", "100.128.0.1"):
        assert fetch.public(address)
    assert all(not fetch.public(a) for a in ADDRESSES_4 if re.fullmatch(r"[\d.]+", a) and a.count(".") == 3)


def test_a_name_that_is_none_says_what_a_private_one_says(world, monkeypatch):
    def gone(_):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(world, "resolve", gone)
    world.refused("https://example.org/a.png", ": that host has no public address: send its bytes in a data: URI$")


def test_a_name_is_asked_once(world, monkeypatch):
    """Its next answer would be loopback (DNS rebinding)."""
    answers = iter([[PUBLIC]])
    monkeypatch.setattr(world, "resolve", lambda _: next(answers, ["127.0.0.1"]))
    assert world.read("https://example.org/a.png") == BODY and world.connects == [PUBLIC]


def test_the_next_address_where_one_cannot_be_reached(world, monkeypatch):
    waits = []

    def connect(address, seconds):
        waits.append(seconds)
        if ":" in address:
            raise OSError("no route")
        return World.connect(world, address, seconds)

    monkeypatch.setattr(world, "connect", connect)
    world.names["example.org"] = [PUBLIC_6, PUBLIC]
    assert world.read("https://example.org/a.png") == BODY
    assert waits[0] <= 10 < waits[1]  # of 20 s: the first one may not use up all of them
    world.names["example.org"] = [PUBLIC_6]
    world.refused("https://example.org/a.png", "cannot be reached")


@pytest.mark.parametrize("url, match", [
    ("http://example.org/a.png", "only https"), ("ftp://example.org/a.png", "only https"),
    ("file:///etc/passwd", "only https"), ("gopher://127.0.0.1:6379/_x", "only https"), ("/etc/passwd", "only https"),
    ("../../etc/passwd", "only https"), ("a.png", "only https"), ("~/a.png", "only https"), ("", "only https"),
    ("//example.org/a.png", "only https"), ("https:/example.org/a.png", "only https"), ("blob:https://x.org/1",
    "only https"),
    ("https:example.org", "only https"), ("javascript:1", "only https"), (" https://example.org/a.png", "spaces"),
    ("https://example.org/a b", "spaces"), ("https://example.org/a\r\nHost: x", "spaces"), ("https://example.org\\@x",
    "spaces"),
    ("https://example.org/a\tb", "spaces"), ("https://me:secret@example.org/a.png", "user's name"),
    ("https://example.org@127.0.0.1/", "user's name"), ("https://example.org:80/a.png", "a port"),
    ("https://example.org:0443/a.png", "a port"), ("https://example.org:x/", "a port"), ("https://[::1]:80/", "a port"),
    ("https://example.org/" + "a" * 5000, "5020 characters"),
])  # fmt: skip
def test_what_is_no_https_url(world, url, match):
    world.refused(url, match)
    assert not world.asked and not world.connects


def test_messages_keep_secrets_of_a_url(world):
    with pytest.raises(config.InputError) as error:
        world.read("https://me:secret@example.org/b.png?signature=hidden")
    assert "secret" not in str(error.value) and "hidden" not in str(error.value) and "b.png" in str(error.value)


@pytest.mark.parametrize("hosts, host, fetched", [
    ((), "example.org", False), (("example.org",), "example.org", True), (("example.org",), "www.example.org", False),
    (("EXAMPLE.org.",), "example.org", True), (("*.example.org",), "www.example.org", True),
    (("*.example.org",), "example.org", False), (("*.ample.org",), "example.org", False),
    (("example.org",), "other.test", False), (("bücher.example",), "xn--bcher-kva.example", True), (("*",), PUBLIC,
    True),
    ((PUBLIC,), PUBLIC, True), (("example.org",), PUBLIC, False),
])  # fmt: skip
def test_hosts(world, hosts, host, fetched):
    if fetched:
        assert world.read(f"https://{host}/a.png", hosts=hosts) == BODY
    else:
        world.refused(f"https://{host}/a.png", "fetches nothing from that host: send its bytes", hosts=hosts)
        assert not world.asked


@pytest.mark.parametrize("host", ["https://example.org", "example.org:443", "*example.org", "a.*.org", "localhost",
    "", "**"])
def test_hosts_that_are_none(host):
    with pytest.raises(config.InputError, match="write a name such as"):
        guards.Limits(hosts=(host,))
    with pytest.raises(config.InputError, match="bytes=0 must be"):
        guards.Limits(bytes=0)


def test_the_certificate_is_checked(world):
    world.refused("https://other.test/a.png", "certificate is not valid for this name")
    world.client, ours = ssl.create_default_context(), world.client
    world.refused("https://example.org/a.png", "certificate is not valid")
    world.client = ours
    assert not world.server.said  # nothing was asked of it


def test_redirects_are_followed(world):
    world.server.answers |= {"/1": to("2", "301 Moved"), "/2": to("//www.example.org/3", "303 See"),
                             "/3": to("https://EXAMPLE.org/a.png", "308 Permanent")}  # fmt: skip
    assert world.read("https://example.org/1") == BODY
    assert world.asked == ["example.org", "example.org", "www.example.org", "example.org"]
    world.server.answers["/0"] = to("/1")
    world.refused("https://example.org/0", "more than 3 redirects")
    world.refused("https://example.org/1", "more than 0 redirects", redirects=0)
    world.refused("https://example.org/1", "redirect 2: this server fetches nothing from that", hosts=("example.org",))


@pytest.mark.parametrize("where", [
    "http://example.org/a.png", "http://127.0.0.1/", "file:///etc/passwd", "ftp://example.org/", "https://127.0.0.1/",
    "https://2130706433/", "https://[::1]/", "//169.254.169.254/latest/", "https://localhost/",
    "https://inside.example.org/",
    "https://me@example.org/a.png", "https://example.org:8443/", "data:image/png;base64,AAAA",
    "https://example.org\\@x/",
    "gopher://10.0.0.5/", "https://１２７.０.０.１/", "http:a.png",
])  # fmt: skip
def test_redirects_are_checked_like_any_url(world, where):
    world.names["inside.example.org"] = ["10.0.0.5"]
    world.server.answers["/1"] = to(where)
    world.refused("https://example.org/1", "its redirect 1: ")
    assert world.connects == [PUBLIC]


def dripping(world):
    def send(sock):
        sock.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while not world.server.done.wait(0.02):  # each byte would start a limit of one read anew
            sock.sendall(b"x")

    return send


@pytest.mark.parametrize("name, sent, match", [
    ("length", answer(length=100_001), "more than 100000 bytes"),
    ("length too long", answer(length=90_000), "ended 13200 bytes too early"),
    ("no length", b"HTTP/1.1 200 OK\r\n\r\n" + bytes(100_001), "more than 100000 bytes"),
    ("chunks", chunked(*[bytes(10_001)] * 10), "more than 100000 bytes"),
    ("a cut chunk", chunked(bytes(10), end=b"ff\r\nx"), "damaged"),
    ("a negative chunk", chunked(end=b"-1\r\n" + bytes(2_000_000)), "more than 100000 bytes"),
    ("headers", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300, "damaged"),
    ("a long header", b"HTTP/1.1 200 OK\r\nX: " + bytes(100_000), "damaged"),
    ("100 Continue", b"HTTP/1.1 100 Continue\r\n\r\n" * 100_000, "more than 100000 bytes"),
    ("gzip", answer(BODY, "Content-Encoding: gzip"), "its Content-Encoding is 'gzip'"),
    ("gzip, chunked", answer(BODY, "Transfer-Encoding: gzip, chunked"), "its Transfer-Encoding is 'gzip, chunked'"),
    ("404", answer(b"", status="404 Not Found"), "status 404"), ("206", answer(status="206 Part"), "status 206"),
    ("204", b"HTTP/1.1 204 No Content\r\n\r\n", "status 204"), ("nowhere", answer(status="302 Found"), "status 302"),
    ("nothing", answer(b""), "empty"), ("no HTTP", b"SSH-2.0-x\r\n\r\n", "damaged"), ("silence", b"", "damaged"),
])  # fmt: skip
def test_answers_that_are_refused(world, name, sent, match):
    world.server.answers["/1"] = sent
    world.refused("https://example.org/1", match)


def test_answers_that_are_taken(world):
    world.server.answers |= {
        "/1": chunked(BODY[:1000], BODY[1000:]), "/2": b"HTTP/1.1 200 OK\r\n\r\n" + BODY,
        "/3": answer(b"x" * 100_000, "Content-Encoding: identity", "Set-Cookie: a=b"), "/4": answer(length=10),
    }  # fmt: skip
    assert world.read("https://example.org/1") == world.read("https://example.org/2") == BODY
    assert len(world.read("https://example.org/3")) == 100_000 and world.read("https://example.org/4") == BODY[:10]


def test_an_answer_without_a_length_that_is_cut_off(world):
    """TLS says where it ends; a connection that just breaks is no end."""
    def send(sock):
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + BODY)
        sock.shutdown(socket.SHUT_RDWR)

    world.server.answers["/1"] = send
    world.refused("https://example.org/1", "its answer is damaged")


def test_a_download_that_drips_ends(world):
    world.server.answers["/1"] = dripping(world)
    guard = world.guard(seconds=0.4)
    with pytest.raises(TimeoutError):  # its thread, too
        answer = guard._fetch.answer("example.org", "/1", time.monotonic() + 0.4)
        answer.close()
    guard.close()
    world.refused("https://example.org/1", "took longer than 0.4 s", seconds=0.4)


def test_a_resolver_that_hangs_holds_no_one(world, monkeypatch):
    hang = threading.Event()
    monkeypatch.setattr(world, "resolve", lambda _: hang.wait() and [PUBLIC])
    world_guard = world.guard(seconds=0.2, downloads=1)

    async def both():
        return await asyncio.gather(*[world_guard.read("image", "https://example.org/a.png") for _ in range(3)],
                                    return_exceptions=True)  # fmt: skip

    said = asyncio.run(both())
    hang.set()
    world_guard.close()
    assert all("took longer than 0.2 s" in str(error) for error in said) and len(said) == 3
    assert not world.connects  # no time was left


def test_downloads_at_a_time(world, monkeypatch):
    three, met = threading.Barrier(3), []

    def resolve(_):
        try:
            three.wait(0.3)  # there are never three
            met.append(True)
        except threading.BrokenBarrierError:
            return [PUBLIC]

    monkeypatch.setattr(world, "resolve", resolve)
    guard = world.guard(downloads=2)

    async def six():
        return await asyncio.gather(*[guard.read("image", "https://example.org/a.png") for _ in range(6)])

    assert asyncio.run(six()) == [BODY] * 6 and not met
    guard.close()
