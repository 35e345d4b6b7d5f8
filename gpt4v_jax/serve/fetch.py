"""https in: a URL of a public host -> its bytes, within limits of size and time.

A name is resolved once, each of its addresses must be public, and the connection goes to the address that was checked,
so that what the name says later does not matter (OWASP's page on server-side request forgery has the attacks). What a
message says was known to who asked: no address of a name, no host of a redirect.
"""

import dataclasses
import http.client
import io
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from urllib import parse

import idna

from gpt4v_jax import config

NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})+")
NUMBER = re.compile(r"([0-9]+|0x[0-9a-f]*)$")  # a last label that makes a host an IPv4 address in some spelling
URL_LIMIT = 4096  # characters
REDIRECTS = (301, 302, 303, 307, 308)
# Beyond what `ipaddress` calls not global: relays, protocols' own (192.0.0.192 has been a cloud's metadata), Azure's
# wire server.
NOT_PUBLIC = [ipaddress.ip_network(n) for n in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")]
# All that is public in IPv6 is in here; embedded IPv4 (mapped, compatible, NAT64) is not. 6to4, Teredo, documentation:
PUBLIC_6 = ipaddress.ip_network("2000::/3")
NOT_PUBLIC_6 = [ipaddress.ip_network(n) for n in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]
INSTEAD = "send its bytes in a data: URI"


@dataclasses.dataclass(frozen=True)
class Fetch:
    """hosts, bytes, seconds, redirects: as in guards.Limits. resolve(host) -> its addresses; connect(address, seconds)
    -> a socket to port 443 of it; context: whose certificates are believed."""

    hosts: tuple[str, ...]
    bytes: int
    seconds: float
    redirects: int
    resolve: Callable[[str], Sequence[str]]
    connect: Callable[[str, float], socket.socket]
    context: ssl.SSLContext

    def download(self, url: str, deadline: float) -> bytes:
        """An https URL -> the bytes, before time.monotonic() is `deadline`. Raises InputError."""
        for hop in range(self.redirects + 1):
            try:
                host, path = target(url)
                answer = self.answer(host, path, deadline)
                try:
                    if answer.status not in REDIRECTS or not answer.headers["Location"]:
                        return self._body(answer)
                    url = parse.urljoin(f"https://{_bracketed(host)}{path}", answer.headers["Location"])
                finally:
                    answer.close()
                    answer.socket.close()
            except config.InputError as error:
                raise config.InputError(f"its redirect {hop}: {error}" if hop else str(error)) from None
            except ssl.SSLCertVerificationError:
                problem = "its certificate is not valid for this name"
            except TimeoutError:
                problem = f"it took longer than {self.seconds:g} s"
            except (OSError, http.client.HTTPException, ValueError):
                problem = "it cannot be reached, or its answer is damaged"
            else:
                continue
            raise config.InputError(f"{problem}: {INSTEAD}")
        raise config.InputError(f"more than {self.redirects} redirects: name the place where they end")

    def answer(self, host: str, path: str, deadline: float) -> http.client.HTTPResponse:
        """-> the answer to GET, its headers read; `socket` of it is to be closed."""
        if not any(p in ("*", host) or p[:2] == "*." and host.endswith(p[1:]) for p in self.hosts):
            raise config.InputError(f"this server fetches nothing from that host: {INSTEAD}")
        try:
            addresses = list(dict.fromkeys(self.resolve(host)))
        except (OSError, UnicodeError):
            addresses = []
        if not addresses or not all(map(public, addresses)):  # one text, or it would tell which names are there
            raise config.InputError(f"that host has no public address: {INSTEAD}")
        plain = self._reached(addresses, deadline)
        try:
            plain.settimeout(_left(deadline))
            plain = tls = self.context.wrap_socket(plain, server_hostname=host, suppress_ragged_eofs=False)
            tls.settimeout(_left(deadline))
            # http.client would ask for the same by more calls. No cookies, no credentials, nothing compressed.
            lines = [f"GET {path} HTTP/1.1", f"Host: {_bracketed(host)}", "Accept: */*", "Accept-Encoding: identity",
                     "User-Agent: gpt4v_jax", "Connection: close", "", ""]  # fmt: skip
            tls.sendall("\r\n".join(lines).encode("ascii"))
            reader = Reader(tls, deadline, self.bytes * 2 + 2**20, too_large(self.bytes))
            answer = http.client.HTTPResponse(reader, method="GET")
            answer.begin()
        except BaseException:
            plain.close()
            raise
        answer.socket = tls
        return answer

    def _reached(self, addresses: Sequence[str], deadline: float) -> socket.socket:
        for number, address in enumerate(addresses, 1):  # a name with IPv6, on a machine without
            try:
                return self.connect(address, _left(deadline) / (len(addresses) + 1 - number))
            except OSError:
                if number == len(addresses):
                    raise

    def _body(self, answer: http.client.HTTPResponse) -> bytes:
        if answer.status != 200:
            raise config.InputError(f"it was answered by status {answer.status}, not 200: {INSTEAD}")
        for name, known in (("Content-Encoding", ("", "identity")), ("Transfer-Encoding", ("", "chunked"))):
            value = ", ".join(answer.headers.get_all(name, [])).strip().lower()
            if value not in known:
                raise config.InputError(f"its {name} is {value[:40]!r}, which is not taken: {INSTEAD}")
        if (answer.length or 0) > self.bytes:
            raise too_large(self.bytes)
        data = bytearray()
        while part := answer.read(min(65_536, self.bytes + 1 - len(data))):
            data += part
            if len(data) > self.bytes:
                raise too_large(self.bytes)
        if answer.length:
            raise config.InputError(f"it ended {answer.length} bytes too early: {INSTEAD}")
        if not data:
            raise config.InputError("it is empty: name a file with content")
        return bytes(data)


class Reader(io.RawIOBase):
    """What a socket gives until a time, and not more than so many bytes: http.client's reading has no such limits (a
    negative size of a chunk reads all there is). Stands in for the socket of HTTPResponse."""

    def __init__(self, sock: socket.socket, deadline: float, most: int, error: Exception):
        self._sock, self._deadline, self._most, self._error = sock, deadline, most, error

    def readable(self) -> bool:
        return True

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readinto(self, buffer) -> int:
        self._sock.settimeout(_left(self._deadline))
        count = self._sock.recv_into(buffer)
        self._most -= count
        if self._most < 0:
            raise self._error
        return count


def target(url: str) -> tuple[str, str]:
    """An https URL -> (host, path with query), both as they are sent. Raises InputError for anything else."""
    if len(url) > URL_LIMIT:
        raise config.InputError(f"a URL of {len(url)} characters, more than {URL_LIMIT}: {INSTEAD}")
    if re.search(r"[\x00-\x20\x7f-\xa0\\]", url):  # which urllib drops and browsers turn into others
        raise config.InputError("a URL with spaces, control characters or \\: write them as %20 and the like")
    if not url[:8].lower() == "https://":
        raise config.InputError(f"only https:// URLs are fetched: {INSTEAD}")
    try:
        parts = parse.urlsplit(url)
    except ValueError:
        raise config.InputError("that host is none: write a name such as example.org") from None
    if "@" in parts.netloc:
        raise config.InputError("a URL with a user's name: leave out what stands before the @")
    host, _, port = parts.netloc.partition(":") if parts.netloc[:1] != "[" else parts.netloc.partition("]")
    if parts.netloc[:1] == "[":
        host, port = host + "]", port.removeprefix(":")
    if port not in ("", "443"):
        raise config.InputError("a URL with a port: only 443 is asked")
    path = parse.quote(parts.path or "/", safe="%/:@!$&'()*+,;=~-._")
    query = parse.quote(parts.query, safe="%/:@!$&'()*+,;=~-._?")
    return hostname(host), path + ("?" + query if query else "")


def hostname(text: str) -> str:
    """A host as it is written -> the one spelling of it: lower case, ASCII (IDNA 2008 after UTS 46), no last dot; an
    address as `ipaddress` writes it. Raises InputError, also for addresses in other than four decimal numbers."""
    problem = config.InputError("that host is none: write a name such as example.org")
    if "%" in text:  # an escape, or a zone
        raise problem
    try:
        if text[:1] == "[":
            return str(ipaddress.IPv6Address(text[1:-1]))
        name = text if text.isascii() else idna.encode(text, uts46=True, std3_rules=True).decode()
        name = name.lower().removesuffix(".")
        if NUMBER.match(name.rpartition(".")[2]):
            return str(ipaddress.IPv4Address(name))
    except ValueError:  # idna's are, too
        raise problem from None
    if not NAME.fullmatch(name) or len(name) > 253:
        raise problem
    return name


def public(address: str) -> bool:
    """-> whether an IP address is one of the public internet's."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # zones are none
        return False
    if not ip.is_global or ip.is_multicast or ip.is_reserved:
        return False
    if ip.version == 4:
        return not any(ip in network for network in NOT_PUBLIC)
    return ip in PUBLIC_6 and not any(ip in network for network in NOT_PUBLIC_6)


def too_large(most: int) -> config.InputError:
    return config.InputError(f"more than {most} bytes: send a smaller file")


def addresses(host: str) -> list[str]:
    # The last dot: a name of the world, which this machine's search domains are not appended to.
    name = host if NUMBER.match(host.rpartition(".")[2]) or ":" in host else host + "."
    return [found[4][0] for found in socket.getaddrinfo(name, 443, type=socket.SOCK_STREAM)]


def connected(address: str, seconds: float) -> socket.socket:
    return socket.create_connection((address, 443), seconds)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
