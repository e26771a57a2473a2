"""docs/replay.md: its commands are run and print what the page shows, its table of keys is the code's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from powerd.sim.replay.policies import POLICIES
from powerd.sim.replay.scenario import Scenario
from tests.docs.markdown import ROOT

PAGE = ROOT / "docs" / "replay.md"
_PAIR = re.compile(r"```sh\n(?P<commands>.*?)```\n\n```text\n(?P<shown>.*?)```", re.S)
_KEYS = "## Scenario keys\n"


def keys() -> str:
    """The table of the page's last section."""
    lines = ["| key | default | what |", "|---|---|---|"]
    scenario = Scenario()
    for section in fields(scenario):
        if section.name in ("SM", "SL", "MS", "MM", "ML", "LS", "LM", "LL"):
            continue  # as SS
        for key in fields(getattr(scenario, section.name)):
            label = "`[SS]` .. `[LL]` " if section.name == "SS" else f"`[{section.name}]` "
            shown = str(key.default).lower() if isinstance(key.default, bool) else key.default
            lines.append(f"| {label}`{key.name}` | {shown} | {key.metadata['help']} |")
    return "\n".join(lines) + "\n"


def run(commands: str, folder: Path) -> str:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["sh", "-e", "-c", commands], cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, commands + done.stderr
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip() + "\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page as its commands, run one after the other in one folder, would have it."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "policies").symlink_to(ROOT / "policies")
    text = PAGE.read_text(encoding="utf-8")
    text = _PAIR.sub(lambda m: f"```sh\n{m['commands']}```\n\n```text\n{run(m['commands'], folder)}```", text)
    head, rest = text.split(_KEYS)
    words = rest.split("| key |")[0].rstrip()
    return f"{head}{_KEYS}{words}\n\n{keys()}"


def test_the_page_shows_what_its_commands_print(made: str) -> None:
    if os.environ.get("POWERD_WRITE_GOLDEN"):
        PAGE.write_text(made, encoding="utf-8")
    assert made == PAGE.read_text(encoding="utf-8"), f"POWERD_WRITE_GOLDEN=1 pytest {__file__} writes it anew"


def test_every_policy_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in POLICIES if f"| `{name}` |" not in text] == []
