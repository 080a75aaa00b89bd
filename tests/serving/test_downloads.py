"""URLs of images: what is fetched, what is refused, and that nothing but the checked address is ever connected to."""

import datetime
import ipaddress
import socket
import ssl
import threading
import time

import pytest
from file_server import FileServer

from fast_goal.errors import ConfigError, DataError
from fast_goal.tracking import downloads
from fast_goal.tracking.downloads import UrlPolicy, download, is_public

DATA = bytes(range(256)) * 40
PUBLIC = UrlPolicy.parse("1")


@pytest.fixture
def server():
    with FileServer({"a.png": DATA, "b.png": b"second"}) as server:
        yield server


@pytest.fixture
def named(server):
    """A policy that lists the server."""
    return UrlPolicy.parse(server.address)


def test_a_listed_host_is_fetched(server, named):
    assert download(server.url("a.png"), named) == DATA
    assert download(f"{server.url('a.png')}?size=big#part", named) == DATA
    [_, second] = server.asked("a.png")
    assert second.query == "size=big" and second.headers["host"] == server.address
    assert not {"authorization", "cookie"} & set(second.headers)


def test_a_redirect_is_checked_like_a_first_url(server, named):
    server.fault("start", redirect="/b.png")
    assert download(server.url("start"), named) == b"second"
    with FileServer({"secret": b"inside"}) as other:
        server.fault("start", redirect=other.url("secret"))
        with pytest.raises(DataError, match="not among those that the operator of this server allows"):
            download(server.url("start"), named)
        assert not other.requests
    server.fault("start", redirect="file:///etc/passwd")
    with pytest.raises(DataError, match="only http:// and https://"):
        download(server.url("start"), named)
    server.fault("round", redirect="/round", times=None)
    with pytest.raises(DataError, match="more than 3 redirects"):
        download(server.url("round"), named)
    assert len(server.asked("round")) == 4


def test_a_public_policy_reaches_nothing_private(server, monkeypatch):
    port = server.address.partition(":")[2]
    for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "0.0.0.0", "127.1"):
        with pytest.raises(DataError, match=r"is not a public one|is not known"):
            download(f"http://{host}/a.png", PUBLIC)
        with pytest.raises(DataError, match=f"port {port} is not fetched from"):
            download(f"http://{host}:{port}/a.png", PUBLIC)
    # one private address among public ones is enough
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("93.184.216.34", "127.0.0.1")]
    monkeypatch.setattr(downloads.socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(DataError, match=r"the host photos\.example is not a public one"):
        download("http://photos.example/a.png", PUBLIC)
    assert not server.requests


def test_a_public_host_that_redirects_inwards_is_refused(server, monkeypatch):
    """The first address counts as public here; the second, by its number, does not."""
    monkeypatch.setattr(downloads, "PORTS", {"http": int(server.address.partition(":")[2]), "https": 443})
    resolve, asked = socket.getaddrinfo, []

    def resolved(host, port, *rest, **more):
        asked.append(host)
        return resolve("127.0.0.1" if host == "photos.example" else host, port, *rest, **more)

    monkeypatch.setattr(downloads.socket, "getaddrinfo", resolved)
    public_once = iter([True])
    monkeypatch.setattr(downloads, "is_public", lambda address: next(public_once, None) or is_public(address))
    server.fault("start", redirect=f"http://{server.address}/a.png")
    with pytest.raises(DataError, match=r"127\.0\.0\.1 is not a public one"):
        download(f"http://photos.example:{server.address.partition(':')[2]}/start", PUBLIC)
    assert asked.count("photos.example") == 1  # no second look-up whose answer nobody checked
    assert [request.path for request in server.requests] == ["start"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("240.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("::7f00:1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::5db8:d822", True),
        ("2002:7f00:1::", False),
        ("2001:0:4136:e378:8000:63bf:80ff:fffe", False),  # Teredo, of 127.0.0.1
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://127.0.0.1/a.png", "only http:// and https://"),
        ("file:///etc/passwd", "only http:// and https://"),
        ("photos/a.png", "only http:// and https://"),
        ("http://", "only http:// and https://"),
        ("http://me:secret@127.0.0.1/a.png", "user name"),
        ("http://127.0.0.1/a b.png", "blanks"),
        ("http://127.0.0.1/a\r\nX-Evil: 1", "control characters"),
        ("http://127.0.0.1:99999/a.png", "not a valid URL"),
        ("http://[::1/a.png", "not a valid URL"),
        ("http://127.0.0.1/ä.png", "not a valid URL"),
        ("http://\ud800.example/", "not a valid URL"),
        ("http://other.example/a.png", "not among those"),
    ],
)
def test_urls_that_are_not_fetched(url, reason):
    with pytest.raises(DataError, match=reason):
        download(url, UrlPolicy.parse("127.0.0.1"))


def test_size_and_time_are_limited(server, named):
    with pytest.raises(DataError, match="larger than 1,000 bytes"):
        download(server.url("a.png"), named, max_bytes=1000)
    server.fault("a.png", length=None, content=DATA)
    assert download(server.url("a.png"), named, max_bytes=len(DATA)) == DATA
    server.fault("a.png", stall=(100, 30.0))
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"took longer than 0\.5 s"):
        download(server.url("a.png"), named, seconds=0.5)
    assert time.monotonic() - begin < 5
    server.fault("a.png", close_after=5000)
    with pytest.raises(DataError, match=r"127\.0\.0\.1 could not be reached"):
        download(server.url("a.png"), named)
    with pytest.raises(DataError, match="answered with status 404"):
        download(server.url("none.png"), named)


