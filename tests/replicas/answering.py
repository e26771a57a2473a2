"""A server that gives recorded answers of a real vLLM again, byte by byte (`record_answers`), one connection a request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from tests.replicas.record_answers import ANSWERS


def recorded(name: str) -> bytes:
    """An answer with its head and framing."""
    return (ANSWERS / f"vllm-0.32.0-{name}.http").read_bytes()


def body_of(answer: bytes) -> bytes:
    """What a client reads of it."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head:
        return rest
    return b"".join(_unframed(rest))


def _unframed(rest: bytes) -> Iterator[bytes]:
    while (size := int(rest.partition(b"\r\n")[0], 16)) > 0:
        rest = rest.partition(b"\r\n")[2]
        yield rest[:size]
        rest = rest[size + 2 :]


class Answering:
    """Listens on loopback; completions get the ``answers`` in their order, the last of them from then on.

    A second request on a connection is not answered: the connection is gone, as one is that vLLM found idle for too long.
    """

    def __init__(self, *answers: str) -> None:
        self.answers = [recorded(name) for name in answers]
        self.asked: list[dict[str, Any]] = []
        self.gate = asyncio.Event()  # what follows the first event of a stream waits for it
        self.gate.set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Answering:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()

    @property
    def url(self) -> str:
        """Where it listens."""
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            words = [line.split(": ") for line in head.lower().split("\r\n")]
            size = next((int(word[1]) for word in words if word[0] == "content-length"), 0)
            body = await reader.readexactly(size)
            answer = self._answer(head, body)
            answer = answer.replace(b"connection: close\r\n", b"")  # as it would be had it been asked to stay
            begun = answer.find(b"\n\n\r\n") + 4
            writer.write(answer[:begun])
            await self.gate.wait()
            writer.write(answer[begun:])
            await writer.drain()
            await reader.read(1)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()

    def _answer(self, head: str, body: bytes) -> bytes:
        if head.startswith("GET /v1/models"):
            return recorded("models")
        if head.startswith("GET"):
            return b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
        self.asked.append(json.loads(body))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
