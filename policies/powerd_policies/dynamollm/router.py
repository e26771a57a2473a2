"""Which instance takes a request: the same rule in production as in the simulator (DynamoLLM section 4.2).

House rules: the table of instances is replaced whole and never changed in place; what an instance has to do is counted here, from
what was sent and what began to answer; a request that no instance can take waits, it is not refused.

The rule: of the request's class, the plan's pools in order. In the first pool that has a serving instance whose estimated wait
meets the class's TTFT, the instance with the fewest outstanding prompt tokens (ties: fewest running for its capacity, then the
plan's order). If no pool has one, the same choice among all serving instances of the route. The estimated wait is the outstanding
prompt tokens and the request's own, times the instance's prefill seconds per token at its clock, plus the fixed part.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from powerd_policies.dynamollm.classes import NAMES, Classes
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import FleetEvent, FleetPlan, InstanceState


class PromptTooLongError(ValueError):
    """A prompt beyond the context limit has no class; the message says both lengths."""


@dataclass(slots=True)
class _Counted:
    """What the router knows to be at one instance."""

    prompt_tokens: int = 0  # sent there, without a first token yet
    running: int = 0  # sent there and not finished


@dataclass(frozen=True, slots=True)
class _Target:
    id: str
    counted: _Counted
    fixed_s: float
    token_s: float
    capacity: int


_Table = tuple[tuple[tuple[_Target, ...], ...], ...]  # by class, the pools of its route


class Router:
    """Steers requests to instances; ``update`` whenever plan or fleet change, ``route`` for each request.

    ``route`` may be called from any thread while another updates: each call sees one whole table.
    """

    def __init__(self, model: EngineModel, classes: Classes | None = None) -> None:
        self.classes = classes or Classes()
        self._model = model
        self._ttfts_s = tuple(self.classes.slos[name].ttft_s for name in NAMES)
        self._counted: dict[str, _Counted] = {}
        self._table: _Table = ((),) * len(NAMES)
        self._lock = threading.Lock()

    def update(self, plan: FleetPlan, states: Iterable[InstanceState]) -> None:
        """Take the newest plan and fleet. An instance that is gone takes its counts along.

        Raises ``LookupError`` for an instance whose tensor parallelism and clock the engine model does not hold; nothing changes.
        """
        serving = [state for state in states if state.phase == "serving" and state.role != "decode"]
        counted = {state.id: self._counted.get(state.id) or _Counted() for state in serving}
        pools: dict[str, list[_Target]] = {}
        for state in _in_order(plan, serving):
            key = (state.tp, state.clock_mhz)
            if key not in self._model.table:
                raise LookupError(
                    f"{self._model.name} has no figures for instance {state.id} at TP{state.tp} and {state.clock_mhz} MHz"
                )
            at = self._model.table[key]
            target = _Target(
                state.id, counted[state.id], at.prefill_fixed_s, at.prefill_token_s, max(1, self._model.kv_tokens[state.tp])
            )
            pools.setdefault(state.pool, []).append(target)
        table = tuple(tuple(tuple(pools[pool]) for pool in plan.routes.get(name, ()) if pool in pools) for name in NAMES)
        with self._lock:
            self._counted = counted
            self._table = table

    def route(self, prompt_tokens: int, predicted_output: int) -> str | None:
        """Return the instance that takes a request and count it there; None: nobody serves its route, it waits.

        ``predicted_output`` is a size: 0, 1 or 2 for short, medium and long. Raises ``PromptTooLongError``.
        """
        size = self.classes.size_of_prompt(prompt_tokens)
        if size is None:
            raise PromptTooLongError(f"a prompt of {prompt_tokens} tokens; the longest is {self.classes.context_limit}")
        index = 3 * size + predicted_output
        pools = self._table[index]
        ttft_s = self._ttfts_s[index]
        with self._lock:
            chosen = None
            for pool in pools:
                chosen = _least(pool, prompt_tokens, ttft_s)
                if chosen is not None:
                    break
            else:
                chosen = _least([target for pool in pools for target in pool], prompt_tokens, None)
            if chosen is None:
                return None
            chosen.counted.prompt_tokens += prompt_tokens
            chosen.counted.running += 1
            return chosen.id

    def first_token(self, instance: str, prompt_tokens: int) -> None:
        """Count a request's prompt as computed: its first token came."""
        with self._lock:
            counted = self._counted.get(instance)
            if counted is not None:
                counted.prompt_tokens = max(0, counted.prompt_tokens - prompt_tokens)

    def finished(self, instance: str) -> None:
        """Count a request as gone from its instance, whether answered, failed or cancelled after its first token."""
        with self._lock:
            counted = self._counted.get(instance)
            if counted is not None:
                counted.running = max(0, counted.running - 1)

    def abandoned(self, instance: str, prompt_tokens: int) -> None:
        """Count a request as gone before its first token."""
        self.first_token(instance, prompt_tokens)
        self.finished(instance)

    def outstanding(self) -> Mapping[str, tuple[int, int]]:
        """Return for each serving instance its outstanding prompt tokens and running requests, as counted here."""
        with self._lock:
            return {name: (counted.prompt_tokens, counted.running) for name, counted in self._counted.items()}

    def outgrown(self, instance: str, predicted_output: int, output_tokens: int, at_s: float) -> FleetEvent | None:
        """Return the event of a request that became longer than its pool was meant for; None while it has not.

        It stays where it is: the event is for the instance's controller, which meets the load that is there with its clock.
        """
        size = self.classes.size_of_output(output_tokens)
        if size <= predicted_output:
            return None
        sizes = "SML"
        detail = f"an answer predicted {sizes[predicted_output]} has {output_tokens} tokens and is {sizes[size]} by now"
        return FleetEvent(at_s, "misprediction", instance, detail)


def _in_order(plan: FleetPlan, serving: Iterable[InstanceState]) -> list[InstanceState]:
    """Return the instances in the plan's order, those that it does not name last and in their own: they still serve."""
    order = {want.id: n for n, want in enumerate(plan.instances) if want.id is not None}
    return sorted(serving, key=lambda state: order.get(state.id, len(order)))


def _least(targets: Iterable[_Target], prompt_tokens: int, ttft_s: float | None) -> _Target | None:
    """Return the target with the fewest outstanding prompt tokens; with ``ttft_s`` only of those that meet it."""
    best: _Target | None = None
    least = 0
    for target in targets:
        waiting = target.counted.prompt_tokens
        if ttft_s is not None and target.fixed_s + target.token_s * (waiting + prompt_tokens) > ttft_s:
            continue
        if best is not None:
            if waiting > least:
                continue
            if waiting == least and target.counted.running * best.capacity >= best.counted.running * target.capacity:
                continue
        best, least = target, waiting
    return best
