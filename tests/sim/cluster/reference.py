"""The cluster simulator again, plain and slow: every iteration of every engine, one after another, in one queue of events.

Nothing here is jumped over, kept lazily or packed into a heap: lists are sorted when they are needed, gaps are kept one by one.
The rules are those that ``powerd.sim.cluster`` documents; this file is what they mean.
"""

from __future__ import annotations

import math

from powerd.sim.cluster import ClusterConfig, Requests
from powerd_policies.dynamollm.classes import NAMES, Classes
from powerd_policies.dynamollm.engine_model import Coefficients, EngineModel
from powerd_policies.dynamollm.fleet import FleetPlan
from tests.sim.cluster.reference_parts import Engine, Move, Request, ns


class Reference:
    """The same methods as ``Cluster``, as far as the tests need them; the first plan's instances serve at once."""

    def __init__(self, model: EngineModel, requests: Requests, classes: Classes, config: ClusterConfig) -> None:
        self.model, self.classes, self.config = model, classes, config
        self.requests = [
            Request(n, ns(float(a)), int(p), int(o), int(k), int(p))
            for n, (a, p, o, k) in enumerate(
                zip(requests.arrival_s, requests.prompt_tokens, requests.output_tokens, requests.routed_class, strict=True)
            )
        ]
        self.to_come = list(self.requests)
        self.outside: list[Request] = []
        self.moves: list[Move] = []
        self.engines: list[Engine] = []
        self.plan: FleetPlan | None = None
        self.order: list[Engine] = []
        self.now = ns(config.begin_s)
        self.total_j = self.idle_j = self.gpu_s = 0.0
        self.wakes = self.started = self.enqueued = 0
        self.most_kv = 0.0

    # ---- power ----

    def coefficients(self, engine: Engine) -> Coefficients:
        return self.model.table[engine.tp, engine.clock]

    def charge_idle(self, engine: Engine, until: int) -> None:
        for edge, parked in self.idle_edges(engine, until):
            if edge <= engine.charged:
                continue
            clock = self.config.park_clock_mhz if parked and self.config.park_clock_mhz else engine.clock
            clock = min(self.model.clocks_mhz(engine.tp)) if parked and not self.config.park_clock_mhz else clock
            joules = self.model.table[engine.tp, clock].idle_w * engine.tp * (edge - engine.charged) / 1e9
            self.idle_j += joules
            self.charge(engine, edge, joules)

    def idle_edges(self, engine: Engine, until: int) -> list[tuple[int, bool]]:
        if engine.idle_since is None or self.config.park_after_s is None:
            return [(until, False)]
        parks = engine.idle_since + ns(self.config.park_after_s)
        return [(min(parks, until), False), (until, True)] if parks < until else [(until, False)]

    def charge(self, engine: Engine, until: int, joules: float) -> None:
        self.total_j += joules
        self.gpu_s += engine.tp * (until - engine.charged) / 1e9
        engine.charged = until

    # ---- router ----

    def wait_s(self, engine: Engine, prompt: int) -> float:
        k = self.coefficients(engine)
        decoding = len(engine.running)
        tokens = prompt + sum(r.prompt for r in [*engine.queue, *engine.prefilling])
        iterations = math.ceil(tokens / (self.config.chunk_of(engine.tp) - decoding))
        fixed = max(k.prefill_fixed_s, k.decode_fixed_s if decoding else 0.0)
        return iterations * (fixed + k.decode_request_s * decoding) + k.prefill_token_s * tokens

    def choose(self, request: Request, but: Engine | None = None) -> Engine | None:
        if self.plan is None:
            return None
        name = NAMES[request.klass]
        everywhere: list[Engine] = []
        for pool in self.plan.routes.get(name, ()):
            serving = [e for e in self.order if e.pool == pool and e.phase == "serving" and e is not but and e.role != "decode"]
            everywhere += serving
            meeting = [e for e in serving if self.wait_s(e, request.prompt) <= self.classes.slos[name].ttft_s]
            if meeting:
                return min(
                    meeting,
                    key=lambda e: (
                        sum(r.prompt for r in [*e.queue, *e.prefilling]),
                        len(e.everyone) / self.model.kv_tokens[e.tp],
                    ),
                )
        return min(everywhere, key=lambda e: self.wait_s(e, request.prompt), default=None)

    def place(self, request: Request) -> None:
        engine = self.choose(request)
        if engine is None:
            self.outside.append(request)
        elif engine.needs(request) > self.model.kv_tokens[engine.tp]:
            request.rejected, request.finish = True, self.now
        else:
            self.enqueue(engine, request)

    def place_outside(self) -> None:
        waiting, self.outside = self.outside, []
        for request in waiting:
            self.place(request)

    def wake(self, engine: Engine) -> None:
        if engine.idle_since is not None:
            parked = self.config.park_after_s is not None and self.now - engine.idle_since > ns(self.config.park_after_s)
            self.charge_idle(engine, self.now)
            engine.at = max(self.now, engine.free) + (ns(self.config.wake_s) if parked else 0)
            engine.idle_since = None
            self.wakes += parked

    def enqueue(self, engine: Engine, request: Request) -> None:
        self.wake(engine)
        request.instance = engine.serial
        self.enqueued += 1
        request.sequence = self.enqueued
        engine.queue.append(request)

    # ---- from prefill to decode ----

    def arrive(self) -> None:
        for move in [m for m in self.moves if m.to is not None and m.end <= self.now]:
            assert move.to is not None
            self.moves.remove(move)
            self.leave(move)
            move.to.coming.remove(move.request)
            self.enqueue(move.to, move.request)

    def leave(self, move: Move) -> None:
        move.source.held.remove(move.request)
        if move.source.queue:
            self.wake(move.source)

    def set_off(self) -> None:
        self.moves.sort(key=lambda m: (m.request.first, m.request.number))
        blocked: set[str] = set()
        for move in [m for m in self.moves if m.to is None]:
            pool, request = move.source.pool, move.request
            if pool in blocked:
                continue
            there = [e for e in self.order if e.role == "decode" and e.pool == pool and e.phase in ("serving", "starting")]
            room = [
                e for e in there
                if e.phase == "serving" and len(e.everyone) < self.config.max_running
                and e.reserved + e.needs(request) <= self.model.kv_tokens[e.tp]
            ]  # fmt: skip
            if room:
                move.to = min(room, key=lambda e: (len(e.everyone), e.reserved))
                move.to.coming.append(request)
                move.end = self.now + ns(self.config.links.move_s(request.prompt))
            elif there and request.prompt + request.output > max(self.model.kv_tokens[e.tp] for e in there):
                request.rejected, request.finish = True, self.now
                self.moves.remove(move)
                self.leave(move)
            else:
                blocked.add(pool)

    # ---- engine ----

    def begin(self, engine: Engine) -> None:
        k = self.coefficients(engine)
        if engine.role == "decode":
            engine.running += engine.queue
            engine.queue = []
        room = self.config.chunk_of(engine.tp) - len(engine.running)
        chunks: list[tuple[Request, int]] = []
        while room > 0:
            begun = [r for r in engine.prefilling if r.left > 0 and all(r is not c for c, _ in chunks)]
            if begun:
                request = begun[0]
            else:
                if engine.by_deadline:
                    engine.queue.sort(key=lambda r: r.arrival + ns(self.classes.slos[NAMES[r.klass]].ttft_s))  # stable
                if not engine.queue or len(engine.running) + len(engine.prefilling) >= self.config.max_running:
                    break
                request = engine.queue[0]
                if engine.reserved + engine.needs(request) > self.model.kv_tokens[engine.tp]:
                    break
                engine.queue.pop(0)
                engine.prefilling.append(request)
            tokens = min(room, request.left)
            chunks.append((request, tokens))
            room -= tokens
        self.most_kv = max(self.most_kv, engine.reserved / self.model.kv_tokens[engine.tp])
        self.charge_idle(engine, engine.at)
        decoding, prompt = len(engine.running), sum(tokens for _, tokens in chunks)
        if not decoding and not prompt:
            engine.idle_since, engine.free, engine.stall = engine.at, engine.at + engine.stall, 0
            return
        total_s = k.iteration_s(prompt, decoding)
        prompt_s = k.prefill_token_s * prompt + (k.prefill_fixed_s if not decoding else 0.0)
        prompt_j = engine.tp * k.prefill_w * prompt_s
        rest_j = engine.tp * (k.iteration_j(prompt, decoding) + k.decoding_w(decoding) * engine.stall / 1e9) - prompt_j
        if not decoding:
            prompt_j, rest_j = prompt_j + rest_j, 0.0
        engine.flight = (max(1, ns(total_s) + engine.stall), chunks, prompt_j, rest_j)
        engine.stall = 0

    def land(self, engine: Engine) -> None:
        assert engine.flight is not None
        duration, chunks, prompt_j, decode_j = engine.flight
        engine.flight = None
        engine.at += duration
        self.charge(engine, engine.at, prompt_j + decode_j)
        for request in engine.running:
            request.gaps.append(engine.at - request.last)
            request.last = engine.at
            request.joules += decode_j / len(engine.running)
        for request in [r for r in engine.running if len(r.gaps) == r.output - 1]:
            request.finish = engine.at
            engine.running.remove(request)
        for request, tokens in chunks:
            request.left -= tokens
            request.joules += prompt_j * tokens / sum(n for _, n in chunks)
            if request.left == 0:
                request.first = request.last = engine.at
                engine.prefilling.remove(request)
                if request.output == 1:
                    request.finish = engine.at
                elif engine.role == "prefill":
                    engine.held.append(request)
                    self.moves.append(Move(request, engine))
                else:
                    engine.running.append(request)

    # ---- time ----

    def advance(self, until_s: float) -> None:
        until = ns(until_s)
        while True:
            times = [self.to_come[0].arrival] if self.to_come else []
            times += [move.end for move in self.moves if move.to is not None]
            begins = []
            for engine in self.engines:
                if engine.phase == "starting":
                    times.append(engine.ready)
                elif engine.phase != "stopped" and engine.flight is not None:
                    times.append(engine.at + engine.flight[0])
                elif engine.phase != "stopped" and engine.idle_since is None:
                    begins.append(engine.at)
            now = min(times, default=until + 1)
            first = min(begins, default=until)
            if first < min(now, until):  # nothing else happens at that moment any more
                for engine in self.engines:
                    able = engine.phase in ("serving", "draining") and engine.flight is None and engine.idle_since is None
                    if able and engine.at == first:
                        self.begin(engine)
                continue
            if now > until:
                break
            self.now = max(self.now, now)
            self.step()
        self.now = until

    def step(self) -> None:
        for engine in self.engines:
            if engine.flight is not None and engine.at + engine.flight[0] == self.now:
                self.land(engine)
        self.arrive()
        ready = [e for e in self.engines if e.phase == "starting" and e.ready <= self.now]
        for engine in ready:
            self.charge_idle(engine, self.now)
            engine.phase, engine.idle_since, engine.free, engine.at = "serving", self.now, self.now, self.now
        self.end_drained()
        if ready:
            self.place_outside()
        self.set_off()
        self.end_drained()
        while self.to_come and self.to_come[0].arrival == self.now:
            request = self.to_come.pop(0)
            if request.prompt > self.classes.context_limit:
                request.rejected, request.finish = True, self.now
            else:
                self.place(request)

    def end_drained(self) -> None:
        for engine in self.engines:
            if engine.phase == "draining" and not engine.everyone and engine.flight is None:
                self.charge_idle(engine, self.now)
                engine.phase = "stopped"

    # ---- plans ----

    def apply(self, plan: FleetPlan) -> None:
        begin = self.plan is None
        self.plan = plan
        named = {want.id: want for want in plan.instances}
        for engine in self.engines:
            if engine.phase == "serving" and engine.id not in named:
                engine.phase = "draining"
            elif engine.phase == "starting" and engine.id not in named:
                self.charge_idle(engine, self.now)
                engine.phase = "stopped"
        self.end_drained()
        self.order = []
        by_id = {engine.id: engine for engine in self.engines}
        for want in plan.instances:
            if want.id is None:
                ready = self.now if begin else self.now + ns(self.config.start_s)
                name = f"{want.pool}-{self.started}"
                engine = Engine(name, self.started, want.pool, want.tp, want.clock_mhz, "starting", ready, self.now, want.role)
                engine.charged = self.now
                self.engines.append(engine)
                self.started += 1
            else:
                engine = by_id[want.id]
                engine.pool = want.pool
                if engine.phase == "draining":
                    engine.phase = "serving"
                if engine.clock != want.clock_mhz and engine.phase != "stopped":
                    self.set_clock(engine, want.clock_mhz)
            self.order.append(engine)
        if begin:
            for engine in self.engines:
                engine.phase, engine.idle_since, engine.free = "serving", self.now, self.now
        self.place_outside()
        self.set_off()
        self.end_drained()
        for name, age_s in plan.shed.items():
            engine = by_id[name]
            for request in [r for r in engine.queue if engine.role != "decode" and r.arrival < self.now - ns(age_s)]:
                engine.queue.remove(request)
                request.rejected, request.finish = True, self.now
        for name in sorted(plan.resteered):
            self.resteer(by_id[name])
        for engine in self.engines:
            engine.by_deadline = engine.id in plan.reordered
            if not engine.by_deadline:
                engine.queue.sort(key=lambda r: r.sequence)

    def set_clock(self, engine: Engine, clock: int) -> None:
        if engine.phase == "starting":
            self.charge_idle(engine, self.now)
        elif engine.idle_since is not None:
            self.charge_idle(engine, self.now)
            engine.free = self.now + ns(self.config.clock_set_s)
        else:
            engine.stall += ns(self.config.clock_set_s)
        engine.clock = clock

    def resteer(self, engine: Engine) -> None:
        if engine.role == "decode":
            return
        moving, engine.queue = sorted(engine.queue, key=lambda r: r.arrival), []
        for request in moving:
            other = self.choose(request, but=engine)
            fits = other is not None and other.needs(request) <= self.model.kv_tokens[other.tp]
            self.enqueue(other if other is not None and fits else engine, request)

    def close(self) -> None:
        """Count iterations in progress by their part."""
        for engine in self.engines:
            if engine.phase == "stopped":
                continue
            if engine.flight is None:
                self.charge_idle(engine, self.now)
                continue
            duration, chunks, prompt_j, decode_j = engine.flight
            part = (self.now - engine.at) / duration
            self.charge(engine, self.now, part * (prompt_j + decode_j))
            for request in engine.running:
                request.joules += part * decode_j / len(engine.running)
            for request, tokens in chunks:
                request.joules += part * prompt_j * tokens / sum(n for _, n in chunks)
