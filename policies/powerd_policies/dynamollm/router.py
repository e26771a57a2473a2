"""Which instance takes a request: the same rule in production as in the simulator (DynamoLLM section 4.2).

House rules: the table of instances is replaced whole and never changed in place; what an instance has to do is counted here, from
what was sent and what began to answer; a request that no instance can take waits, it is not refused.

The rule: of the request's class, the plan's pools in order. In the first pool that has a serving instance whose estimated wait
meets the class's TTFT, of those that meet it the one with the fewest outstanding prompt tokens (ties: fewest requests for its KV
cache, then the plan's order). If no pool has one, the serving instance of the whole route with the shortest estimated wait.
Outstanding are the prompts, whole, of requests without a first token. The estimated wait is what the engine needs for them and
the request's own: as many iterations as its chunks need beside the ``b`` requests that it decodes, which is
``ceil(tokens / (chunk_tokens - b)) * (fixed + decode_request_s * b) + prefill_token_s * tokens`` with an iteration's fixed part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from powerd_policies.dynamollm.classes import NAMES, Classes
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import FleetEvent, FleetPlan, InstanceState


class PromptTooLongError(ValueError):
    """A prompt beyond the context limit has no class; the message says both lengths."""


@dataclass(slots=True)
class _Counted:
    """What the router knows to be at one instance."""

    prompt_tokens: int = 0  # of those without a first token
    requests: int = 0  # sent there and not gone
    decoding: int = 0  # of them, those with a first token


@dataclass(frozen=True, slots=True)
class _Target:
    id: str
    counted: _Counted
    prefill_fixed_s: float
    prefill_token_s: float
    decode_fixed_s: float
    decode_request_s: float
    kv_tokens: int


_Table = tuple[tuple[tuple[_Target, ...], ...], ...]  # by class, the pools of its route


class Router:
    """Steers requests to instances; ``update`` whenever plan or fleet change, ``route`` for each request.

    Nothing awaits in it, so that one event loop needs no lock. Where several threads route, give it their ``lock`` (such as a
    ``threading.Lock``): no count is lost then, and each call sees one whole table.
    """

    def __init__(
        self,
        model: EngineModel,
        classes: Classes | None = None,
        chunk_tokens: int = 512,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        self.classes = classes or Classes()
        self._chunk_tokens = chunk_tokens  # of prompts and decoding requests together, in one iteration of the engine
        self._model = model
        self._ttfts_s = tuple(self.classes.slos[name].ttft_s for name in NAMES)
        self._counted: dict[str, _Counted] = {}
        self._table: _Table = ((),) * len(NAMES)
        self._lock = lock or nullcontext()

    def update(self, plan: FleetPlan, states: Iterable[InstanceState]) -> None:
        """Take the newest plan and fleet. An instance that is gone takes its counts along.

        Raises ``LookupError`` for an instance whose tensor parallelism and clock the engine model does not hold; nothing changes.
        """
        serving = [state for state in states if state.phase == "serving" and state.role != "decode"]
        counted = {state.id: self._counted.get(state.id) or _Counted() for state in serving}
        pools: dict[str, list[_Target]] = {}
        for state in _in_order(plan, serving):
            at = self._model.table.get((state.tp, state.clock_mhz))
            if at is None:
                raise LookupError(
                    f"{self._model.name} has no figures for instance {state.id} at TP{state.tp} and {state.clock_mhz} MHz"
                )
            times_s = (at.prefill_fixed_s, at.prefill_token_s, at.decode_fixed_s, at.decode_request_s)
            target = _Target(state.id, counted[state.id], *times_s, self._model.kv_tokens[state.tp])
            pools.setdefault(state.pool, []).append(target)
        table = tuple(tuple(tuple(pools[pool]) for pool in plan.routes.get(name, ()) if pool in pools) for name in NAMES)
        with self._lock:
            self._counted = counted
            self._table = table

    def route(self, prompt_tokens: int, predicted_output: int, avoid: Collection[str] = ()) -> str | None:
        """Return the instance that takes a request and count it there; None: nobody serves its route, it waits.

        ``predicted_output`` is a size: 0, 1 or 2 for short, medium and long; instances of ``avoid`` take it only where nobody
        else of its route can. Raises ``PromptTooLongError``.
        """
        index = self._index(prompt_tokens, predicted_output)
        with self._lock:
            pools = self._table[index]
            chosen = self._choose(_without(pools, avoid) or pools, prompt_tokens, self._ttfts_s[index])
            if chosen is None:
                return None
            chosen.counted.prompt_tokens += prompt_tokens
            chosen.counted.requests += 1
            return chosen.id

    def has_other(self, prompt_tokens: int, predicted_output: int, avoid: Collection[str]) -> bool:
        """Return whether somebody who is not in ``avoid`` serves a request's route; raises ``PromptTooLongError``."""
        return bool(_without(self._table[self._index(prompt_tokens, predicted_output)], avoid))

    def _index(self, prompt_tokens: int, predicted_output: int) -> int:
        size = self.classes.size_of_prompt(prompt_tokens)
        if size is None:
            raise PromptTooLongError(f"a prompt of {prompt_tokens} tokens; the longest is {self.classes.context_limit}")
        return 3 * size + predicted_output

    def _choose(self, pools: tuple[tuple[_Target, ...], ...], prompt_tokens: int, ttft_s: float) -> _Target | None:
        for pool in pools:
            least = _least(pool)  # nearly always it is in time, and then it is the one
            if self._wait_s(least, prompt_tokens) <= ttft_s:
                return least
            in_time = [target for target in pool if self._wait_s(target, prompt_tokens) <= ttft_s]
            if in_time:
                return _least(in_time)
        everyone = [target for pool in pools for target in pool]
        return min(everyone, key=lambda target: self._wait_s(target, prompt_tokens), default=None)

    def _wait_s(self, target: _Target, prompt_tokens: int) -> float:
        tokens, decoding = target.counted.prompt_tokens + prompt_tokens, target.counted.decoding
        fixed_s = max(target.prefill_fixed_s, target.decode_fixed_s if decoding else 0.0)
        iterations = -(-tokens // max(1, self._chunk_tokens - decoding))
        return iterations * (fixed_s + target.decode_request_s * decoding) + target.prefill_token_s * tokens

    def first_token(self, instance: str, prompt_tokens: int) -> None:
        """Count a request's prompt as computed: its first token came and it decodes."""
        with self._lock:
            counted = self._counted.get(instance)
            if counted is not None:
                counted.prompt_tokens = max(0, counted.prompt_tokens - prompt_tokens)
                counted.decoding += 1

    def finished(self, instance: str) -> None:
        """Count a request that had its first token as gone from its instance, whether answered, failed or cancelled."""
        with self._lock:
            counted = self._counted.get(instance)
            if counted is not None:
                counted.decoding = max(0, counted.decoding - 1)
                counted.requests = max(0, counted.requests - 1)

    def abandoned(self, instance: str, prompt_tokens: int) -> None:
        """Count a request as gone before its first token: cancelled, failed, or waiting somewhere else now."""
        with self._lock:
            counted = self._counted.get(instance)
            if counted is not None:
                counted.prompt_tokens = max(0, counted.prompt_tokens - prompt_tokens)
                counted.requests = max(0, counted.requests - 1)

    def outstanding(self) -> Mapping[str, tuple[int, int]]:
        """Return for each serving instance its outstanding prompt tokens and unfinished requests, as counted here."""
        with self._lock:
            return {name: (counted.prompt_tokens, counted.requests) for name, counted in self._counted.items()}

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


def _without(pools: tuple[tuple[_Target, ...], ...], avoid: Collection[str]) -> tuple[tuple[_Target, ...], ...]:
    """Return the pools without these instances, and without pools that have no other."""
    if not avoid:
        return pools
    return tuple(kept for pool in pools if (kept := tuple(target for target in pool if target.id not in avoid)))


def _least(targets: Sequence[_Target]) -> _Target:
    """Return the one with the fewest prompt tokens to compute; of several the one with the fewest requests for its KV cache."""
    best, tokens, requests = targets[0], targets[0].counted.prompt_tokens, targets[0].counted.requests
    for target in targets:
        counted = target.counted
        if counted.prompt_tokens > tokens:
            continue
        if counted.prompt_tokens < tokens or counted.requests * best.kv_tokens < requests * target.kv_tokens:
            best, tokens, requests = target, counted.prompt_tokens, counted.requests
    return best
