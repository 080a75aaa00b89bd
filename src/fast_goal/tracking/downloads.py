"""Fetches an image that a caller of the served model names by its URL, without becoming the caller's way into our network.

Off unless the operator allows it. FAST_GOAL_ALLOW_URLS is a list, separated by commas, of hosts (`photos.example`, with
another port than the scheme's `photos.example:8080`); a listed host may have any address. The word `1` in the list stands for
every host of the public internet on its usual port: names that lead to a private, loopback, link-local or otherwise special
address are refused.

What is checked is what is connected to: a name is resolved once, all its addresses are checked, and the connection goes to one
of them, so that a name that changes its address in between gains nothing. A redirect is a new address and is checked alike.
Proxies of the environment are not used, because they would resolve the name again. Only GET is sent, with no cookies and no
credentials; size and time are limited.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from fast_goal.errors import ConfigError, DataError

MAX_BYTES = 32 * 1024 * 1024  # of one image file
SECONDS = 10.0  # for one image, its redirects included
REDIRECTS = 3
PORTS = {"http": 80, "https": 443}
PUBLIC, OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
_REDIRECT = (301, 302, 303, 307, 308)
# IPv6 addresses that carry an IPv4 address in their last four bytes, which is where a gateway would send the packets
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))


@dataclass(frozen=True)
class UrlPolicy:
    """Which hosts may be asked. public: every host with public addresses. hosts: (name, port), None for the scheme's port."""

    public: bool
    hosts: frozenset[tuple[str, int | None]] = frozenset()

    @classmethod
    def parse(cls, words: str) -> UrlPolicy | None:
        """What FAST_GOAL_ALLOW_URLS says; None where URLs are off. Raises ConfigError for an item that is no host."""
        items = [item.strip().lower() for item in words.split(",") if item.strip()]
        if all(item in OFF for item in items):
            return None
        hosts = set()
        for item in items:
            if item in PUBLIC or item in OFF:
                continue
            try:
                parts = urlsplit(f"//{item}")
                host, port = parts.hostname, parts.port
            except ValueError:
                host, port = None, None
            if not host or parts.netloc != item or "@" in item or "*" in item:
                raise ConfigError(
                    f"allowed URLs: {item!r} is not a host. Expected names such as photos.example or photos.example:8080, "
                    "separated by commas, or 1 for all public hosts."
                )
            hosts.add((host.rstrip("."), port))
        return cls(any(item in PUBLIC for item in items), frozenset(hosts))

    def lists(self, scheme: str, host: str, port: int) -> bool:
        """Whether the operator named this host, with this port or with none where it is the scheme's."""
        return (host, port) in self.hosts or ((host, None) in self.hosts and port == PORTS[scheme])


class _Target(NamedTuple):
    scheme: str
    host: str
    port: int
    addresses: list[str]
    request: str  # path and query


def download(url: str, policy: UrlPolicy, seconds: float = SECONDS, max_bytes: int = MAX_BYTES) -> bytes:
    """The body that `url` gives, after at most REDIRECTS redirects. Raises DataError with the reason, which tells nothing of
    the network that the caller does not know."""
    deadline = time.monotonic() + seconds
    for _ in range(REDIRECTS + 1):
        target = _checked(url, policy)
        try:
            found = _get(target, deadline, max_bytes)
        except (OSError, http.client.HTTPException, ValueError):
            late = time.monotonic() >= deadline
            raise DataError(f"took longer than {seconds:g} s" if late else f"{target.host} could not be reached") from None
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise DataError(f"more than {REDIRECTS} redirects")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also where it is an IPv4 address in the clothes of IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and any(ip in network for network in _NAT64):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _checked(url: str, policy: UrlPolicy) -> _Target:
    """The URL taken apart and its host resolved. Raises DataError for what the policy does not allow."""
    if any(character <= " " or character == "\x7f" for character in url):
        raise DataError("a URL has no blanks and no control characters")
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, (parts.hostname or "").rstrip("."), parts.port
        host = host if ":" in host else host.encode("idna").decode().lower()
        request = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
        request.encode("ascii")
    except ValueError:  # also what cannot be encoded
        raise DataError("not a valid URL; letters beyond ASCII in a path are written as %XX") from None
    if scheme not in PORTS or not host:
        raise DataError("only http:// and https:// are fetched")
    if "@" in parts.netloc:
        raise DataError("a URL with a user name is not fetched")
    port = PORTS[scheme] if port is None else port
    listed = policy.lists(scheme, host, port)
    if not listed and not policy.public:
        raise DataError(f"the host {host} (port {port}) is not among those that the operator of this server allows")
    if not listed and port != PORTS[scheme]:
        raise DataError(f"port {port} is not fetched from; only {PORTS[scheme]} for {scheme}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise DataError(f"the host {host} is not known") from None
    addresses = list(dict.fromkeys(entry[4][0] for entry in found))
    if not listed and not all(is_public(address) for address in addresses):
        raise DataError(f"the host {host} is not a public one")
    return _Target(scheme, host, port, addresses, request)


def _get(target: _Target, deadline: float, max_bytes: int) -> bytes | str:
    """The body, or where a redirect leads to."""
    kind = http.client.HTTPSConnection if target.scheme == "https" else http.client.HTTPConnection
    # http.client connects only where it has no socket yet; it is given one to the address that was checked
    connection = kind(target.host, target.port)
    plain = _connect(target, deadline)
    connection.sock = plain
    if target.scheme == "https":
        context = ssl.create_default_context()
        connection.sock = context.wrap_socket(plain, server_hostname=target.host, do_handshake_on_connect=False)
    # the timeout of a socket is for each read: a server that sends a byte a second would never run into it
    watch = threading.Timer(max(0.0, deadline - time.monotonic()), _cut, [connection.sock])
    watch.daemon = True
    watch.start()
    try:
        if isinstance(connection.sock, ssl.SSLSocket):
            connection.sock.do_handshake()
        headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "fast-goal", "Connection": "close"}
        connection.request("GET", target.request, headers=headers)
        with connection.getresponse() as response:
            if response.status in _REDIRECT and response.headers.get("Location"):
                return response.headers["Location"]
            if response.status != 200:
                raise DataError(f"{target.host} answered with status {response.status}")
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise DataError(f"{target.host} sent the image compressed, though it was asked not to")
            if response.length is not None and response.length > max_bytes:
                raise DataError(f"the file is larger than {max_bytes:,} bytes")
            body = response.read(max_bytes + 1)
        if time.monotonic() >= deadline:
            raise TimeoutError  # what arrived may be a part
        if len(body) > max_bytes:
            raise DataError(f"the file is larger than {max_bytes:,} bytes")
        if response.length:
            raise http.client.IncompleteRead(body)
        return body
    finally:
        watch.cancel()
        connection.close()


def _connect(target: _Target, deadline: float) -> socket.socket:
    failed: OSError = TimeoutError()
    for address in target.addresses:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            return socket.create_connection((address, target.port), timeout=left)
        except OSError as error:
            failed = error
    raise failed


def _cut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # of the socket below TLS, which would wait for the other side
