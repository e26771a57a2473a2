"""The built-in dashboard in a real browser, on a real powerd: what a person sees, hears and reaches by keyboard."""

from __future__ import annotations

import re
from typing import Any

import pytest

from powerd.client import JobLog
from powerd.model import ClockPlan
from tests.e2e.live import LiveNode
from tests.web.conftest import Open
from tests.web.stage import HOUR_S, SILENT_GPU, SILENT_S, Seen, served

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("web")]

_ROW = "#gpu-table tbody tr:nth-child({}) "


def text(seen: Seen, selector: str) -> str:
    return seen.page.locator(selector).first.inner_text()


def test_live_values_move_and_are_the_nodes_own(seen: Seen, live: LiveNode) -> None:
    power = _ROW.format(1) + "td:nth-child(2) .v"
    first = text(seen, power)
    seen.page.wait_for_function("([s, v]) => document.querySelector(s).textContent !== v", arg=[power, first])
    shown_w = float(text(seen, power).split()[0])
    idle_w = float(text(seen, _ROW.format(8) + "td:nth-child(2) .v").split()[0])
    assert shown_w > 2 * idle_w, "GPU 0 works, GPU 7 does not"
    assert text(seen, _ROW.format(1) + "td:nth-child(3)") == "500 W"
    assert text(seen, "#badges").split("\n")[0] == "simulated"
    assert text(seen, "#host") == live.client.node().hostname
    assert seen.errors == []


def test_a_lease_made_by_powerctl_appears_with_its_reason_within_two_seconds(seen: Seen, live: LiveNode) -> None:
    seen.page.click(_ROW.format(2) + "button")
    seen.page.wait_for_function("() => document.querySelector('#why-sentence').textContent.startsWith('Nobody wants')")
    done = live.powerctl("set", "1", "--sm-clock", "1200MHz", "--for", "10m", "--reason", "below the <b>knee</b>")
    assert done.code == 0, done.err
    lease_id = done.out.split()[1].rstrip(":")
    try:
        seen.page.wait_for_selector(f"#lease-table tr[data-key='{lease_id}']", timeout=2000)
        seen.page.wait_for_function(
            "() => document.querySelector('#why-sentence').textContent.includes('below the <b>knee</b>')", timeout=2000
        )
        assert "SM clock 1200 MHz: below the <b>knee</b>" in text(seen, _ROW.format(2) + "td:last-child"), "text, not markup"
        assert text(seen, "#why-table tbody tr:nth-child(1) td:nth-child(3)") == "1200 MHz"
        assert lease_id in text(seen, "#why-table tbody tr:nth-child(6) td:nth-child(3)"), "the winner"
        seen.page.wait_for_function("id => document.querySelector('#announce').textContent.includes(id)", arg=lease_id)
    finally:
        live.powerctl("lease", "release", lease_id)
    seen.page.wait_for_selector(f"#lease-table tr[data-key='{lease_id}']", state="detached", timeout=5000)
    assert seen.errors == []


def chart_facts(seen: Seen) -> list[list[str]]:
    """The summing-up behind the power chart: GPU, mean, lowest, highest, latest, without data."""
    rows = seen.page.locator("figure:first-child details table:first-child tbody tr")
    return [re.split(r"\s*\t\s*", row.inner_text()) for row in rows.all()]


def seconds(said: str) -> float:
    found = re.fullmatch(r"(?:(\d+) min )?([\d.]+) (s|ms)", said)
    assert found, said
    return int(found[1] or 0) * 60 + float(found[2]) / (1000 if found[3] == "ms" else 1)


