"""Grafana's types, TypeScript and InfluxData's Flux front end, from npm, for checking the dashboards.

House rules: exact versions with checksums (package-lock.json), installed once into a cache folder; what cannot be had skips its
test and says why; with CI=true it fails.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.real.servers import unavailable

HERE = Path(__file__).parent
_FILES = ("package.json", "package-lock.json")
# JSON has the text of an enum's value, which TypeScript does not take for the enum itself; nothing else is made looser.
_PLAIN = (
    "type Plain<T> = 0 extends 1 & T ? T : T extends string ? `${T}` : T extends (infer U)[] ? Plain<U>[] : "
    "T extends object ? { [K in keyof T]: Plain<T[K]> } : T;"
)


def modules() -> Path:
    """The node_modules folder with what package-lock.json names."""
    if not (shutil.which("node") and shutil.which("npm")):
        unavailable("node and npm are missing: apt-get install nodejs npm")
    content = b"".join((HERE / name).read_bytes() for name in _FILES)
    top = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "powerd-test-npm"
    top.mkdir(parents=True, exist_ok=True)
    folder = top / hashlib.sha256(content).hexdigest()[:16]
    with (top / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name in _FILES:
                shutil.copy(HERE / name, folder)
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
            if done.returncode:
                unavailable(f"npm ci: {done.stderr.strip()[-400:]}")
            (folder / "complete").touch()
    return folder / "node_modules"


def flux_is_valid(scripts: Mapping[str, str]) -> dict[str, bool]:
    """What the Flux compiler says of each script."""
    package = modules() / "@influxdata" / "flux-lsp-browser"
    command = ["node", str(HERE / "flux_check.mjs"), str(package)]
    done = subprocess.run(command, input=json.dumps(dict(scripts)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answers: dict[str, bool] = json.loads(done.stdout)
    return answers


def flux_script(query: str) -> str:
    """A dashboard's query as Grafana sends it: its variables filled in, ``v`` defined."""
    query = re.sub(r"\$\{\w+:regex\}", ".*", query)
    assert "$" not in re.sub(r"\$/", "/", query), f"a variable is left: {query}"
    imports = [line for line in query.splitlines() if line.startswith("import ")]
    rest = [line for line in query.splitlines() if not line.startswith("import ")]
    v = 'v = {timeRangeStart: -1h, timeRangeStop: now(), windowPeriod: 10s, defaultBucket: "powerd", organization: "powerd"}'
    return "\n".join([*imports, v, *rest])


def type_errors(declarations: Mapping[str, tuple[str, Any]], folder: Path) -> str:
    """TypeScript's complaints about values: name -> (type of @grafana/schema, value); empty when there are none."""
    (folder / "node_modules").symlink_to(modules())
    lines = [f'import type {{ {", ".join(sorted({kind for kind, _ in declarations.values()}))} }} from "@grafana/schema";']
    lines += [_PLAIN]
    lines += [f"export const {name}: Plain<{kind}> = {json.dumps(value)};" for name, (kind, value) in declarations.items()]
    (folder / "check.ts").write_text("\n".join(lines))
    options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--moduleResolution", "nodenext"]
    command = [str(folder / "node_modules" / ".bin" / "tsc"), *options, "check.ts"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    return done.stdout + done.stderr
