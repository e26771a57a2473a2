"""How fast an instance computes and what it draws, by tensor parallelism and SM clock: what simulators and planners compute with.

House rules: every figure says where it is from (measured, fitted or assumed); a tensor parallelism or clock that the table does
not hold is refused with what it holds; units are seconds, watts of one GPU and tokens.

An iteration with ``p`` prompt tokens and ``b`` requests in decode takes
``max(decode_fixed_s if b else 0, prefill_fixed_s if p else 0) + prefill_token_s * p + decode_request_s * b`` seconds. Of them the
prompt's part (``prefill_token_s * p``, and ``prefill_fixed_s`` when nothing decodes) draws ``prefill_w``, the rest
``decode_w + decode_log2_w * log2(b + 1)`` per GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Coefficients:
    """One instance at one tensor parallelism and clock; watts are of one of its GPUs."""

    prefill_fixed_s: float
    prefill_token_s: float
    decode_fixed_s: float
    decode_request_s: float
    prefill_w: float
    decode_w: float
    decode_log2_w: float
    idle_w: float  # weights loaded, nothing to do, at this clock

    def iteration_s(self, prompt_tokens: int, decoding: int) -> float:
        """Return the seconds of one iteration."""
        fixed = max(self.decode_fixed_s if decoding else 0.0, self.prefill_fixed_s if prompt_tokens else 0.0)
        return fixed + self.prefill_token_s * prompt_tokens + self.decode_request_s * decoding

    def iteration_j(self, prompt_tokens: int, decoding: int) -> float:
        """Return the joules of one iteration on one of its GPUs."""
        total_s = self.iteration_s(prompt_tokens, decoding)
        prefill_s = self.prefill_token_s * prompt_tokens + (0.0 if decoding or not prompt_tokens else self.prefill_fixed_s)
        return self.prefill_w * prefill_s + self.decoding_w(decoding) * (total_s - prefill_s)

    def decoding_w(self, decoding: int) -> float:
        """Return the watts of one GPU while ``decoding`` requests decode."""
        return self.decode_w + self.decode_log2_w * math.log2(decoding + 1)


@dataclass(frozen=True, slots=True)
class EngineModel:
    """One model on one kind of GPU: ``table[(tp, clock_mhz)]``; ``kv_tokens[tp]`` tokens of context fit one instance."""

    name: str
    gpu: str
    table: Mapping[tuple[int, int], Coefficients]
    kv_tokens: Mapping[int, int]
    weights_bytes: int
    off_w: float = 72.0  # one GPU without a context
    origin: str = ""  # one line: what is measured, fitted, assumed

    @property
    def tps(self) -> tuple[int, ...]:
        """The tensor parallelisms that the table holds, ascending."""
        return tuple(sorted({tp for tp, _ in self.table}))

    def clocks_mhz(self, tp: int) -> tuple[int, ...]:
        """The SM clocks that the table holds for ``tp``, descending."""
        return tuple(sorted((clock for t, clock in self.table if t == tp), reverse=True))

    @property
    def max_clock_mhz(self) -> int:
        """The highest SM clock of the table."""
        return max(clock for _, clock in self.table)
