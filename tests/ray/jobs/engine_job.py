"""A simulated engine whose metrics page is served by another process: ``engine_job.py FOLDER ID METRICS_PORT PORT ENGINE...``.

House rules: the page's process can be killed alone, by the id in ``FOLDER/ID.metrics``; both end when the engine does, and the
engine is told to end as vLLM is, by SIGTERM.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def serve_page(port: int, upstream: str) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                with urllib.request.urlopen(upstream, timeout=2) as answer:
                    body = answer.read()
            except OSError:
                self.send_error(502)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Page).serve_forever()


def main() -> int:
    folder, name, metrics_port, port, *command = sys.argv[1:]
    if command == ["page"]:
        serve_page(int(metrics_port), f"http://127.0.0.1:{port}/metrics")
        return 0
    page = subprocess.Popen([sys.executable, __file__, folder, name, metrics_port, port, "page"], stdin=subprocess.DEVNULL)
    engine = subprocess.Popen([*command, "--port", port], stdin=subprocess.DEVNULL)
    (Path(folder) / f"{name}.metrics").write_text(str(page.pid))
    (Path(folder) / f"{name}.engine").write_text(str(engine.pid))
    signal.signal(signal.SIGTERM, lambda *_: os.kill(engine.pid, signal.SIGTERM))
    code = engine.wait()
    page.kill()
    page.wait()
    return code


if __name__ == "__main__":
    sys.exit(main())
