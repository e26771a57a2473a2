"""Server-sent events of ``/v1/stream`` as snapshots and events.

House rules: the heartbeat bounds every wait; what is not understood is passed over, so that newer daemons may say more; the
connection is the stream's own and closes with it.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from powerd.api import SnapshotView
from powerd.client.codec import decode
from powerd.errors import UnavailableError
from powerd.model import Event

if TYPE_CHECKING:
    from powerd.client.core import Client

SILENCE_S = 30.0  # two heartbeats missed: the daemon is gone
_MAX_LINE = 4 << 20


def read(client: Client, hz: float | None, events_only: bool) -> Iterator[SnapshotView | Event]:
    """Yield what the daemon sends; ends in an error, or quietly for a client that only logs."""
    try:
        yield from _read(client, hz, events_only)
    except Exception as error:
        if client.on_error == "raise":
            raise
        client.warn("stream", error)


def _read(client: Client, hz: float | None, events_only: bool) -> Iterator[SnapshotView | Event]:
    transport = client.transport
    connection = transport.fresh()
    query = {"hz": hz, "events": "1" if events_only else None}
    try:
        _, response = transport.open("GET", "/v1/stream", query=query, connection=connection)
        name, data = "", [b""][:0]
        while True:
            connection.until(time.monotonic() + SILENCE_S)
            line = response.readline(_MAX_LINE)
            if not line:
                raise UnavailableError(f"powerd at {transport.where} ended the stream", hint="connect again")
            line = line.rstrip(b"\r\n")
            if line:
                field, _, value = line.partition(b":")
                value = value.removeprefix(b" ")
                if field == b"event":
                    name = value.decode("ascii", "replace")
                elif field == b"data":
                    data.append(value)
                continue
            content, kind, data, name = b"\n".join(data), name, [], ""
            if kind == "snapshot":
                yield decode(SnapshotView, json.loads(content))
            elif kind == "event":
                yield decode(Event, json.loads(content))
    except TimeoutError as error:
        raise UnavailableError(f"powerd at {transport.where} has been silent for {SILENCE_S:g} s", code="timeout") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UnavailableError(f"the stream of {transport.where} broke: {error or type(error).__name__}") from error
    finally:
        connection.close()
