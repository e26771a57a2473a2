"""One request on its way to its handler: who asks, what the query says, how the answer is put.

House rules: unknown query parameters are refused with the nearest valid name; nothing here knows what a route does.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from aiohttp import web

from powerd.access import Principal, Rules
from powerd.api import LEASE_TOKEN_HEADER
from powerd.attach import AttachServer
from powerd.decode import nearest
from powerd.errors import RequestError
from powerd.lease import Lease

Handler = Callable[["Call"], Awaitable[web.StreamResponse]]
_AGO = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(slots=True)
class Call:
    """One request with who makes it; ``pidfd`` gives a descriptor of the caller's process that the caller of it closes."""

    request: web.Request
    who: Principal
    rules: Rules
    headers: dict[str, str]
    pidfd: Callable[[], int | None]

    @property
    def token(self) -> str | None:
        """The lease token that came along."""
        return self.request.headers.get(LEASE_TOKEN_HEADER)

    def query(self, *known: str) -> dict[str, str]:
        """The query parameters; an unknown one is an error."""
        for name in self.request.query:
            if name not in known:
                hint = nearest(name, list(known)) if known else "this route takes none"
                raise RequestError(f"unknown query parameter {name!r}", hint=hint)
        return dict(self.request.query)

    def answer(self, content: object, status: int = 200) -> web.Response:
        """A JSON answer."""
        return self.raw(msgspec.json.encode(content), status)

    def raw(self, body: bytes, status: int = 200) -> web.Response:
        """An answer that is encoded already."""
        return web.Response(body=body, status=status, content_type="application/json", headers=self.headers)


def number(query: dict[str, str], name: str, default: float, low: float, high: float) -> float:
    """A number of the query in ``low..high``; ``default`` when it is not given."""
    text = query.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise RequestError(f"{name}={text[:40]}: a number in {low:g}..{high:g} is needed", code="bad_value")
    return value


class Watch:
    """Hands the holder's pidfd to the attach server once the lease stands; closes it when it does not come to that."""

    def __init__(self, attach: AttachServer, pidfd: int | None) -> None:
        self._attach, self._pidfd = attach, pidfd

    def __call__(self, lease: Lease) -> None:
        if self._pidfd is not None:
            pidfd, self._pidfd = self._pidfd, None
            self._attach.watch_holder(lease, pidfd)

    def close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)


def moment(text: str, now_s: float) -> float:
    """Unix seconds, or a span like 15m, 2h, 7d before now."""
    if match := _AGO.fullmatch(text):
        return now_s - float(match[1]) * _UNITS_S[match[2]]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"{text[:40]!r} is no time", hint="Unix seconds, or 90s, 15m, 2h, 7d ago", code="bad_value")
    return value