def test_an_hour_of_eight_gpus_is_there_at_once_and_its_gaps_are_gaps(seen: Seen) -> None:
    page = seen.page
    page.check("input[value='1h']")
    page.wait_for_selector("#charts[data-range='1h'] canvas")
    assert page.locator("#charts canvas").count() == 4
    page.click("figure:first-child summary")
    page.wait_for_selector("figure:first-child details tbody tr")
    facts = chart_facts(seen)
    assert [row[0] for row in facts] == [f"GPU {i}" for i in range(8)]
    silent, spoken = facts[SILENT_GPU], facts[SILENT_GPU + 1]
    assert seconds(silent[5]) - seconds(spoken[5]) == pytest.approx(SILENT_S, abs=5)
    assert seconds(spoken[5]) < 0.05 * HOUR_S
    assert min(float(row[2].split()[0]) for row in facts) > 20, "a time without samples is not 0 W"
    # The line really has a hole: nothing is drawn in its colour over the middle of the silent time, much before and after it.
    for i in range(8):
        if i != SILENT_GPU:
            page.uncheck(f"#shown label:has-text('GPU {i}') input")
    drawn = page.evaluate(_DRAWN_SHARE, [HOUR_S - 1200 - SILENT_S, SILENT_S, HOUR_S])
    assert drawn["gap"] == 0, drawn
    assert drawn["beside"] > 0.5, drawn
    for i in range(8):
        page.check(f"#shown label:has-text('GPU {i}') input")
    # Usable: a drag zooms in, Escape zooms out, and live values go on meanwhile.
    page.locator("[data-chart=power_mw]").scroll_into_view_if_needed()
    box = page.locator("[data-chart=power_mw] .u-over").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 50, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 150, box["y"] + 40, steps=4)
    page.mouse.up()
    page.wait_for_selector("figure:first-child button:has-text('Whole range')")
    page.mouse.move(0, 0)  # a pointer that rests on the chart would be told of as well
    page.focus("[data-chart=power_mw]")
    page.wait_for_function("() => document.querySelector('figure output').textContent === ''")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => / 0: [0-9.]+ W/.test(document.querySelector('figure output').textContent)")
    page.keyboard.press("Escape")
    page.wait_for_selector("figure:first-child button", state="hidden")
    assert seen.errors == []


# Columns of pixels of the power chart that hold any line, in the silent time and in an equally long one before it.
_DRAWN_SHARE = """([from, length, hour]) => {
  const canvas = document.querySelector("[data-chart=power_mw] canvas"), ratio = devicePixelRatio;
  const over = document.querySelector("[data-chart=power_mw] .u-over"), left = parseFloat(over.style.left) * ratio;
  const width = over.clientWidth * ratio, height = over.clientHeight * ratio;
  const pixels = canvas.getContext("2d").getImageData(left, 0, width, height), columns = new Set();
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    const i = (y * pixels.width + x) * 4, [r, g, b, a] = pixels.data.slice(i, i + 4);
    if (a > 120 && Math.max(r, g, b) - Math.min(r, g, b) > 60) columns.add(x);
  }
  const share = (a, b) => {
    let hit = 0, all = 0;
    for (let x = Math.ceil(a); x < b; x++) { all += 1; hit += columns.has(x) ? 1 : 0; }
    return hit / all;
  };
  const at = (s) => (s / hour) * width;
  return { gap: share(at(from + 60), at(from + length - 60)), beside: share(at(from - length), at(from - 60)) };
}"""


@pytest.mark.parametrize("name", ["24h", "7d", "15m"])
def test_every_range_is_drawn(seen: Seen, name: str) -> None:
    seen.page.check(f"input[value='{name}']")
    seen.page.wait_for_selector(f"#charts[data-range='{name}'] canvas")
    assert re.search(r"GPU 0 [\d.]+ W to [\d.]+ W", seen.page.get_attribute("[data-chart=power_mw]", "aria-label") or "")
    assert seen.errors == []


