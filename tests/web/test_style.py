"""Colours that everybody can read, in both themes (WCAG 2.2: 4.5 for text, 3 for lines that carry meaning)."""

from __future__ import annotations

import re

import pytest

from powerd.resources import folder

WEB = folder("dashboards") / "web"
TEXT = [
    ("text", "ground"), ("text", "panel"), ("muted", "ground"), ("muted", "panel"), ("accent", "ground"), ("accent", "panel"),
    ("on-accent", "accent"), ("bad", "bad-ground"), ("bad", "panel"), ("warn", "warn-ground"), ("good", "good-ground"),
]  # fmt: skip


def variables(selector: str) -> dict[str, str]:
    """The colours of one theme."""
    block = (WEB / "style.css").read_text(encoding="utf-8").split(selector + " {", 1)[1].split("}", 1)[0]
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


THEMES = {"LIGHT": variables(":root"), "DARK": variables(':root[data-theme="dark"]')}


@pytest.mark.parametrize("theme", THEMES)
def test_text_stands_out(theme: str) -> None:
    colours = THEMES[theme]
    faint = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in TEXT}
    assert {pair: ratio for pair, ratio in faint.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("theme", THEMES)
def test_the_lines_of_a_chart_stand_out(theme: str) -> None:
    line = (WEB / "js" / "colours.js").read_text(encoding="utf-8").split(f"const {theme} = [", 1)[1].split("]", 1)[0]
    found = re.findall(r"#[0-9a-f]{6}", line)
    assert len(set(found)) == 8
    assert {c: contrast(c, THEMES[theme]["panel"]) for c in found if contrast(c, THEMES[theme]["panel"]) < 3} == {}


def test_both_themes_define_the_same() -> None:
    assert THEMES["LIGHT"].keys() == THEMES["DARK"].keys()
