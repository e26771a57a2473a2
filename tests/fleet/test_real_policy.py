"""The simulator's own DynamoLLM policy behind the live planner: a quarter of an hour of load, on a stepped clock."""

from __future__ import annotations

from powerd_integrations.fleet import settings as configured
from powerd_integrations.fleet.observed import Arrivals, Waited
from powerd_integrations.fleet.planner import LivePlanner
from powerd_integrations.fleet.policy import build
from powerd_integrations.fleet.published import Group
from powerd_policies.dynamollm.fleet import ClassLoad, InstanceLoad, InstanceState
from tests.fleet.scripted import Clock
from tests.fleet.test_settings import MODEL

FLEET = f"""\
[planner]
gpus = 64
engine_model = "{MODEL}"
[[groups]]
pool = "LL"
tp = 8
max_replicas = 8
[[groups]]
pool = "LL"
tp = 4
max_replicas = 16
"""


def gpus_of(counts: dict[Group, int]) -> int:
    return sum(group.tp * count for group, count in counts.items())


def test_the_fleet_shrinks_to_its_load_grows_with_it_and_always_serves() -> None:
    settings, clock = configured.parse(FLEET), Clock()
    live = LivePlanner(build(settings), settings.options, groups=settings.bounds, now_s=clock, unix_s=clock)
    born: dict[tuple[Group, int], float] = {}
    used: list[int] = []
    for second in range(1, 1201):
        clock.s += 1.0
        rate = 3 if second <= 700 else 14
        live.add_arrivals(Arrivals("r", second, {"MM": ClassLoad(rate, 600 * rate, 200 * rate)}))
        desired = live.plan().desired
        for group, count in desired.items():  # an autoscaler that needs a minute to start a replica and none to end it
            for number in range(count):
                born.setdefault((group, number), clock.s)
        born = {key: at for key, at in born.items() if key[1] < desired[key[0]]}
        load = InstanceLoad(running=5, requests_per_s=1.0, prompt_tokens_per_s=600.0, output_tokens_per_s=200.0)
        serving = {f"{group}-{n}": group for (group, n), at in born.items() if clock.s - at >= 60.0}
        live.add_instances(InstanceState(name, group.pool, group.tp, 1980, load=load) for name, group in serving.items())
        for name in {replica.id for replica in live.plan().serving} - set(serving):
            live.remove_instance(name)
        plan = live.tick()
        assert live.figures().failures == 0, live.events()[-1]
        assert gpus_of(dict(plan.desired)) <= 64
        if second > 65:
            assert plan.routes["MM"], f"nobody serves at {second} s"
            assert all(any(replica.group == group for replica in plan.serving) for group in plan.routes["MM"])
        used.append(gpus_of(dict(plan.desired)))
    assert used[5] == 64, "all GPUs while nothing is known"
    assert used[650] < 32, "few requests need few"
    assert used[-1] > used[650], "more need more"


def test_the_ladder_is_climbed_on_what_routers_say_waits_and_left_again() -> None:
    settings, clock = configured.parse(FLEET), Clock()
    live = LivePlanner(build(settings), settings.options, groups=settings.bounds, now_s=clock, unix_s=clock)
    # As a vLLM tells it, on a node that holds a clock for which the figures have no row.
    load = InstanceLoad(running=5, queued_prompt_tokens=None, oldest_wait_s=None)
    seen = []
    for second in range(1, 101):
        clock.s += 1.0
        waiting = {"late": Waited(40, 20_000, 3.0)} if second <= 40 else {}
        live.add_arrivals(Arrivals("r", second, {"MM": ClassLoad(3, 1800, 600)}, waiting))
        live.add_instances(InstanceState(name, "LL", 8, 1234, load=load) for name in ("late", "calm"))
        plan = live.tick()
        seen.append((plan.reordered, plan.resteered, dict(plan.shed_after_s)))
    late = frozenset({"late"})
    assert next(row for row in seen if any(row)) == (late, frozenset(), {})
    assert seen[39] == (late, late, {"late": 2.0}), "one rung after the other"
    assert seen[-1][2] == {}, "in time again for long enough: nobody is rejected any more"
    rungs = [event.detail.split(":")[0] for event in live.events() if (event.kind, event.subject) == ("emergency", "late")]
    assert rungs[:4] == ["CALM -> REORDER", "REORDER -> MAX_CLOCK", "MAX_CLOCK -> RESTEER", "RESTEER -> REJECT"]
    assert not [event for event in live.events() if event.kind == "emergency" and event.subject == "calm"]
