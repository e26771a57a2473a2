"""Whatever is killed, and wherever: settings are back at baseline, or at a live lease's value, at the stated deadline."""

import pytest

from tests.faults.campaign import campaign


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_kills_leave_every_setting_where_it_belongs() -> None:
    score = campaign(100, seed=11)
    assert not score.failures, "\n\n".join(score.failures)
    assert not score.unreached, f"kill points that no kill reached: {sorted(score.unreached)}"
    assert sum(score.strikes.values()) >= 100


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_thousand_kills_leave_every_setting_where_it_belongs() -> None:
    score = campaign(1000, seed=12)
    assert not score.failures, "\n\n".join(score.failures)
    assert not score.unreached, f"kill points that no kill reached: {sorted(score.unreached)}"
    assert sum(score.strikes.values()) >= 1000
