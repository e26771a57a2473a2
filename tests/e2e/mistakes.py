"""A mistake as a row of a table, and what its answer must be: one clear line that says what to do.

House rules: the node holds a lease all the while, so that undoing too much shows as well as setting too much; a driver call
is a change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from powerd.client import Lease
from powerd.errors import CODES
from tests.e2e.live import Answer, LiveNode

UNKNOWN = "GPU-00000000-0000-0000-0000-000000000000"
MAX_LINE = 400
ALSO_RUN = ("unknown key", "TCP address", "token file that everybody reads")  # starting the daemon takes longer


@dataclass(frozen=True)
class Case:
    """A mistake (name and how it is made), the code that must come back, and words that the answer must have."""

    name: str
    how: Callable[[LiveNode, Lease], Answer]
    code: int | str  # an exit code, or a name of powerd.errors.CODES for answers of the API
    words: tuple[str, ...]


def ctl(name: str, line: str, code: int, *words: str) -> Case:
    """A mistake on powerctl's command line."""
    return Case(name, lambda live, held: live.powerctl(*_words(line, live, held)), code, words)


def daemon(name: str, line: str, code: int, *words: str, **env: str) -> Case:
    """A mistake on powerd's command line."""
    return Case(name, lambda live, held: live.powerd(*_words(line, live, held), env=env), code, words)


def config(name: str, text: str, *words: str, mode: int = 0o644) -> Case:
    """A configuration file that powerd refuses to start with, whoever asks it."""

    def how(live: LiveNode, held: Lease) -> Answer:
        file = live.root / "bad.toml"
        file.write_bytes(text.format(root=live.root).encode("latin-1"))
        file.chmod(mode)
        answer = live.powerd("check-config", str(file))
        if name in ALSO_RUN:
            assert live.powerd("run", "--config", str(file)) == answer, "what check-config refuses, run refuses in the same words"
        return answer

    return Case(f"config: {name}", how, 78, words)


def api(name: str, method: str, path: str, body: Any, code: str, *words: str, tcp: bool = False, **headers: str) -> Case:
    """A request that is wrong; ``{id}``, ``{gpu}`` and ``{gpu1}`` in path and body stand for what is there."""

    def how(live: LiveNode, held: Lease) -> Answer:
        data = body if isinstance(body, bytes) or body is None else json.loads(fill(json.dumps(body), live, held))
        return live.http(method, fill(path, live, held), data, tcp=tcp, **headers)

    return Case(f"api: {name}", how, code, words)


def attach(name: str, message: bytes | dict[str, str], code: str, *words: str) -> Case:
    """A first message on the attach socket that is wrong."""

    def how(live: LiveNode, held: Lease) -> Answer:
        data = message if isinstance(message, bytes) else fill(json.dumps(message), live, held).encode()
        return live.attach(data)

    return Case(f"attach: {name}", how, code, words)


def stranger(name: str, method: str, path: str, body: Any, code: str, *words: str) -> Case:
    """A request that needs a right, by a user who has none."""

    def how(live: LiveNode, held: Lease) -> Answer:
        data = None if body is None else json.loads(fill(json.dumps(body), live, held))
        return live.http_as_nobody(method, fill(path, live, held), data)

    return Case(f"stranger: {name}", how, code, words)


def fill(text: str, live: LiveNode, held: Lease) -> str:
    places = {
        "{id}": held.id,
        "{token}": held.token or "",
        "{gpu}": live.uuids[0],
        "{gpu1}": live.uuids[1],
        "{root}": str(live.root),
    }
    return re.sub("|".join(map(re.escape, places)), lambda match: places[match[0]], text)


def _words(line: str, live: LiveNode, held: Lease) -> list[str]:
    return fill(line, live, held).split()


def lease_body(**changes: Any) -> dict[str, Any]:
    """A good request for a lease on GPU 0, with something changed."""
    good = {"gpus": ["{gpu}"], "wants": [{"control": "sm_clock", "high": 1200}], "reason": "test", "detached": True}
    return {**good, **changes}


def clock(**bounds: Any) -> list[dict[str, Any]]:
    """One want for the SM clock."""
    return [{"control": "sm_clock", **bounds}]


def assert_one_line(case: Case, answer: Answer, live: LiveNode, held: Lease) -> None:
    """Exactly one line, short enough to be read, with the words that say what is wrong and what to do."""
    assert answer.code == case.code, (answer.out, answer.err)
    assert answer.out == "", "a refusal is no result"
    assert len(answer.lines) == 1, answer.err
    line = answer.lines[0]
    assert re.match(r"(powerctl|powerd-hw|powerd)( [a-z-]+){0,2}: ", line), line
    assert len(line) <= MAX_LINE, line
    assert [word for word in case.words if fill(word, live, held) not in line] == [], line


def assert_one_error(case: Case, answer: Answer, live: LiveNode, held: Lease) -> None:
    """Exactly one ErrorView, complete and of the right code."""
    code = CODES[str(case.code)]
    content = answer.json()
    assert list(content) == ["error"], content
    error = content["error"]
    assert error["code"] == code.name, error
    assert error["fault"] == code.fault.value
    text = f"{error['message']} ({error['hint']})"
    assert "\n" not in text
    assert len(text) <= MAX_LINE, text
    assert [word for word in case.words if fill(word, live, held) not in text] == [], text
