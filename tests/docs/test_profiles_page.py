"""docs/profiles.md: its commands print what the page shows, and it lists what is assumed and what a file holds."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

from powerd_policies.dynamollm import fit, profile_file, steady
from tests.docs.markdown import ROOT

PAGE = ROOT / "docs" / "profiles.md"
_PAIR = re.compile(r"```sh\n(?P<commands>.*?)```\n\n```text\n(?P<shown>.*?)```", re.S)


def test_the_page_shows_what_its_commands_print(tmp_path: Path) -> None:
    (tmp_path / "policies").symlink_to(ROOT / "policies")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
    text = PAGE.read_text(encoding="utf-8")
    made = text
    pairs = list(_PAIR.finditer(text))
    for match in pairs:
        done = subprocess.run(
            ["sh", "-e", "-c", match["commands"]], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )  # fmt: skip
        assert done.returncode == 0, match["commands"] + done.stderr
        made = made.replace(match[0], f"```sh\n{match['commands']}```\n\n```text\n{done.stdout}```")
    if os.environ.get("POWERD_WRITE_GOLDEN"):
        PAGE.write_text(made, encoding="utf-8")
    assert len(pairs) == 3
    assert made == PAGE.read_text(encoding="utf-8"), f"POWERD_WRITE_GOLDEN=1 pytest {__file__} writes it anew"


def test_every_assumption_is_on_the_page_with_its_default() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for field in dataclasses.fields(fit.Assumptions):
        row = re.search(rf"^\| `{field.name}` \| ([\d.]+) \|", text, re.M)
        assert row is not None, field.name
        assert float(row[1]) == field.default


def test_every_column_and_every_limit_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [column for column in profile_file.COLUMNS if f"`{column}`" not in text] == []
    assert [limit for limit in get_args(steady.Limit) if f"`{limit}`" not in text] == []
