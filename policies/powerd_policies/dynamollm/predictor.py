"""How much load is coming: a weekly template in five-minute slots, bent to what was seen lately (DynamoLLM section 4.4).

House rules: a prediction is made of what was observed before it and of nothing else, and time that runs backwards is an error;
a rate that was not observed is missing, never 0; every knob is a number of ``Knobs``, so that a study can turn it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.fleet import ClassLoad

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

DAY_S: Final = 86_400.0
WEEK_S: Final = 7 * DAY_S
UNIX_EPOCH_S: Final = 3 * DAY_S  # where Unix time begins in the week, for those whose times are Unix times: a Thursday, UTC
#: One row of a history: when, over how many seconds before, and what arrived then; what ``observe`` takes.
Observed = tuple[float, float, Mapping[str, ClassLoad]]


@dataclass(frozen=True, slots=True)
class Rate:
    """Load of one class."""

    requests_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Injected:
    """Error for studies: every prediction is multiplied by ``1 + bias`` and by a log-normal factor, one per class and slot."""

    bias: float = 0.0
    spread: float = 0.0
    seed: int = 0

    def factor(self, name: str, slot: int) -> float:
        """Return the factor of one class in one slot of time: the same whenever and however often it is asked."""
        if not self.spread:
            return 1.0 + self.bias
        first = zlib.crc32(f"{self.seed}/{name}/{slot}/a".encode()) / 2**32
        second = zlib.crc32(f"{self.seed}/{name}/{slot}/b".encode()) / 2**32
        normal = math.sqrt(-2.0 * math.log(1.0 - first)) * math.cos(2.0 * math.pi * second)
        return (1.0 + self.bias) * math.exp(self.spread * normal)


@dataclass(frozen=True, slots=True)
class Knobs:
    """What can be turned; the seconds are ours, the slots and medians the paper's."""

    headroom: float = 1.05  # the small over-provision: predictions are multiplied by it
    slot_s: float = 300.0
    bin_s: float = 60.0  # the resolution in which recent load is kept
    level_s: float = 300.0  # recent load is the mean over this long ...
    peak_s: float = 600.0  # ... and the bins of this long, of each what surely was more than chance
    sure_sigmas: float = 2.0
    ratio_s: float = 3600.0  # the template is bent by observed / template over this long
    ratio_requests: float = 30.0  # requests that it takes to believe a class's own ratio rather than that of all classes
    ratio_bounds: tuple[float, float] = (0.5, 2.0)
    trend_s: float = 1800.0  # without a template: a rise that this long shows continues ...
    trend_most: float = 0.5  # ... by at most this share
    smooth_days: int = 5  # a template of fewer days than this is smoothed ...
    smooth_slots: int = 2  # ... over so many slots on either side
    keep_days: int = 20  # of each kind


