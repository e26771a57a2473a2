"""A metrics page as an engine serves it, made from a few numbers, and a server of it that a test may break in every way.

The names and buckets are those of the pages recorded from vLLM 0.32.0 (`pages`); a page has the help and the unrelated metrics
of a real one left out.
"""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TTFT_EDGES = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
              640.0, 2560.0)  # fmt: skip
LENGTH_EDGES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
GAP_EDGES = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)


@dataclass
class Engine:
    """One engine's counters; ``page`` is what it serves."""

    running: float = 0
    waiting: float = 0
    kv: float = 0.1
    prompt_tokens: float = 0
    output_tokens: float = 0
    preemptions: float = 0
    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    prompts: list[float] | None = None  # tokens of those that have ended; None: no such histogram
    labels: str = 'engine="0",model_name="test"'
    requests_per_s: float = 0  # from now on, by themselves: 300 prompt tokens, answered in 0.2 s, and 20 tokens 0.03 s apart
    long_tokens: int = 0  # not 0: beside each of them one with so many prompt tokens, answered in 2 s
    _due: float = 0
    _at_s: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def page(self) -> str:
        """What it serves now, the same in all its parts."""
        with self._lock:
            return self._page()

    def _page(self) -> str:
        now_s = time.monotonic()
        passed_s, self._at_s = now_s - self._at_s, now_s
        self._due += self.requests_per_s * passed_s
        while self._due >= 1:
            self._due -= 1
            self.prompt_tokens += 300
            self.output_tokens += 20
            self.ttft.append(0.2)
            self.gaps += [0.03] * 20
            if self.prompts is not None:
                self.prompts.append(300)
            if self.long_tokens:
                self.prompt_tokens += self.long_tokens
                self.ttft.append(2.0)
                if self.prompts is not None:
                    self.prompts.append(self.long_tokens)
        lines = [
            line
            for name, kind, value in (
                ("num_requests_running", "gauge", self.running), ("num_requests_waiting", "gauge", self.waiting),
                ("kv_cache_usage_perc", "gauge", self.kv), ("prompt_tokens_total", "counter", self.prompt_tokens),
                ("generation_tokens_total", "counter", self.output_tokens),
                ("num_preemptions_total", "counter", self.preemptions),
            )
            for line in (f"# TYPE vllm:{name} {kind}", f"vllm:{name}{{{self.labels}}} {value}")
        ]  # fmt: skip
        for name, edges, seen in (
            ("time_to_first_token_seconds", TTFT_EDGES, self.ttft), ("inter_token_latency_seconds", GAP_EDGES, self.gaps),
            ("request_prompt_tokens", LENGTH_EDGES, self.prompts),
        ):  # fmt: skip
            if seen is None:
                continue
            lines.append(f"# TYPE vllm:{name} histogram")
            for edge in (*edges, float("inf")):
                le = "+Inf" if edge == float("inf") else repr(edge)
                lines.append(f'vllm:{name}_bucket{{{self.labels},le="{le}"}} {float(sum(v <= edge for v in seen))}')
            lines.append(f"vllm:{name}_count{{{self.labels}}} {float(len(seen))}")
            lines.append(f"vllm:{name}_sum{{{self.labels}}} {sum(seen)}")
        return "\n".join(lines) + "\n"


class _UnixServer(http.server.ThreadingHTTPServer):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)


class Endpoint:
    """Serves ``content()`` at /metrics on loopback or a Unix socket; counts who asked."""

    def __init__(self, engine: Engine, path: Path | None = None, port: int = 0) -> None:
        self.engine = engine
        self.text: str | bytes | None = None  # instead of the engine's page
        self.status = 200
        self.headers: dict[str, str] = {}
        self.asked = self.connections = 0
        self.release = threading.Event()
        self.release.set()
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                endpoint.connections += 1
                super().setup()

            def do_GET(self) -> None:
                endpoint.asked += 1
                endpoint.release.wait(30)
                body: Any = endpoint.text if endpoint.text is not None else endpoint.engine.page()
                body = body if isinstance(body, bytes) else body.encode()
                self.send_response(endpoint.status)
                for name, value in endpoint.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle()

            def address_string(self) -> str:
                return "test"

            def log_message(self, *_: object) -> None:
                return None

        address: Any = str(path) if path else ("127.0.0.1", port)
        self._server = (_UnixServer if path else http.server.ThreadingHTTPServer)(address, Handler)
        self._server.daemon_threads = True
        self.port = 0 if path else int(self._server.server_address[1])
        self.url = f"unix:{path}:/metrics" if path else f"http://127.0.0.1:{self.port}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nobody listens any more; open connections are cut with the next answer."""
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
        self.status, self.text, self.headers = 503, "", {"Connection": "close"}
