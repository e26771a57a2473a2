"""docs/api.md out of powerd.api and powerd.errors: ``python -m powerd.apidoc > docs/api.md``; a test keeps it current.

House rules: pure; every word about a route or a code stands where it is defined.
"""
# ruff: noqa: E501 (rows of Markdown tables cannot be wrapped)

from __future__ import annotations

import sys
from dataclasses import fields

from powerd.api import API_HEADER, API_VERSION, LEASE_TOKEN_HEADER, MAX_BODY_BYTES
from powerd.errors import CODES
from powerd.routes import ROUTES
from powerd.solver_child import AT_ONCE, MEMORY_BYTES, TIME_S, WAITING

_HEAD = f"""# The API

Made by `python -m powerd.apidoc`; do not edit. The same as OpenAPI 3.1: `GET /openapi.json`.

HTTP/JSON on the Unix socket `powerd.sock` (mode 0666, every request is authorised by the kernel's peer credentials) and, when
`tcp.listen` is set, on TCP (bearer token; TLS beyond loopback). This is version {API_VERSION[0]}.{API_VERSION[1]}; the header `{API_HEADER}`
states it in every answer and may state the client's in a request: another major version is refused, another minor one served.

    curl --unix-socket /run/powerd/powerd.sock http://powerd/v1/snapshot

Power is in mW, clocks in MHz, energy in mJ (windows in J), times in ns of the daemon's CLOCK_BOOTTIME unless a name ends in `_s`.
What cannot be known is `null`, never 0. GPUs are addressed by UUID. An unknown field is refused with the nearest valid name. A body
is at most {MAX_BODY_BYTES >> 10} KiB, where the table of routes does not say more.

## Who may do what

| caller | sets | reads |
|---|---|---|
| root, the daemon's own user, members of `access.group`, a bearer token over TCP | everything | everything |
| the user of a live lease, a request with its `{LEASE_TOKEN_HEADER}`, a process that runs on the GPU (its PID is among NVML's) | its lease | that GPU at full rate, energy windows and spans on it |
| a user with some process on the GPU | nothing | that GPU at 1 Hz in whole watts, joules and seconds |
| anybody else | nothing | `/v1/node`, `/healthz`, `/openapi.json` |
| everybody, with `access.open_reads = true` | nothing | everything |

A training job belongs to the user whose process reported it first; only that user, and who reads everything, sees it. Who has
neither a lease nor a process on any GPU here reports no job and gets no plan.

A caller in a foreign PID namespace only reads. History, `/metrics` and the energy of others need the right to read everything.

## Leases

`POST /v1/leases` answers with a `token` once all of it is set (or after `wait_s`, with verdict `pending`); a set that fails undoes
the whole lease and is the error. Unless it is `detached`, the holder then connects to `attach.sock` beside the API socket
(SOCK_SEQPACKET) and sends `{{"api": "{API_VERSION[0]}.{API_VERSION[1]}", "lease": ID, "token": TOKEN}}`: the lease lives no longer than this connection and
the process that opened it. The answer, and every later change, is a lease view; the end is an error with code `lease_lost`. After a
restart of powerd, and only then, the same message re-attaches within `daemon.reattach_s`. A lease ends with its TTL unless
`POST /v1/leases/{{id}}/heartbeat` renews it.

## Streams

`GET /v1/stream` sends server-sent events: `snapshot`, `event`, and `heartbeat` when there is nothing else for 5 s. `id` is the number of
the newest event that the client has; `Last-Event-ID` resumes after it. A client that does not read is dropped.

## Energy spans, jobs and plans

`POST /v1/energy/spans` fits the energy of labelled stretches of time after the fact ([energy.md](energy.md#spans)). A job is named
by its path; its events are what its ranks tell: `start`, `step` (with `steps`), `restore` (with the last `step` that is kept),
`checkpoint_begin`, `checkpoint_end`, `exception`, `end`, `note` ([client.md](client.md#jobs)).

`POST /v1/perseus/plan` takes a JOB.json (docs/perseus.md) with `profile_rows` (a list of
`[stage, instruction, frequency, time, energy]`) in place of `profile`, and `deadline`; it answers OUT.json. The plan is made by a
child of the daemon: at most {AT_ONCE} at a time, {MEMORY_BYTES >> 30} GiB and {TIME_S:.0f} s each; `bad_value` says what is wrong with the job or that it is too large,
`too_many` that {AT_ONCE + WAITING} are waiting, `unavailable` what the daemon lacks.

## Routes

| method | path | what it does | request | answer | query |
|---|---|---|---|---|---|
"""


def page() -> str:
    """The whole page as Markdown."""
    lines = []
    for route in ROUTES:
        answer = f"`{route.response.__name__}`{' list' if route.many else ''}" if route.response else route.media
        request = f"`{route.request.__name__}`" if route.request else ""
        if route.max_body_bytes > MAX_BODY_BYTES:
            request += f" at most {route.max_body_bytes >> 20} MiB"
        query = "; ".join(f"`{name}`: {text}" for name, text in route.query.items())
        lines.append(f"| {route.method} | `{route.path}` | {route.summary} | {request} | {answer} | {query} |")
    lines += [
        "",
        "## Errors",
        "",
        'Every error is `{"error": {"code", "message", "hint", "fault"}}`, and nothing was changed.',
        "",
    ]
    lines += ["| code | HTTP | exit code of powerctl | whose fault |", "|---|---|---|---|"]
    lines += [f"| `{c.name}` | {c.http_status} | {c.exit_code} | {c.fault} |" for c in CODES.values()]
    lines += ["", "## Request fields", ""]
    for kind in dict.fromkeys(r.request for r in ROUTES if r.request is not None):
        lines += [f"- `{kind.__name__}`: " + ", ".join(f"`{f.name}`" for f in fields(kind))]
    return _HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
