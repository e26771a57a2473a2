"""Configuration as text: what is valid comes back as it was, what is not is refused as a whole and named."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerd.config import Config, keys, parse, sections
from powerd.errors import ConfigError
from powerd.hwchild import toml

_FIELDS = {(name, f.name): f for name in sections() for f in fields(type(getattr(Config(), name)))}


@st.composite
def valid(draw: st.DrawFn) -> tuple[str, str, Any]:
    section, key, default, _ = draw(st.sampled_from([k for k in keys() if k[0] not in ("limits", "baseline")]))
    bounds = _FIELDS[section, key].metadata
    if bounds["one_of"]:
        return section, key, draw(st.sampled_from(bounds["one_of"]))
    if isinstance(default, bool):
        return section, key, draw(st.booleans())
    if isinstance(default, str):
        return section, key, draw(st.text(st.sampled_from('aZ9 _/.\\"\n\t#=[]äλ€😀\x7f'), max_size=20))
    number = st.integers if isinstance(default, int) else st.floats
    return section, key, draw(number(bounds["low"], bounds["high"]))


@given(st.lists(valid(), max_size=5))
def test_a_configuration_survives_being_written_and_read(changes: list[tuple[str, str, Any]]) -> None:
    config = Config()
    for section, key, value in changes:
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    assert parse(toml(config)) == config


@given(valid(), st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"), min_size=1, max_size=12))
def test_an_unknown_key_refuses_the_whole_text_and_is_named_with_its_line(change: tuple[str, str, Any], name: str) -> None:
    section = change[0]
    known = {f.name for f in fields(type(getattr(Config(), section)))}
    if name in known:
        name += "_x"
    with pytest.raises(ConfigError, match=rf"powerd\.toml:2: unknown key {section}\.{name}"):
        parse(f"[{section}]\n{name} = 1\n")
