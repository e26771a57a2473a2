"""The planner's doors: reports in, the plan and its metrics out, over plain HTTP.

House rules: a bad request is answered with what is wrong with it and changes nothing; bodies are bounded; with a token only its
holders may report (anybody who can connect may read); the standard library's server, a thread per connection, is enough: routers
report once a second and readers every half.
"""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from powerd_integrations.fleet import observed, page
from powerd_integrations.fleet.planner import LivePlanner
from powerd_integrations.fleet.published import to_json

log = logging.getLogger("powerd.fleet")
MAX_BODY_BYTES: Final = 4 * 2**20


class PlannerServer(ThreadingHTTPServer):
    """Serves one planner; ``token``: who reports must hold it."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], planner: LivePlanner, token: str = "") -> None:
        super().__init__(address, _Handler)
        self.planner = planner
        self.token = token

    def handle_error(self, request: object, client_address: object) -> None:
        log.debug("a connection of %s ended early", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: PlannerServer
    protocol_version = "HTTP/1.1"
    server_version = "powerd-fleet"
    timeout = 30.0

    def do_GET(self) -> None:
        planner = self.server.planner
        match urlsplit(self.path).path:
            case "/v1/plan":
                self._json(HTTPStatus.OK, to_json(planner.plan()))
            case "/v1/events":
                rows = [{"at_s": e.at_s, "kind": e.kind, "subject": e.subject, "detail": e.detail} for e in planner.events()]
                self._json(HTTPStatus.OK, {"events": rows})
            case "/metrics":
                self._answer(HTTPStatus.OK, page.page(planner.plan(), planner.figures()).encode(), page.CONTENT_TYPE)
            case "/healthz":
                self._json(HTTPStatus.OK, {"ok": True, "version": planner.plan().version})
            case other:
                self._json(HTTPStatus.NOT_FOUND, {"error": f"no {other}; there are /v1/plan, /v1/events, /metrics, /healthz"})

    def do_POST(self) -> None:
        match urlsplit(self.path).path:
            case "/v1/arrivals":
                self._report(lambda body: {"counted": self.server.planner.add_arrivals(observed.arrivals_from_json(body))})
            case "/v1/instances":
                self._report(self._add_instances)
            case other:
                self.close_connection = True  # its body was not read
                self._json(HTTPStatus.NOT_FOUND, {"error": f"no {other}; there are /v1/arrivals, /v1/instances"})

    def do_DELETE(self) -> None:
        head, _, name = urlsplit(self.path).path.rpartition("/")
        if head != "/v1/instances":
            self._json(HTTPStatus.NOT_FOUND, {"error": "only /v1/instances/NAME can be deleted"})
        elif self._may_report():
            self.server.planner.remove_instance(unquote(name))
            self._json(HTTPStatus.OK, {"ok": True})

    def _add_instances(self, body: Any) -> dict[str, Any]:
        states = observed.instances_from_json(body)
        self.server.planner.add_instances(states)
        return {"counted": len(states)}

    def _report(self, take: Callable[[Any], dict[str, Any]]) -> None:
        size = self.headers.get("Content-Length", "")
        if not size.isdigit() or int(size) > MAX_BODY_BYTES:
            self.close_connection = True
            self._json(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": f"say how long the body is, at most {MAX_BODY_BYTES} bytes"}
            )
            return
        body = self.rfile.read(int(size))
        if not self._may_report():
            return
        try:
            answer = take(json.loads(body))
        except ValueError as error:
            self._json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        else:
            self._json(HTTPStatus.OK, answer)

    def _may_report(self) -> bool:
        given = self.headers.get("Authorization", "")
        if self.server.token and not hmac.compare_digest(given.encode(), f"Bearer {self.server.token}".encode()):
            self._json(HTTPStatus.UNAUTHORIZED, {"error": "who reports must hold the planner's token"})
            return False
        return True

    def _json(self, status: HTTPStatus, document: Any) -> None:
        self._answer(status, json.dumps(document).encode() + b"\n", "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)
