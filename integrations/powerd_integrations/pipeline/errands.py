"""What a conductor has done behind training's back: leases, clocks, sheets, plans, beats; each asked for now and fetched later.

House rules: everything that may take a moment runs in the worker; fetching never waits but for a sheet, which all ranks wait for
anyway; what went wrong there is None or told as text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from powerd.client import Client
from powerd_integrations.pipeline import measured, planning
from powerd_integrations.pipeline.agreement import Agreement, MakePlan
from powerd_integrations.pipeline.gpu import Gpu, Observed, Ran
from powerd_integrations.pipeline.measured import Sheet
from powerd_integrations.pipeline.options import Options
from powerd_integrations.pipeline.place import Place
from powerd_integrations.pipeline.worker import Worker

if TYPE_CHECKING:
    from powerd.client import Beats

log = logging.getLogger("powerd.pipeline")
T = TypeVar("T")
PREPARE_S = 2.0  # a lease that takes longer is waited for by training on
RESULT_S = 30.0  # how long a step end waits at most for what the worker was asked a step ago


class Rest:
    """How long something that keeps failing is left alone: not at first, then ever longer, counted in times asked for."""

    def __init__(self) -> None:
        self._failed = self._left = 0

    @property
    def over(self) -> bool:
        """Whether it may be tried now."""
        self._left -= 1
        return self._left < 0

    def note(self, well: bool) -> None:
        """How the last try went."""
        self._failed = 0 if well else self._failed + 1
        self._left = min(64, 4 * max(0, self._failed - 3))


class Errands:
    """One rank's dealings with its daemon."""

    def __init__(self, client: Client, uuid: str | None, options: Options, place: Place, agreement: Agreement) -> None:
        self.gpu = Gpu(client, uuid, options, str(place))
        self.worker = Worker(options.background)
        self._options, self._place, self._agreement = options, place, agreement
        self._planner: planning.Planner | None = None
        self._preparing: Future[bool] | None = None
        self._lease_rest, self.arm_rest = Rest(), Rest()
        self._sheet: Future[Sheet | None] | None = None
        self._plans: Future[list[dict[str, Any]]] | None = None
        self._beats: Future[Beats | None] | None = None
        self._observing: Future[dict[int, Observed]] | None = None
        self.observed: dict[int, Observed] = {}

    @property
    def ready(self) -> bool:
        """Whether this rank's clocks can be set."""
        return self.gpu.ready

    def prepare(self, *, patiently: bool = False) -> None:
        """Ask for the lease if there is none; ``patiently`` gives it a moment."""
        if self.gpu.ready:
            return
        if (self._preparing is None or self._preparing.done()) and self._lease_rest.over:
            self._preparing = self.worker.submit(self._prepare)
        if patiently and self._preparing is not None:
            wait([self._preparing], PREPARE_S)

    def _prepare(self) -> bool:
        try:
            self.gpu.prepare()
        finally:
            self._lease_rest.note(self.gpu.ready)
        return self.gpu.ready

    def set_clock(self, mhz: int | None) -> None:
        """Pin the clock; None: as fast as it can."""
        self.worker.submit(partial(self.gpu.set_clock, mhz))

    def measure(self, mhz: int, ran: Callable[[], Sequence[Ran]]) -> None:
        """Turn iterations into a sheet."""
        self._sheet = self.worker.submit(lambda: self.gpu.sheet(mhz, ran()))

    def sheet(self) -> Sheet | None:
        """What was measured; None when that could not be told."""
        asked, self._sheet = self._sheet, None
        try:
            return None if asked is None else asked.result(RESULT_S)
        except Exception as error:
            log.debug("the profile of this clock is lost: %s", error)
            return None

    def save(self) -> None:
        """Keep the profile: once per node."""
        if self._place.local_rank == 0 and self._options.cache is not None:
            self.worker.submit(self._save)

    def _save(self) -> None:
        try:
            measured.save(self._options.cache, self._agreement.key, self._agreement.profile)
        except OSError as error:
            log.info("powerd: the profile cannot be kept: %s", error)

    def kept(self) -> list[dict[str, Any]]:
        """The sheets that an earlier start kept on this node."""
        if self._place.local_rank != 0:
            return []
        found = measured.load(self._options.cache, self._agreement.key)
        return [] if found is None else [sheet.to_json() for sheet in found.sheets.values()]

    def make_plans(self, request: MakePlan) -> None:
        """Plan for all pipelines."""
        self._plans = self.worker.submit(partial(self._make_plans, request))

    def _make_plans(self, request: MakePlan) -> list[dict[str, Any]]:
        if self._planner is None:
            profile, options, key = self._agreement.profile, self._options, self._agreement.key
            watts = options.blocking_power_w or profile.blocking_power_w or 0.0
            about = (watts, options, f"perseus-{key[:8]}", self.gpu.client)
            self._planner = planning.planning(self._agreement.orders, profile.rows, *about)
        return self._planner.plan(request)

    def plans(self) -> dict[str, Any]:
        """The plans, or the error that there are none; nothing while they are being made."""
        if self._plans is None or not self._plans.done():
            return {}
        made, self._plans = self._plans, None
        error = made.exception()
        return {"error": str(error) or type(error).__name__} if error is not None else {"plans": made.result()}

    def arm(self, plan_id: str, clocks_mhz: Sequence[int | None], iteration_s: float) -> None:
        """Arm this rank's part of a plan."""
        self._beats = self.worker.submit(partial(self.gpu.arm, plan_id, clocks_mhz, iteration_s))

    @property
    def arming(self) -> bool:
        """Whether a plan is on its way."""
        return self._beats is not None

    def armed(self) -> bool:
        """Whether it has arrived and can be fetched."""
        return self._beats is not None and self._beats.done()

    def beats(self) -> Beats | None:
        """The beats of the plan that has arrived; None when it could not be armed."""
        asked, self._beats = self._beats, None
        beats = None if asked is None or asked.exception() is not None else asked.result()
        self.arm_rest.note(beats is not None)
        return beats

    def observe(self, ran: Ran, clocks_mhz: Sequence[int | None], slow: bool) -> dict[int, Observed]:
        """What the daemon saw of this rank's stages lately; ``slow`` asks it about this iteration."""
        if self._observing is not None and self._observing.done():
            done, self._observing = self._observing, None
            self.observed = {} if done.exception() is not None else done.result()
        if slow and self._observing is None:
            self._observing = self.worker.submit(partial(self.gpu.observe, ran, clocks_mhz))
        return self.observed

    def give_up(self, beats: Beats | None) -> None:
        """Close a plan that nothing has replaced."""
        if beats is not None:
            self.worker.submit(beats.close)

    def release(self, also: Callable[[], None]) -> None:
        """Give the lease back; ``also`` comes after it."""
        self.worker.submit(self.gpu.release)
        self.worker.submit(also)
