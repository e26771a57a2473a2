"""Quantities as people write them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerd import units
from powerd.errors import EXIT_USAGE, RequestError


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (units.power_mw, "300W", 300_000), (units.power_mw, "0.3kW", 300_000), (units.power_mw, " 299.5 w ", 299_500),
        (units.power_mw, "250000mW", 250_000), (units.clock_mhz, "1200MHz", 1200), (units.clock_mhz, "1.2GHz", 1200),
        (units.clock_mhz, "1.41ghz", 1410), (units.energy_j, "500J", 500.0), (units.energy_j, "1kWh", 3.6e6),
        (units.duration_s, "10m", 600.0), (units.duration_s, "1h30m", 5400.0), (units.duration_s, "500ms", 0.5),
        (units.share, "5%", 0.05), (units.share, "0.1", 0.1), (units.share, "0", 0.0),
    ],
)  # fmt: skip
def test_what_is_understood(read: Callable[[str], float], text: str, value: float) -> None:
    assert read(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("read", "text", "words"),
    [
        (units.power_mw, "300", "has no unit"), (units.clock_mhz, "1200", "write it like 1200MHz"),
        (units.duration_s, "10", "has no unit"), (units.power_mw, "300MHz", "no unit of a power"),
        (units.clock_mhz, "300W", "no unit of a clock"), (units.power_mw, "3MW", "ambiguous"),
        (units.power_mw, "-3W", "above zero"), (units.clock_mhz, "1200.5MHz", "whole number"),
        (units.clock_mhz, "", "is not a clock"),
        (units.duration_s, "1h30", "is not a duration"), (units.share, "5", "between 0 and 100"), (units.share, "x", "like 5%"),
    ],
)  # fmt: skip
def test_what_is_refused_says_what_to_write(read: Callable[[str], float], text: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        read(text)
    assert caught.value.code.exit_code == EXIT_USAGE


@given(st.integers(1, 2000))
def test_units_of_one_quantity_agree(value: int) -> None:
    assert units.power_mw(f"{value}W") == units.power_mw(f"{value / 1000}kW") == value * 1000
    assert units.clock_mhz(f"{value}MHz") == units.clock_mhz(f"{value * 1000}kHz") == value


@given(st.text(max_size=12))
def test_any_text_is_a_value_or_a_refusal_with_a_remedy(text: str) -> None:
    for read in (units.power_mw, units.clock_mhz, units.energy_j, units.duration_s, units.share):
        try:
            value = read(text)
        except RequestError as error:
            remedy = error.hint
        else:
            remedy = "write nothing else" if value >= 0 else ""
        assert "write" in remedy


def test_unknown_is_a_dash_for_people() -> None:
    assert (units.watts(None), units.megahertz(None), units.joules(None)) == ("-", "-", "-")
    assert (units.watts(312_400), units.megahertz(1200), units.joules(123.4), units.joules(45_600)) == (
        "312 W", "1200 MHz", "123.4 J", "45.60 kJ",
    )  # fmt: skip
