"""Token pace: never slower than promised, never faster than it is worth."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerd_policies.dynamollm.classes import NAMES, Classes, Slo
from powerd_policies.dynamollm.pace import READING_TOKENS_PER_S, Pace


@given(st.floats(0.5, 200.0), st.floats(1.0, 5.0), st.floats(0.005, 2.0))
def test_a_pace_never_loosens_the_slo(rate: float, faster: float, tbt_s: float) -> None:
    allowed_s = Pace(rate, faster=faster).tbt_s("MM", Slo(1.0, tbt_s))
    assert allowed_s <= tbt_s
    assert allowed_s == tbt_s or allowed_s * rate * faster == pytest.approx(1.0)


def test_a_reader_is_served_as_fast_as_he_reads_and_a_batch_as_was_promised() -> None:
    classes = Classes(slos={name: Slo(2.0, 0.5) for name in NAMES})
    paced = Pace(by_class={"LL": None, "SS": 20.0}, faster=1.5).apply(classes)
    assert paced.slos["MM"].tbt_s == pytest.approx(1 / (1.5 * READING_TOKENS_PER_S))
    assert paced.slos["SS"].tbt_s == pytest.approx(1 / 30)
    assert paced.slos["LL"] == classes.slos["LL"]
    assert paced.slos["MM"].ttft_s == 2.0
    assert paced.prompt_bounds == classes.prompt_bounds


def test_what_is_ahead_of_a_reader_shrinks_with_time() -> None:
    pace = Pace(5.0, by_class={"LL": None})
    assert pace.ahead_s("MM", 50, 4.0) == pytest.approx(6.0)
    assert pace.ahead_s("MM", 50, 12.0) == pytest.approx(-2.0)
    assert pace.ahead_s("LL", 50, 12.0) is None


@pytest.mark.parametrize("bad", [{"tokens_per_s": 0.0}, {"by_class": {"SS": -1.0}}, {"faster": 0.5}])
def test_impossible_readers_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"read"):
        Pace(**bad)