def test_a_body_of_unknown_length_and_dripping_headers_meet_the_limits():
    """A server of its own: no Content-Length, then a header line that never ends, a byte at a time."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        policy = UrlPolicy.parse(f"127.0.0.1:{listening.getsockname()[1]}")
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"

        def endless():
            with listening.accept()[0] as client:
                client.recv(4096)
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                with pytest.raises(OSError):
                    while True:
                        client.sendall(b"x" * 65536)

        def dripping():
            with listening.accept()[0] as client:
                client.recv(4096)
                client.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                with pytest.raises(OSError):
                    while True:
                        client.sendall(b"x")
                        time.sleep(0.05)

        for behave, reason in ((endless, "larger than 100,000 bytes"), (dripping, "took longer than 0.7 s")):
            thread = threading.Thread(target=behave)
            thread.start()
            with pytest.raises(DataError, match=reason):
                download(url, policy, seconds=0.7 if behave is dripping else 10, max_bytes=100_000)
            thread.join(10)
            assert not thread.is_alive()


def test_https_is_verified_and_pinned(tmp_path, monkeypatch):
    """The connection goes to the address that was resolved, under the name of the URL; a stranger's certificate is refused."""
    port, received = _tls_server(tmp_path)
    monkeypatch.setattr(downloads.socket, "getaddrinfo", _only("photos.example", "127.0.0.1"))
    policy = UrlPolicy.parse(f"photos.example:{port}")
    url = f"https://photos.example:{port}/a.png"
    with pytest.raises(DataError, match=r"photos\.example could not be reached"):
        download(url, policy)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    assert download(url, policy) == b"over TLS"
    assert received[-1].startswith(b"GET /a.png HTTP/1.1\r\n") and f"Host: photos.example:{port}".encode() in received[-1]


def _only(name, address):
    def resolve(host, port, *_, **__):
        assert host in (name, address)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    return resolve


def _tls_server(folder):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "photos.example")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("photos.example")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    listening = socket.create_server(("127.0.0.1", 0))
    received = []

    def serve():
        for _ in range(2):  # the first client does not trust the certificate
            client, _ = listening.accept()
            try:
                with context.wrap_socket(client, server_side=True) as wrapped:
                    received.append(wrapped.recv(4096))
                    wrapped.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nover TLS")
            except OSError:
                client.close()
        listening.close()

    threading.Thread(target=serve, daemon=True).start()
    return listening.getsockname()[1], received


def test_policies():
    assert UrlPolicy.parse("") is None and UrlPolicy.parse("0") is None and UrlPolicy.parse(" off ") is None
    mixed = UrlPolicy.parse("1, Photos.Example, inside.example:8080, [::1]:81")
    assert mixed.public and mixed.hosts == {("photos.example", None), ("inside.example", 8080), ("::1", 81)}
    assert mixed.lists("https", "photos.example", 443) and not mixed.lists("http", "photos.example", 8080)
    assert mixed.lists("http", "inside.example", 8080) and not mixed.lists("http", "inside.example", 80)
    for wrong in ("http://photos.example", "*", "*.example", "photos.example/a", "a@b", "host:99999", "[::1"):
        with pytest.raises(ConfigError, match="is not a host"):
            UrlPolicy.parse(wrong)


def test_addresses_of_the_tests_are_what_they_seem():
    """The Teredo address above really carries 127.0.0.1."""
    assert ipaddress.IPv6Address("2001:0:4136:e378:8000:63bf:80ff:fffe").teredo[1] == ipaddress.IPv4Address("127.0.0.1")
