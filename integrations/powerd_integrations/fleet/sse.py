"""What a router reads in an engine's event stream while it passes it on.

House rules: a stream is passed on as it is, reading changes no byte; an engine's own error is told from its tokens, and
whose fault it is from its code.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import aiohttp

DONE: Final = b"[DONE]"


@dataclass(frozen=True, slots=True)
class EngineError:
    """An engine's error in a stream that began with status 200, as vLLM sends them; a code below 500 blames the request."""

    message: str
    code: int

    @property
    def refused(self) -> bool:
        """Whether every other replica would say the same."""
        return self.code < 500


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its text, how many tokens it says the answer has so far (None: it does not), and whether it may hold one."""

    text: str = ""
    tokens: int | None = None
    counts: bool = False
    error: EngineError | None = None
    done: bool = False


def read(event: bytes) -> Event:
    """Read an event or a line of one; what is none of an engine's is an empty one.

    A token need not be text: of a character in several tokens only the last has any.
    """
    data = event.strip().removeprefix(b"data:").strip()
    if data == DONE:
        return Event(done=True)
    try:
        document = json.loads(data)
        if "error" in document:
            return Event(error=_error(document["error"]))
        choices = document.get("choices") or []
        text = "".join(str(c.get("text") or (c.get("delta") or {}).get("content") or "") for c in choices)
        told = (document.get("usage") or {}).get("completion_tokens")
        counts = any(_may_hold(choice) for choice in choices)
        return Event(text, None if told is None else int(told), counts)
    except (ValueError, AttributeError, TypeError):
        return Event()


def _may_hold(choice: Any) -> bool:
    text, delta = choice.get("text"), choice.get("delta")
    if text is None and delta is not None:
        return bool(delta) and "role" not in delta  # a chat begins with whose turn it is
    return bool(text) or not choice.get("finish_reason")


def _error(error: Any) -> EngineError:
    told = error if isinstance(error, dict) else {"message": str(error)}
    code = told.get("code")
    return EngineError(str(told.get("message", "an error"))[:200], code if isinstance(code, int) and 400 <= code < 600 else 500)


class Watch:
    """Follows a stream that is passed on piece by piece, however it is cut."""

    def __init__(self) -> None:
        self.events = 0  # whole ones; comments that keep a connection alive are none
        self.done = False
        self.error: EngineError | None = None
        self._rest = b""

    def take(self, piece: bytes) -> None:
        """Take the next piece."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self.events += 1
                # Nothing else is parsed: a router has better things to do with every token.
                if line[5:16].lstrip().startswith((b'{"error"', DONE)):
                    event = read(line)
                    self.done, self.error = self.done or event.done, self.error or event.error


async def pieces(answer: aiohttp.ClientResponse, watch: Watch, silence_s: float | None) -> AsyncIterator[bytes]:
    """What an engine says, as it comes; ConnectionError, TimeoutError when it breaks off.

    A whole answer is kept back until it is whole, and a stream until its first event is, so that a request whose engine failed
    before that can be sent elsewhere.
    """
    if not answer.headers.get("Content-Type", "").startswith("text/event-stream"):
        yield await answer.read()
        return
    held: list[bytes] = []
    while True:
        async with asyncio.timeout(silence_s):
            piece = await answer.content.readany()
        if not piece:
            break
        began = watch.events > 0
        watch.take(piece)
        if began:
            yield piece
            continue
        held.append(piece)
        if watch.error is not None and not watch.error.refused:
            raise ConnectionError(watch.error.message)
        if watch.events:
            yield b"".join(held)
    # An engine that is killed may close a connection as one that has finished does.
    if not watch.done:
        raise ConnectionError("the stream ended before [DONE]")
