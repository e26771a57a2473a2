"""Record what a real vLLM on CPU answers, byte by byte as it comes from the socket: streams, refusals, an end in mid-answer.

    python -m tests.replicas.record_answers --vllm VENV/bin/vllm

House rules: as ``record``, whose model and options these are; what is asked is the table ``ASKED``, so that tests know what to
expect; an answer is kept with its head and its framing, so that a test can give it again exactly.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any, Final

from tests.replicas.record import PORT, serving, wait_for

ANSWERS: Final = Path(__file__).parent / "answers"
STREAM: Final[dict[str, Any]] = {
    "model": "tiny", "ignore_eos": True, "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}  # fmt: skip
# As sampled, half of the model's tokens are no whole character, so that many events have no text.
ASKED: Final[dict[str, dict[str, Any] | None]] = {
    "models": None,
    "stream": STREAM | {"prompt": [72, 101, 108, 108, 111], "max_tokens": 24, "temperature": 1.0, "seed": 5},
    "plain": {"model": "tiny", "prompt": "Hello", "max_tokens": 24, "ignore_eos": True, "temperature": 1.0, "seed": 5,
              "stream": True},
    "cut-short": STREAM | {"prompt": [65] * 2040, "max_tokens": 100, "temperature": 0.0},
    "out-of-vocabulary": STREAM | {"prompt": [1000, 2000], "max_tokens": 24},
    "too-long": STREAM | {"prompt": [65] * 3000, "max_tokens": 24},
    "no-such-model": STREAM | {"model": "other", "prompt": [65], "max_tokens": 24},
    "core-killed": STREAM | {"prompt": [72, 101], "max_tokens": 2000, "temperature": 1.0, "seed": 6},
}  # fmt: skip
EVENTS_BEFORE_THE_KILL: Final = 6


def ask(body: dict[str, Any] | None, core: int | None) -> bytes:
    """Everything that the socket gives; ``core`` is killed when it has given some events."""
    data = b"" if body is None else json.dumps(body).encode()
    head = "GET /v1/models" if body is None else "POST /v1/completions"
    lines = (f"{head} HTTP/1.1", f"Host: 127.0.0.1:{PORT}", "Content-Type: application/json", f"Content-Length: {len(data)}",
             "Connection: close", "", "")  # fmt: skip
    with socket.create_connection(("127.0.0.1", PORT), 60) as connection:
        connection.sendall("\r\n".join(lines).encode() + data)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
            if core is not None and answer.count(b"data: ") >= EVENTS_BEFORE_THE_KILL:
                os.kill(core, signal.SIGKILL)
                core = None
    return answer


def core_of(server: int) -> int:
    """The process in which vLLM computes, by the name that it gives itself."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and os.getpgid(int(entry.name)) == server and "EngineCore" in (entry / "cmdline").read_text():
            return int(entry.name)
    sys.exit("vLLM has no EngineCore")


def main() -> None:
    """Serve, ask, end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vllm", required=True, help="the program")
    parser.add_argument("--version", default="0.32.0")
    args = parser.parse_args()
    ANSWERS.mkdir(exist_ok=True)
    with serving(args.vllm) as server:
        wait_for(lambda _: True, 300)
        for name, body in ASKED.items():
            core = core_of(server.pid) if name == "core-killed" else None
            (ANSWERS / f"vllm-{args.version}-{name}.http").write_bytes(ask(body, core))


if __name__ == "__main__":
    main()
