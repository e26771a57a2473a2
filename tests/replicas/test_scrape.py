"""Reading pages over real sockets: where a page may be, how much is read, and everything a server may do instead of answering."""

from __future__ import annotations

import asyncio
import gzip
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from powerd import scrape
from powerd.enginepage import PageError, parse
from powerd.errors import RequestError
from powerd.scrape import NoPageError, Reader, Source, source_of
from tests.replicas.engine import Endpoint, Engine


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    one = Endpoint(Engine(running=3))
    yield one
    one.close()


def read(source: Source, uid: int = 0, timeout_s: float = 5.0) -> str:
    async def once() -> str:
        reader = Reader(source, uid, timeout_s)
        try:
            return await reader.read()
        finally:
            await reader.close()

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("url", "goes_to"),
    [
        ("http://127.0.0.1:8000/metrics", "http://127.0.0.1:8000/metrics"),
        ("http://127.8.9.1:8000/metrics", "http://127.8.9.1:8000/metrics"),
        ("http://[::1]:8000/metrics", "http://[::1]:8000/metrics"),
        ("http://localhost:8000/metrics", "http://127.0.0.1:8000/metrics"),
        ("http://localhost", "http://127.0.0.1:80/"),
        ("http://engine.example:8000/metrics", "http://engine.example:8000/metrics"),
        ("http://ENGINE.example:8000/metrics", "http://engine.example:8000/metrics"),
        ("http://10.1.2.3:8000/metrics", "http://10.1.2.3:8000/metrics"),
    ],
)
def test_pages_of_this_host_and_of_allowed_hosts_may_be_read(url: str, goes_to: str) -> None:
    assert source_of(url, "engine.example, 10.1.2.3") == Source(goes_to)


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data", "http://10.0.0.1:8000/metrics", "http://example.org/metrics",
        "http://0.0.0.0:8000/metrics", "http://[::]:8000/metrics", "http://[fe80::1]/metrics", "http://[::ffff:10.0.0.1]/metrics",
        "http://2130706433:8000/metrics", "http://0x7f.1:8000/metrics", "http://127.1:8000/metrics", "http://localhost.:80/metrics",
        "http://127.0.0.1.example.org/metrics", "http://127.0.0.1@example.org/metrics", "http://user:pw@127.0.0.1/metrics",
        "https://127.0.0.1/metrics", "ftp://127.0.0.1/metrics", "file:///etc/passwd", "gopher://127.0.0.1/", "127.0.0.1:8000",
        "http://127.0.0.1:8000/metrics?format=x", "http://127.0.0.1:8000/metrics#x", "http://127.0.0.1:8000/a b",
        "http://127.0.0.1:8000/%0d%0aHost:x", "http://127.0.0.1:8000/\r\nHost: x", "http://127.0.0.1:99999/metrics",
        "http://127.0.0.1:0/metrics", "http:///metrics", "http://", "", "http://127.0.0.1/" + "a" * 400, "http://127.0.0.1/\u00e4",
        "unix:relative.sock:/metrics", "unix:/run/../etc/x:/metrics", "unix:/run/x.sock:metrics", "unix:", "http://[::1/metrics",
    ],
)  # fmt: skip
def test_everything_else_is_refused_with_what_would_be_right(url: str) -> None:
    with pytest.raises(RequestError) as refused:
        source_of(url, "")
    assert refused.value.code.name == "bad_value"
    assert refused.value.hint


def test_a_page_is_read_again_and_again_over_one_connection(endpoint: Endpoint) -> None:
    async def thrice() -> list[int]:
        reader = Reader(source_of(endpoint.url, ""), 0, 5.0)
        try:
            found = []
            for running in (3, 4, 5):
                endpoint.engine.running = running
                found.append(parse(await reader.read()).running)
            return found
        finally:
            await reader.close()

    assert asyncio.run(thrice()) == [3, 4, 5]
    assert endpoint.connections == 1


def test_a_unix_socket_of_the_same_user_is_read_and_that_of_another_is_not() -> None:
    folder = Path(tempfile.mkdtemp(prefix="pd-"))
    try:
        one = Endpoint(Engine(running=3), folder / "e.sock")
        source = source_of(one.url, "")
        assert parse(read(source, uid=os.geteuid())).running == 3
        with pytest.raises(NoPageError, match="not a socket of user 65534"):
            read(source, uid=65534)
        (folder / "file").write_text("secret\n")
        with pytest.raises(NoPageError, match="not a socket"):
            read(source_of(f"unix:{folder}/file:/metrics", ""), uid=65534)
        asked = one.asked
        one.close()
        assert asked == 1
    finally:
        shutil.rmtree(folder)


def test_nobody_there_is_no_page() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(NoPageError, match=r"[Cc]onnect"):
            read(Source(f"http://127.0.0.1:{taken.getsockname()[1]}/metrics"))


def test_a_redirect_is_not_followed(endpoint: Endpoint) -> None:
    other = Endpoint(Engine())
    endpoint.status, endpoint.headers = 302, {"Location": other.url}
    with pytest.raises(NoPageError, match="HTTP 302"):
        read(Source(endpoint.url))
    assert other.asked == 0
    other.close()


@pytest.mark.parametrize("status", [404, 500, 503])
def test_an_error_is_no_page(endpoint: Endpoint, status: int) -> None:
    endpoint.status = status
    with pytest.raises(NoPageError, match=f"HTTP {status}"):
        read(Source(endpoint.url))


def test_who_does_not_answer_in_time_is_left(endpoint: Endpoint) -> None:
    endpoint.release.clear()
    with pytest.raises(NoPageError, match="in time"):
        read(Source(endpoint.url), timeout_s=0.2)
    endpoint.release.set()


def test_an_endless_page_is_left_when_it_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape, "MAX_BYTES", 1 << 20)
    sent = 0
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            nonlocal sent
            link, _ = server.accept()
            with link:
                link.recv(65536)
                link.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
                try:
                    while True:
                        sent += link.send(b"vllm:num_requests_running 1\n" * 1000)
                except OSError:
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(PageError, match="larger than 1 MiB"):
            read(Source(f"http://127.0.0.1:{server.getsockname()[1]}/metrics"))
        thread.join(10)
    assert sent < 64 << 20


def test_a_page_that_ends_before_its_length_is_cut_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            link, _ = server.accept()
            with link:
                link.recv(65536)
                link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nvllm:num_requests_running 1\n")

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(PageError, match="cut off"):
            read(Source(f"http://127.0.0.1:{server.getsockname()[1]}/metrics"))
        thread.join(10)


def test_what_is_no_http_is_no_page() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            link, _ = server.accept()
            with link:
                link.recv(65536)
                link.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(NoPageError):
            read(Source(f"http://127.0.0.1:{server.getsockname()[1]}/metrics"))
        thread.join(10)


def test_a_compressed_page_is_not_unpacked(endpoint: Endpoint) -> None:
    endpoint.headers, endpoint.text = {"Content-Encoding": "gzip"}, gzip.compress(b"0" * (64 << 20))
    with pytest.raises(PageError, match="compressed"):
        read(Source(endpoint.url))


def test_bytes_that_are_no_text_are_no_page(endpoint: Endpoint) -> None:
    endpoint.text = b"vllm:num_requests_running \xff\xfe\n"
    with pytest.raises(PageError, match="no text"):
        read(Source(endpoint.url))
