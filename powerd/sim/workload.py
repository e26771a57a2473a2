"""Work on simulated GPUs: it progresses at the simulated clock and returns when the GPU has done it.

House rules: a kernel is named, its amount is in units (one unit of a measured stage kernel is one true microbatch
instruction, of a generic kernel one second at the top clock); a process that works is in NVML's process list; results
say how much simulated time and true energy it took, for scoring.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType

from powerd.arguments import Parser
from powerd.sim.layout import MAX_QUEUE, Item
from powerd.sim.node import SimError, SimNode, attach

GIB = 1 << 30
RUN, LOAD, BLOCKED = 1, 2, 3
MAX_SECONDS = 1e9
WAIT_REAL_MS = 500  # how long the driver may wait before Python looks for signals


class GpuLostError(SimError):
    """The GPU was lost while work ran on it."""


@dataclass(frozen=True, slots=True)
class Done:
    """What a piece of work took from when the GPU began: simulated seconds, and true energy of the whole GPU meanwhile."""

    seconds: float
    energy_mj: float
    end_ns: int


class Context:
    """A context on one simulated GPU: holds memory, is in the process list, runs one thing at a time."""

    def __init__(self, gpu: int, *, node: SimNode | None = None, name: str | None = None, memory_bytes: int = 4 * GIB) -> None:
        self._own = node is None
        self.node = attach() if node is None else node
        self.gpu = gpu
        self._library = self.node.library
        self._numbers: dict[str, int] = {}
        title = name or os.path.basename(sys.argv[0] or "python")
        self._row = int(self._library.powerd_sim_work_open(self.node.pointer, gpu, title.encode()[:63], memory_bytes))
        if self._row < 0:
            raise SimError(f"GPU {gpu} takes no further context (no such GPU, or 16 are open)")

    def kernel(self, name: str) -> int:
        """Return the number of a kernel; raises ValueError if this node has none of that name."""
        index = int(self._library.powerd_sim_kernel_index(self.node.pointer, name.encode()))
        if index < 0:
            raise ValueError(f"this simulated node has no kernel {name!r}")
        return index

    def run(self, kernels: Iterable[tuple[str, float]]) -> Done:
        """Run (kernel, units) one after another and return when the last is done; raises GpuLostError."""
        items = [Item(kernel=self.kernel(name), units=units) for name, units in kernels]
        parts = [
            self._submit(RUN, items[start : start + MAX_QUEUE], 1.0, 0, 0.0) for start in range(0, max(1, len(items)), MAX_QUEUE)
        ]
        begin_ns = parts[0].end_ns - round(parts[0].seconds * 1e9)
        end_ns = parts[-1].end_ns
        return Done((end_ns - begin_ns) / 1e9, sum(part.energy_mj for part in parts), end_ns)

    def load(self, activity: float, seconds: float, kernel: str = "gemm") -> Done:
        """Keep the GPU busy with a share `activity` (0..1) of a kernel for simulated `seconds`."""
        if not 0.0 <= activity <= 1.0:
            raise ValueError(f"activity is a share 0..1, not {activity}")
        return self._submit(LOAD, [], activity, self.kernel(kernel), seconds)

    def blocked(self, seconds: float) -> Done:
        """Wait `seconds` for communication: the GPU spins at its blocking power."""
        return self._submit(BLOCKED, [], 0.0, 0, seconds)

    def block(self) -> None:
        """Wait for communication from now on, at blocking power, until the next work or `rest`; returns at once."""
        self._begin(BLOCKED, [], 0.0, 0, MAX_SECONDS)

    def declare(self, power_w: float, kernel: str = "gemm") -> None:
        """Draw `power_w` at the present clock from now on, until the next work or `rest`; returns at once; raises GpuLostError.

        For work whose power is known from elsewhere, as of an inference engine: when the clock changes, power follows the
        kernel's shape until it is declared anew. The GPU cannot draw less than an idle one with a context.
        """
        number = self._numbers.get(kernel)
        if number is None:
            number = self._numbers[kernel] = self.kernel(kernel)
        at = (self.node.pointer, self.gpu, self._row)
        self._check(self._library.powerd_sim_work_declare(*at, number, power_w, round(MAX_SECONDS * 1e9)))

    def rest(self) -> None:
        """End a `block` or what was declared: the context stays open and does nothing."""
        self._begin(RUN, [], 1.0, 0, 0.0)

    def _begin(self, state: int, items: Sequence[Item], activity: float, kernel: int, seconds: float) -> int:
        if not 0.0 <= seconds <= MAX_SECONDS:
            raise ValueError(f"a load lasts 0 to {MAX_SECONDS:.0f} s, not {seconds}")
        array = (Item * max(1, len(items)))(*items)
        begin, at = ctypes.c_uint64(), (self.node.pointer, self.gpu, self._row)
        code = self._library.powerd_sim_work_submit(
            *at, state, array, len(items), activity, kernel, round(seconds * 1e9), ctypes.byref(begin)
        )
        self._check(code)
        return begin.value

    def _check(self, code: int) -> None:
        if code == 15:
            raise GpuLostError(f"GPU {self.gpu} was lost")
        if code != 0:
            raise SimError(f"the simulated GPU {self.gpu} refused the work (code {code})")

    def _submit(self, state: int, items: Sequence[Item], activity: float, kernel: int, seconds: float) -> Done:
        begin_ns = self._begin(state, items, activity, kernel, seconds)
        end, energy, at = ctypes.c_uint64(), ctypes.c_double(), (self.node.pointer, self.gpu, self._row)
        while True:
            got = self._library.powerd_sim_work_wait(*at, WAIT_REAL_MS, ctypes.byref(end), ctypes.byref(energy))
            if got == 0:
                return Done((end.value - begin_ns) / 1e9, energy.value * 1000.0, end.value)
            self._check(0 if got == 1 else got)

    def close(self) -> None:
        """Give the context back; twice is harmless."""
        if self._row >= 0:
            self._library.powerd_sim_work_close(self.node.pointer, self.gpu, self._row)
            self._row = -1
            if self._own:
                self.node.close()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def run(kernels: Iterable[tuple[str, float]], gpu: int = 0, *, node: SimNode | None = None, name: str | None = None) -> Done:
    """Run (kernel, units) on one simulated GPU and return simulated seconds and true energy."""
    with Context(gpu, node=node, name=name) as context:
        return context.run(kernels)


def load(gpu: int, activity: float, seconds: float, *, node: SimNode | None = None, kernel: str = "gemm") -> Done:
    """Put a steady load on one simulated GPU for simulated `seconds`."""
    with Context(gpu, node=node) as context:
        return context.load(activity, seconds, kernel)


def parse_kernel(text: str) -> tuple[str, float]:
    """Read `NAME` or `NAME:UNITS`; raises ValueError."""
    name, _, units = text.partition(":")
    return name, float(units) if units else 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run kernels or a steady load on the node named by POWERD_SIM_STATE; prints what it took."""
    parser = Parser(prog="powerd.sim.workload", description="Work on a simulated GPU.")
    parser.add_argument(
        "kernels",
        nargs="*",
        metavar="KERNEL[:UNITS]",
        help="kernels to run one after another (gemm, gpt3-175b/0/forward:4)",
    )
    parser.add_argument("--gpu", type=int, action="append", help="GPU index, repeatable (default 0; each GPU gets all the work)")
    parser.add_argument("--repeat", type=int, default=1, help="run the list this many times")
    parser.add_argument("--load", type=float, metavar="SHARE", help="instead: a steady load of this share, for --seconds")
    parser.add_argument("--seconds", type=float, default=10.0, help="simulated seconds of the steady load")
    parser.add_argument("--json", action="store_true", help="print one JSON object per GPU")
    args = parser.parse_args(argv)
    if not args.kernels and args.load is None:
        parser.error("name kernels to run, or --load SHARE")
    try:
        return _run_all(args)
    except (SimError, ValueError) as error:
        print(f"powerd.sim.workload: {error}", file=sys.stderr)
        return 2


def _run_all(args: argparse.Namespace) -> int:
    from concurrent.futures import ThreadPoolExecutor

    kernels = [parse_kernel(text) for text in args.kernels] * args.repeat

    def one(gpu: int) -> tuple[int, Done]:
        with Context(gpu, node=node, name="powerd-sim-workload") as context:
            return gpu, context.load(args.load, args.seconds) if args.load is not None else context.run(kernels)

    gpus = args.gpu or [0]
    with attach() as node, ThreadPoolExecutor(len(gpus)) as pool:
        for gpu, done in pool.map(one, gpus):
            if args.json:
                print(json.dumps({"simulated": True, "gpu": gpu, **asdict(done)}))
            else:
                print(f"GPU {gpu}: {done.seconds:.3f} s, {done.energy_mj / 1000:.1f} J (simulated)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