def test_a_job_and_its_clock_plan_are_shown_as_they_were_told(seen: Seen, live: LiveNode) -> None:
    page, client = seen.page, live.client
    assert text(seen, "[data-tile='Saving so far'] dd span") == "not measured"
    clocks = (1410,) * 3 + (1110,) * 5
    log, now_ns = JobLog(client, "told", gpus=live.uuids[:1], interval_s=0.05), client.now_ns()
    log.start()
    for step in range(10):
        plan, energy_j = ("baseline", 1000.0) if step < 5 else ("p-7", 900.0)
        log.step(step, now_ns + step, now_ns + step + 1, energy_j=energy_j, plan=plan)
    with (
        client.lease(live.uuids[:1], sm_clock_mhz=(None, 1410), reason="stage 0") as lease,
        lease.arm(ClockPlan("p-7", live.uuids[0], clocks, 1410, 60.0)) as beats,
    ):
        beats.send(0, 0)
        page.wait_for_selector("#why-plans canvas")
        assert "8 instructions, 1110 to 1410 MHz, 1 changes" in (
            page.get_attribute("#why-plans .strip canvas", "aria-label") or ""
        )
        page.click("#why-plans summary")
        rows = page.locator("#why-plans tbody tr").all_inner_texts()
        assert [row.split("\t") for row in rows] == [["0 to 2", "1410 MHz"], ["3 to 7", "1110 MHz"]]
        beats.send(0, 1)
        page.wait_for_function("() => document.querySelector('#why-plans p').textContent.includes('instruction 1 of 8')")
    page.wait_for_selector("#job-table tr[data-key=told]")
    page.wait_for_function("() => document.querySelector('#job-table tr[data-key=told]').cells[8].textContent === '10.0 %'")
    assert text(seen, "[data-tile='Saving so far'] dd span") == "10.0 %"
    page.click("#job-table tr[data-key=told] button")
    page.wait_for_selector("#job-timeline h3")
    log.close()
    assert page.locator("#pools").is_hidden(), "this daemon serves no replicas"
    assert seen.errors == []


def walk(seen: Seen, presses: int) -> list[dict[str, Any]]:
    """What Tab reaches, in order, and whether one sees where one is."""
    found = []
    for _ in range(presses):
        seen.page.keyboard.press("Tab")
        found.append(
            seen.page.evaluate("""() => {
            const e = document.activeElement, s = getComputedStyle(e);
            return { tag: e.tagName, id: e.id, name: e.getAttribute("aria-label") || e.textContent.trim(), value: e.value ?? "",
                     outlined: s.outlineStyle !== "none" && parseFloat(s.outlineWidth) > 0 };
        }""")
        )
    return found


def test_everything_is_reached_and_done_by_keyboard(seen: Seen) -> None:
    page = seen.page
    page.wait_for_selector("#charts canvas")
    stops = walk(seen, 60)
    assert stops[0]["name"] == "Skip to the GPUs"
    reached = [stop["id"] or stop["name"] for stop in stops]
    gpus = [name for name in reached if re.match(r"GPU \d, NVIDIA", name)]
    assert len(set(gpus)) == 8
    assert {"theme", "why-gpu", "GPUs, table", "Events"} <= set(reached)
    assert any(name.startswith("Power over 15 min") for name in reached)
    assert [stop for stop in stops if stop["tag"] != "BODY" and not stop["outlined"]] == []
    page.focus("#theme")
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.documentElement.dataset.theme") == "dark"
    page.focus(_ROW.format(5) + "button")
    page.keyboard.press("Enter")
    assert page.input_value("#why-gpu") == page.locator("#why-gpu option").nth(4).get_attribute("value")
    page.wait_for_timeout(1200)  # two rounds of live values
    assert "GPU 4" in (page.evaluate("() => document.activeElement.getAttribute('aria-label')") or ""), "focus stays on its row"
    page.focus("input[name=range]:checked")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#charts[data-range='1h']")
    assert seen.errors == []


def test_a_screen_reader_finds_names_heads_and_no_chatter(seen: Seen) -> None:
    page = seen.page
    page.wait_for_selector("#charts canvas")
    tree = page.locator("body").aria_snapshot()
    names = (
        'heading "Why this clock" [level=2]', 'navigation "Sections"', 'columnheader "Temperature"', "status: live",
        'combobox "GPU"', 'radio "15 min" [checked]', 'checkbox "GPU 7" [checked]',
    )  # fmt: skip
    for line in names:
        assert line in tree, tree
    assert re.search(r'img "Power over 15 min: GPU 0 [\d.]+ W to', tree)
    unnamed = re.findall(r"- (?:button|link|img|checkbox|radio|combobox|table)(?::|\s*$| \[)", tree, re.MULTILINE)
    assert unnamed == []
    spoken = page.evaluate("""() => {
        window.said = 0;
        for (const region of document.querySelectorAll("[aria-live=polite], [role=status], [role=alert]"))
            new MutationObserver((changes) => { window.said += changes.length; }).observe(region, { childList: true, characterData: true, subtree: true });
        return document.querySelectorAll("[aria-live=assertive]").length;
    }""")  # noqa: E501
    assert spoken == 0
    page.wait_for_timeout(3000)  # six rounds of live values
    assert page.evaluate("() => window.said") == 0, "values that move are not read out"


