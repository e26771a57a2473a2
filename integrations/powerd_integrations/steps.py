"""Training without pipelines: energy per step, the energy-optimal clock within a slowdown, low clocks while nothing is computed.

House rules: nothing here raises into training or makes a step wait for a daemon; without a daemon, a GPU or permission it does
nothing after one warning; whatever was set is undone by ``close``, by an exception, and by the kernel when the process ends.

    from powerd_integrations import steps

    for batch in loader:
        with steps.step():
            train(batch)
        if time_to_save:
            with steps.idle("checkpoint"):
                save()
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from powerd.client import Client
from powerd_integrations.keeper import Idle, Keeper
from powerd_integrations.report import Report, job_name
from powerd_integrations.search import Found, Search, SearchOptions, SearchState
from powerd_integrations.tuner import Block, Exchange, Tuner, alone

if TYPE_CHECKING:
    from powerd.client.core import Which

log = logging.getLogger("powerd_integrations")
F = TypeVar("F", bound=Callable[..., Any])
_OWN = 1  # stands for the GPU's own clock where none can be set
_MOST_CLOCKS = 512


@dataclass(frozen=True, slots=True)
class StepOptions:
    """What a training engineer may choose; every default is meant to be kept."""

    slowdown: float = 0.05  # allowed, against the top clock; 0.05 is 5 %
    search: bool = True  # False: measure and log only
    gpus: Which = "visible"
    job: str = field(default_factory=job_name)  # as in `powerctl jobs`
    block_s: float = 3.0  # how long steps run at one clock before it is judged
    warmup_steps: int = 5  # at first, not measured
    idle_after_s: float = 1.0  # shorter waits change nothing
    idle_clock_mhz: int | None = None  # None: a third of the top clock
    silence_s: float = 300.0  # no step for so long: whoever trained has gone, and the GPU gets its clock back
    exchange: Exchange | None = None  # None: torch.distributed where it is initialised


def _quiet(method: F) -> F:
    """Training goes on whatever happens in here; after a failure this object does nothing any more."""

    @functools.wraps(method)
    def guarded(self: Steps, *arguments: Any, **options: Any) -> Any:
        if self._dead:
            return None
        try:
            return method(self, *arguments, **options)
        except Exception as error:
            self._die(error)
            return None

    return guarded  # type: ignore[return-value]


class Steps:
    """The steps of one training process; use one per process. All ranks of a job make the same calls in the same order.

    ``found`` is what the search settled on, ``clock_mhz`` the clock wanted now, ``energy_j`` and ``steps`` what was measured.
    """

    def __init__(self, client: Client | None = None, options: StepOptions | None = None) -> None:
        self.options = options or StepOptions()
        self._dead = False
        self._client = client or Client(on_error="log")
        self._keeper = Keeper(
            self._client, self.options.gpus, job=self.options.job,
            idle_clock_mhz=self.options.idle_clock_mhz, idle_after_s=self.options.idle_after_s,
            silence_s=self.options.silence_s,
        )  # fmt: skip
        self._report = Report(self._client, self.options.job)
        self._exchange: Exchange | None = None
        self._tuner = self._tuner_for(())
        self._next_talk = max(1, self.options.warmup_steps) if self.options.search else 0
        self._started = False
        self._pid = os.getpid()
        self._spans_apart: deque[tuple[int, int]] = deque(maxlen=64)
        self._apart_since: tuple[str, int] | None = None
        self._lock = threading.Lock()
        self._at_close: list[Callable[[], object]] = []
        self._number: int | None = None
        self.steps = 0  # begun
        self.measured_steps = 0
        self.measured_s = 0.0
        self.energy_j = 0.0  # of this process's GPUs in the measured steps

    # -- what is known ---------------------------------------------------------------------------------------------------

    @property
    def clock_mhz(self) -> int | None:
        """The highest clock that is wanted now; ``None``: the GPU's own business."""
        return self._keeper.wanted_mhz

    @property
    def state(self) -> SearchState | None:
        """Where the search stands; ``None`` as long as there is none."""
        return self._tuner.search.state if self.searching_among else None

    @property
    def searching_among(self) -> tuple[int, ...]:
        """The clocks that every rank's GPU can be set to; none when nothing can be set, or search is off."""
        clocks = self._tuner.search.clocks
        return clocks if len(clocks) > 1 else ()

    @property
    def found(self) -> Found | None:
        """The clock that was settled on, with its slowdown and saving and their errors."""
        return self._tuner.search.found

    # -- steps -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self) -> Iterator[None]:
        """``with steps.step(): ...``: one training step; an exception gives the clock back and passes through."""
        self.begin()
        try:
            yield
        except BaseException as error:
            self.failed(error)
            raise
        self.end()

    @_quiet
    def begin(self, number: int | None = None) -> None:
        """A training step begins; ``number`` as training counts, so that steps lost to a restart are known."""
        if not self._started:
            self._start()
        now_ns = self._client.now_ns()
        if self._apart_since is not None:
            self._close_apart(now_ns)
        if self._keeper.idle is not None:
            self._keeper.end_idle()
        self._keeper.note_life(now_ns)
        self.steps += 1
        if number is not None and (self._number is None or number <= self._number):
            self._report.restore(number - 1)  # a start, or back to a checkpoint: later steps were for nothing
        self._number = number if number is not None else (-1 if self._number is None else self._number) + 1
        if self.steps == self._next_talk:
            self._talk()
        self._advance(now_ns)

    @_quiet
    def end(self) -> None:
        """The training step is over."""
        if self._apart_since is None:
            now_ns = self._client.now_ns()
            self._keeper.note_life(now_ns)
            self._keeper.idle = Idle("input", now_ns, sure=False)

    @_quiet
    def failed(self, error: BaseException | None = None) -> None:
        """An exception leaves a step: the GPU gets its clock back now; the next step goes on as if nothing had been."""
        self._apart_since = None
        self._tuner.spoil()
        self._report.exception(error)
        self._keeper.reset(wait_s=2.0)
        log.info("powerd: clocks reset after %s", type(error).__name__ if error is not None else "an exception")

    # -- what is no step -------------------------------------------------------------------------------------------------

    @contextmanager
    def idle(self, label: str) -> Iterator[None]:
        """``with steps.idle("checkpoint"): ...``: nothing is computed on the GPU; short idling changes nothing."""
        self.begin_apart(label, idle=True)
        try:
            yield
        finally:
            self.end_apart()

    @contextmanager
    def apart(self, label: str) -> Iterator[None]:
        """``with steps.apart("evaluation"): ...``: work that is no step; it is not counted and the clock stays."""
        self.begin_apart(label, idle=False)
        try:
            yield
        finally:
            self.end_apart()

    @_quiet
    def begin_apart(self, label: str, *, idle: bool) -> None:
        """From here on no step is made, until ``end_apart`` or the next step; ``idle``: nothing is computed at all."""
        if not self._started:
            self._start()
        now_ns = self._client.now_ns()
        self._close_apart(now_ns)
        self._apart_since = (label, now_ns)
        if label == "checkpoint":
            self._report.checkpoint(begins=True)
        self._keeper.note_life(now_ns)
        if idle:
            self._keeper.idle = Idle(label, now_ns)
        else:
            self._keeper.end_idle()

    @_quiet
    def end_apart(self) -> None:
        """Steps go on."""
        now_ns = self._client.now_ns()
        self._close_apart(now_ns)
        self._keeper.end_idle()
        self._keeper.note_life(now_ns)

    def _close_apart(self, now_ns: int) -> None:
        since, self._apart_since = self._apart_since, None
        if since is not None:
            self._spans_apart.append((since[1], now_ns))
            if since[0] == "checkpoint":
                self._report.checkpoint(begins=False)

    @_quiet
    def finish(self) -> None:
        """Training is over for now: the GPU gets its clock back. Another step begins anew with what is known."""
        now_ns = self._client.now_ns()
        self._close_apart(now_ns)
        block = self._tuner.cut(now_ns)
        if block is not None:
            self._leave(block, searching=self.state is SearchState.SEARCHING)
        if self._started:
            self._keeper.reset(wait_s=2.0)

    @_quiet
    def on_close(self, action: Callable[[], object]) -> None:
        """Do this too when it is closed."""
        self._at_close.append(action)

    @_quiet
    def close(self) -> None:
        """Training is over: measure what is left, give the clock back."""
        if os.getpid() == self._pid and self._started:
            self.finish()
            self._keeper.close()
            self._report.close()
        self._dead = True
        atexit.unregister(self.close)
        for action in self._at_close:
            action()

    # -- inside ----------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        with self._lock:
            if self._started:
                return
            self._started = True
            self._keeper.start()
            atexit.register(self.close)

    def _tuner_for(self, clocks: tuple[int, ...]) -> Tuner:
        """A search among these clocks; among none: blocks are measured and nothing is set."""
        search = Search(clocks or (_OWN,), SearchOptions(slowdown=self.options.slowdown))
        exchange = self._exchange if clocks and self._exchange else alone
        return Tuner(search, block_s=self.options.block_s, warmup_steps=self.options.warmup_steps, exchange=exchange)

    def _talk(self) -> None:
        """Agree with the other ranks on what can be set; every rank comes here at the same steps, ever more rarely."""
        if self._exchange is None:
            from powerd_integrations.ranks import exchange_of_torch

            self._exchange = self.options.exchange or exchange_of_torch() or alone
        shared = _common_clocks(self._keeper.clocks_mhz, self._exchange)
        if len(shared) > 1:
            self._tuner = self._tuner_for(shared)
            self._next_talk = 0
        else:
            self._next_talk *= 2

    def _advance(self, now_ns: int) -> None:
        tuner, search = self._tuner, self._tuner.search
        before = search.state
        block = tuner.begin_step(now_ns, self._number or 0)
        if block is not None:
            self._leave(block, searching=before is SearchState.SEARCHING)
        if self.searching_among:
            at_top = search.state is not SearchState.SEARCHING and tuner.clock_mhz == search.top
            self._keeper.want(None if at_top else tuner.clock_mhz)
            if search.state is not before:
                self._tell(search)

    def _leave(self, block: Block, *, searching: bool) -> None:
        """Have a block measured in the background, and told."""
        tuner, apart = self._tuner, tuple(self._spans_apart)
        self._keeper.note(lambda: self._measure(tuner, block, apart, searching), block.end_ns)

    def _measure(self, tuner: Tuner, block: Block, apart: tuple[tuple[int, int], ...], searching: bool) -> None:
        clock_mhz = None if block.clock_mhz == _OWN else block.clock_mhz
        got = None
        try:
            if block.whole:
                got = self._keeper.measure(clock_mhz, block.begins_ns, block.end_ns, apart)
        finally:  # a block that is never reported would be waited for
            tuner.measured(block.number, *(got[:2] if got else (None, None)))
        if self._keeper.uuids:
            self._report.open(self._keeper.uuids)
        plan = None if clock_mhz is None else "baseline" if clock_mhz == tuner.search.top else "profile"
        if plan == "profile" and not searching:
            plan = f"{clock_mhz} MHz"
        self._report.steps(block, apart, got, clock_mhz, plan)
        if got:
            self.measured_steps += got[2]
            self.measured_s += got[0] * got[2]
            self.energy_j += got[1] * got[2]

    def _tell(self, search: Search) -> None:
        found = search.found
        if search.state is SearchState.SETTLED and found is not None:
            log.info(
                "powerd: %d MHz saves %.1f %% of the energy at %.1f %% more time per step (measured in %d blocks)",
                found.clock_mhz, 100 * found.saving, 100 * found.slowdown, found.blocks,
            )  # fmt: skip
        elif search.state is SearchState.NO_GAIN:
            log.info("powerd: no clock saves energy within %.0f %% slowdown; the GPU keeps its own", 100 * self.options.slowdown)
        elif search.state is SearchState.SEARCHING:
            log.info("powerd: step time or power has changed; searching for the best clock again")

    def _die(self, error: Exception) -> None:
        self._dead = True
        self._client.warn("training steps", error)
        try:
            self._keeper.close(0.0)
        except Exception as second:
            log.debug("powerd: %s", second)


def _common_clocks(clocks: tuple[int, ...], exchange: Exchange) -> tuple[int, ...]:
    """The clocks that every rank's GPU supports; none when one of them cannot be controlled, or does not know yet."""
    if exchange is alone:
        return clocks
    told = exchange([*map(float, clocks[:_MOST_CLOCKS]), *[0.0] * (_MOST_CLOCKS - len(clocks))])
    return tuple(sorted(set.intersection(*({int(c) for c in row if c > 0} for row in told))))


_default: Steps | None = None


def default() -> Steps:
    """The process's own ``Steps``, made when first asked for."""
    global _default
    if _default is None or _default._pid != os.getpid():
        _default = Steps()
    return _default


def step() -> Any:
    """``with step(): ...`` on the process's own ``Steps``."""
    return default().step()


def idle(label: str) -> Any:
    """``with idle("checkpoint"): ...`` on the process's own ``Steps``."""
    return default().idle(label)
