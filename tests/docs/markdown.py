"""Reads what the project's pages show: fenced blocks, indented commands, links.

House rules: nothing of a page is retyped in a test; ``text`` blocks are output, every other fence is something that works
(``python torch`` in the environment with the frameworks: tests/frameworks).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```(\w*(?: torch)?)[^\n]*\n(.*?)^```\s*$", re.M | re.S)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```\s*$|`[^`\n]*`", re.M | re.S)
_COMMENT = re.compile(r"\s+#\s.*$")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{shown(self.page)}:{self.line}"


def shown(page: Path) -> str:
    """A page as a person names it."""
    return page.relative_to(ROOT).as_posix()


def blocks(language: str) -> list[Block]:
    """Every fenced block of a language in all pages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match[1] == language:
                found.append(Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return found


def languages() -> set[str]:
    """The languages that fences state."""
    return {match[1] for page in PAGES for match in _FENCE.finditer(page.read_text(encoding="utf-8"))}


def typed(block: Block) -> list[str]:
    """The commands of a console session, without their comments."""
    return [_COMMENT.sub("", line[2:]) for line in block.text.splitlines() if line.startswith("$ ")]


def indented(page: Path) -> list[str]:
    """The lines of a page's indented code, without their comments; text under a list item is no code."""
    found: list[str] = []
    code, before_blank = False, True
    for line in _FENCE.sub("", page.read_text(encoding="utf-8")).splitlines():
        if line.startswith("    ") and (code or before_blank):
            code = True
            found.append(_COMMENT.sub("", line.strip()))
        elif line.strip():
            code = False
        before_blank = not line.strip()
    return found


def links(page: Path) -> list[str]:
    """The targets of a page's links that lead to a file of this repository."""
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    return [target for target in _LINK.findall(text) if not re.match(r"[a-z]+:|#", target)]