def test_it_follows_the_systems_theme_and_fits_a_phone(live: LiveNode, open_page: Open) -> None:
    with served(live) as page, open_page(page.url, width=360, height=740, dark=True) as seen:
        assert seen.page.evaluate("() => document.documentElement.dataset.theme") == "dark"
        seen.page.wait_for_selector("#charts canvas")
        wide = seen.page.evaluate("() => document.documentElement.scrollWidth")
        assert wide <= 360, "only tables scroll sideways, each by itself"
        assert seen.errors == []


def test_a_lost_gpu_is_dashes_and_a_lost_daemon_is_said_and_found_again(open_page: Open) -> None:
    with LiveNode(gpus=2) as node, served(node) as page, open_page(page.url) as seen:
        node.node.fault("lost", gpu=1)
        seen.page.wait_for_selector(_ROW.format(2) + "td:nth-child(2) .v.missing")
        row = seen.page.locator(_ROW.format(2) + "td").all_inner_texts()
        assert [value.replace("\n", " ").strip() for value in row[:2]] == ["– not known", "– not known"]
        assert "lost" in row[6]
        assert text(seen, "[data-tile='Power now'] dd small") == "1 of 2 GPUs are known"
        assert seen.errors == []
        node.node.clear_faults(1)
        node.process.terminate()
        node.process.wait(30)
        seen.page.wait_for_selector("#link[data-state=down]")
        assert "powerd" in text(seen, "#lost")
        assert "Figures are from" in text(seen, "#lost")
        node.start()
        seen.page.wait_for_selector("#link[data-state=live]", timeout=30_000)
        assert seen.page.locator("#lost").is_hidden()


@pytest.mark.parametrize(("path", "place"), [("explain", "#why-sentence"), ("history", "#history-state")])
def test_what_a_user_may_not_see_is_said(seen: Seen, path: str, place: str) -> None:
    error = '{"error": {"code": "denied", "message": "this shows every tenant", "hint": "ask the operator", "fault": "request"}}'
    seen.page.route(f"**/v1/{path}*", lambda route: route.fulfill(status=403, content_type="application/json", body=error))
    seen.page.route(f"**/v1/{path}/*", lambda route: route.fulfill(status=403, content_type="application/json", body=error))
    seen.page.check("input[value='24h']")
    seen.page.wait_for_function(
        "s => document.querySelector(s).textContent.includes('every tenant (ask the operator)')", arg=place
    )
    assert text(seen, _ROW.format(1) + "td:nth-child(2) .v").endswith(" W"), "the rest goes on"


def test_a_page_whose_server_has_ended_says_so(live: LiveNode, open_page: Open) -> None:
    with served(live) as page, open_page(page.url) as seen:
        assert page.close() == 0
        seen.page.wait_for_selector("#link[data-state=down]")
        assert "powerctl dashboard" in text(seen, "#lost")


def test_it_asks_nobody_but_its_own_server(live: LiveNode, open_page: Open) -> None:
    asked: list[str] = []
    with served(live) as page, open_page(page.url) as seen:
        seen.page.on("request", lambda request: asked.append(request.url))
        seen.page.reload()
        seen.page.wait_for_selector("#charts canvas")
        assert len(asked) > 10
        assert [url for url in asked if not url.startswith(f"http://127.0.0.1:{page.port}/")] == []
        assert seen.errors == []


def test_without_a_daemon_powerctl_says_so_instead_of_the_page(live: LiveNode) -> None:
    done = live.powerctl("--socket", str(live.root / "none.sock"), "dashboard", "--print-url")
    assert (done.code, len(done.lines)) == (69, 1), done.err
    assert done.out == "", "no link that leads nowhere"
