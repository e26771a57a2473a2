"""Whatever people call their jobs and write as reasons, the real engine reads back what powerd meant, and nothing else."""

from __future__ import annotations

import itertools
import urllib.request

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from powerd.sinks.lines import line, tag, text_field
from tests.real.front import Front
from tests.real.servers import Influxd

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("influx")]

BUCKET = "escaping"
_rounds = itertools.count()
# Everything that line protocol gives a meaning to comes often, everything else sometimes.
TEXT = st.text(st.one_of(st.sampled_from(list(" ,=\"'\\\n\r\t#\x00ab")), st.characters()), max_size=40)
ROWS = st.lists(
    st.tuples(TEXT, TEXT, st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), st.booleans()),
    min_size=1,
    max_size=200,
)


def _write(url: str, body: str) -> None:
    request = urllib.request.Request(f"{url}/api/v2/write?org=o&bucket={BUCKET}&precision=ms", body.encode())
    request.add_header("Authorization", "Token the-right-token")
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.status == 204


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_the_engine_reads_back_every_tag_and_every_field(
    rows: list[tuple[str, str, int, float, bool]], influxd: Influxd, influx_front: Front
) -> None:
    influxd.create(BUCKET)
    measurement = f"m{next(_rounds)}"
    made = [
        line(measurement, {"host": "h", "job": job}, {"s": text, "i": whole, "f": number, "b": flag}, 1_790_000_000_000 + n)
        for n, (job, text, whole, number, flag) in enumerate(rows)
    ]
    lines = [one for one in made if one is not None]
    assert len(lines) == len(rows)
    assert all("\n" not in one for one in lines)
    _write(influx_front.url, "\n".join(lines))
    (series,) = influxd.query(f"select s, i, f, b, job from {measurement}", BUCKET)
    assert len(series["values"]) == len(rows)
    for (job, text, whole, number, flag), values in zip(rows, series["values"], strict=True):
        _, got_text, got_whole, got_number, got_flag, got_job = values
        assert (got_text, got_whole, got_flag) == (text_field(text), whole, flag)
        assert got_number == pytest.approx(number, rel=1e-15, abs=0)
        assert (got_job or "") == tag(job)


@given(text=TEXT)
def test_printable_text_without_a_backslash_is_kept_as_it_is(text: str) -> None:
    if text.isprintable():
        assert text_field(text) == text
        if "\\" not in text:
            assert tag(text) == text