class LoadPredictor:
    """Predicts the peak rate of each class from the past; without any history from recent load and its rise alone.

    ``epoch_s`` is where in the week time 0 lies, in seconds after Monday 00:00.
    """

    def __init__(
        self,
        *,
        classes: tuple[str, ...] = NAMES,
        epoch_s: float = 0.0,
        knobs: Knobs | None = None,
        injected: Injected | None = None,
    ) -> None:
        import numpy as np

        self._np = np
        self.classes = classes
        self.knobs = knobs or Knobs()
        self.injected = injected or Injected()
        self._at = {name: n for n, name in enumerate(classes)}
        self._epoch_s = epoch_s
        self._slots = round(DAY_S / self.knobs.slot_s)
        self._bins = max(2, math.ceil((max(self.knobs.ratio_s, self.knobs.trend_s) + self.knobs.slot_s) / self.knobs.bin_s) + 2)
        self._seen = np.zeros((self._bins, len(classes), 3))  # requests, prompt tokens, output tokens by bin (a ring)
        self._covered_s = np.zeros(self._bins)
        self._bin: int | None = None  # the newest
        self._slot: int | None = None
        self._slot_sum = np.zeros((len(classes), 3))
        self._slot_s = 0.0
        self._now_s = -math.inf
        self._observing = False
        self._bent: tuple[int, Array] | None = None  # the newest ratio and its bin
        # Rates by slot, NaN where not known: of days too young for the template, and of those in it, weekdays and weekends.
        self._young: dict[int, Array] = {}
        self._days: tuple[list[Array], list[Array]] = ([], [])
        self._median = np.full((2, self._slots, len(classes), 3), np.nan)
        self._template: dict[int, Array] = {}

    def observe(self, now_s: float, window_s: float, arrivals: Mapping[str, ClassLoad]) -> None:
        """Take in what arrived in the ``window_s`` seconds before ``now_s``; of a window seen in part, its new part by share.

        Raises ``ValueError`` for time that runs backwards and for a class that is not predicted here; nothing changes then.
        """
        self._take(now_s, window_s, arrivals)
        self._observing = True

    def _take(self, now_s: float, window_s: float, arrivals: Mapping[str, ClassLoad]) -> None:
        counts = self._counts(arrivals)
        if window_s <= 0.0 or now_s < self._now_s:
            raise ValueError(f"load of {window_s:g} s at {now_s:g} s: after {self._now_s:g} s only later windows can be observed")
        start_s = max(now_s - window_s, self._now_s)
        if now_s <= start_s:
            return
        counts *= 1.0 / window_s
        self._now_s = now_s
        bin_s = self.knobs.bin_s
        while start_s < now_s:
            number = math.floor(start_s / bin_s + 1e-9)
            end_s = min(now_s, (number + 1) * bin_s)
            self._add(number, start_s, end_s - start_s, counts)
            start_s = end_s

    def learn(self, history: Iterable[Observed], shift_s: float = 0.0) -> None:
        """Fill the template with a past: rows as ``observe`` takes them, in order of time, moved by ``shift_s``.

        A history with times of its own is moved before the begin by whole weeks. Raises ``ValueError`` once something was
        observed: a past is known before, or it is no past.
        """
        if self._observing:
            raise ValueError("a predictor learns its history before it observes; what comes later it learns by observing")
        for now_s, window_s, arrivals in history:
            self._take(now_s + shift_s, window_s, arrivals)
        self._close_slot()
        self._slot = None
        self._keep_days()

    def peak(self, from_s: float, to_s: float) -> dict[str, Rate]:
        """Return for each class the highest rate to expect between ``from_s`` and ``to_s``; zeros before anything was seen."""
        np, knobs = self._np, self.knobs
        recent = self._recent()
        expected = self._expected(from_s, max(to_s, from_s + 1e-9))
        if expected is None:
            top = recent * self._rise(to_s)
        elif from_s < self._now_s + knobs.level_s:
            top = np.fmax(expected, recent)
        else:
            top = np.where(np.isnan(expected), recent, expected)
        slot = math.floor(from_s / knobs.slot_s)
        out = {}
        for n, name in enumerate(self.classes):
            factor = knobs.headroom * self.injected.factor(name, slot)
            out[name] = Rate(*(float(value) * factor for value in top[n]))
        return out

    def _counts(self, arrivals: Mapping[str, ClassLoad]) -> Array:
        counts = self._np.zeros((len(self.classes), 3))
        for name, load in arrivals.items():
            at = self._at.get(name)
            if at is None:
                raise ValueError(f"class {name!r} is not predicted here; the classes are {', '.join(self.classes)}")
            counts[at] = (load.requests, load.prompt_tokens, load.output_tokens)
        return counts

    def _add(self, number: int, start_s: float, length_s: float, rates: Array) -> None:
        if self._bin is None:
            self._bin = number
        elif number > self._bin:
            for past in range(max(self._bin + 1, number - self._bins + 1), number + 1):
                self._seen[past % self._bins] = 0.0
                self._covered_s[past % self._bins] = 0.0
            self._bin = number
        self._seen[number % self._bins] += rates * length_s
        self._covered_s[number % self._bins] += length_s
        slot = math.floor((start_s + self._epoch_s) / self.knobs.slot_s + 1e-9)
        if slot != self._slot:
            self._close_slot()
            self._slot = slot
        self._slot_sum += rates * length_s
        self._slot_s += length_s

    def _close_slot(self) -> None:
        """Note the slot that ended, if most of it was seen; days become template once the ratio looks back at them no more."""
        np = self._np
        if self._slot is None:
            return
        day, slot = divmod(self._slot, self._slots)
        if self._slot_s >= 0.5 * self.knobs.slot_s:
            self._young.setdefault(day, np.full((self._slots, len(self.classes), 3), np.nan))[slot] = (
                self._slot_sum / self._slot_s
            )
        if slot * self.knobs.slot_s >= self.knobs.ratio_s:
            self._keep_days(before=day)
        self._slot_sum[:] = 0.0
        self._slot_s = 0.0

    def _keep_days(self, before: float = math.inf) -> None:
        """Make the days that ended part of the template."""
        np = self._np
        for day in [day for day in self._young if day < before]:
            kind = int(day % 7 >= 5)
            kept = self._days[kind]
            kept.append(self._young.pop(day))
            del kept[: -self.knobs.keep_days]
            known = ~np.isnan(np.stack(kept)[:, :, 0, 0])
            self._median[kind] = np.nan
            for slot in np.nonzero(known.any(axis=0))[0]:
                self._median[kind][slot] = np.median([rates[slot] for rates in kept if not math.isnan(rates[slot, 0, 0])], axis=0)
            self._template.pop(kind, None)

    def _of_kind(self, kind: int) -> Array:
        """Return the template of weekdays or weekends, smoothed while it is young; where it is not known the other kind's."""
        np = self._np
        if kind not in self._template:
            medians = self._median[kind]
            if len(self._days[kind]) < self.knobs.smooth_days:
                near = np.stack(
                    [np.roll(medians, shift, axis=0) for shift in range(-self.knobs.smooth_slots, self.knobs.smooth_slots + 1)]
                )
                known = ~np.isnan(near)
                total = np.where(known, near, 0.0).sum(axis=0)
                medians = np.where(np.isnan(medians), np.nan, total / np.maximum(known.sum(axis=0), 1))
            self._template[kind] = medians
        return self._template[kind]

    def _at_slot(self, slot: int) -> Array:
        day, at = divmod(slot, self._slots)
        kind = int(day % 7 >= 5)
        own: Array = self._of_kind(kind)[at]
        if math.isnan(own[0, 0]):
            own = self._of_kind(1 - kind)[at]
        return own

    def _expected(self, from_s: float, to_s: float) -> Array | None:
        """Return the template's peak, bent to the recent past; None where the template knows nothing of this time."""
        np, knobs = self._np, self.knobs
        first = math.floor((from_s + self._epoch_s) / knobs.slot_s)
        last = math.ceil((to_s + self._epoch_s) / knobs.slot_s)
        rows = [
            row for slot in range(first, min(last, first + 7 * self._slots)) if not np.isnan((row := self._at_slot(slot))[0, 0])
        ]
        if not rows:
            return None
        top: Array = np.max(rows, axis=0) * self._ratio()
        return top

    def _ratio(self) -> Array:
        """Return observed / template of the last hour's whole bins, of each class as far as its requests bear it."""
        np, knobs = self._np, self.knobs
        newest = self._bin or 0
        if self._bent is not None and self._bent[0] == newest:
            return self._bent[1]
        shape = (len(self.classes), 3)
        observed, expected = np.zeros(shape), np.zeros(shape)
        for number in range(newest - round(knobs.ratio_s / knobs.bin_s), newest):
            covered_s = float(self._covered_s[number % self._bins])
            if covered_s > 0.0:
                row = self._at_slot(math.floor((number * knobs.bin_s + self._epoch_s) / knobs.slot_s))
                if not math.isnan(row[0, 0]):
                    observed += self._seen[number % self._bins]
                    expected += row * covered_s
        total, base = observed.sum(axis=0), expected.sum(axis=0)
        ratio: Array = np.ones(shape)
        if base[0] > 0.0:
            pseudo = knobs.ratio_requests * base / base[0]
            common = (total + pseudo) / (base + pseudo)
            pseudo = np.maximum(pseudo, 1e-12)
            ratio = np.clip((observed + pseudo * common) / (expected + pseudo), *knobs.ratio_bounds)
        self._bent = (newest, ratio)
        return ratio

    def _last(self, span_s: float) -> tuple[Array, Array]:
        """Return what was seen in the bins of the last ``span_s`` seconds, and how many seconds of each were covered."""
        np = self._np
        newest = self._bin or 0
        at = np.arange(newest - max(1, round(span_s / self.knobs.bin_s)) + 1, newest + 1) % self._bins
        return self._seen[at], self._covered_s[at]

    def _recent(self) -> Array:
        """Return the recent peak: the mean of the last minutes, or a single minute's rate less what chance explains."""
        np, knobs = self._np, self.knobs
        seen, covered_s = self._last(knobs.level_s)
        level: Array = seen.sum(axis=0) / max(float(covered_s.sum()), 1e-9)
        seen, covered_s = self._last(knobs.peak_s)
        whole = covered_s > 0.5 * knobs.bin_s
        if not whole.any():
            return level
        requests = seen[whole, :, :1]
        sure = np.clip(1.0 - knobs.sure_sigmas / np.sqrt(np.maximum(requests, 1e-9)), 0.0, 1.0)
        bursts = (seen[whole] * sure / covered_s[whole][:, None, None]).max(axis=0)
        top: Array = np.maximum(level, bursts)
        return top

    def _rise(self, to_s: float) -> float:
        """Return by how much all load will have risen by ``to_s`` if the rise that the last half hour surely shows goes on."""
        np, knobs = self._np, self.knobs
        seen, covered_s = self._last(knobs.trend_s)
        whole = covered_s > 0.5 * knobs.bin_s
        if whole.sum() < 5:
            return 1.0
        rates = seen[whole, :, 0].sum(axis=1) / covered_s[whole]
        times_s = np.nonzero(whole)[0] * knobs.bin_s
        times_s = times_s - times_s.mean()
        spread = float((times_s**2).sum())
        slope = float((times_s * rates).sum()) / spread
        rest = rates - rates.mean() - slope * times_s
        error = math.sqrt(float((rest**2).sum()) / max(len(rates) - 2, 1) / spread)
        mean = float(rates.mean())
        if mean <= 0.0:
            return 1.0
        sure = max(0.0, slope - knobs.sure_sigmas * error) / mean
        return 1.0 + min(knobs.trend_most, sure * max(0.0, to_s - self._now_s))
