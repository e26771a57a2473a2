"""One simulated node: created, looked at, disturbed and removed by tests, the demo and `powerd sim`.

House rules: the state is one file, everything that maps it sees the same GPUs; this module looks at the truth and is
for scoring only, product code measures through NVML; closing removes what creating made.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from powerd.sim import faults as fault_table
from powerd.sim import models
from powerd.sim.build import build
from powerd.sim.kernels import compile_kernel, node_curves
from powerd.sim.layout import Config, FaultRule, Kernel, View, bind

STATE_VARIABLE = "POWERD_SIM_STATE"
MODES = {"real": 0, "scaled": 1, "stepped": 2}
DRIVER_VERSION = "580.65.06"


class SimError(RuntimeError):
    """A simulated node cannot be made or found; the message says why."""


def parse_time(text: str) -> tuple[int, float]:
    """Read `real`, `x20` or `stepped` as (mode, scale); raises ValueError."""
    if text in ("real", "stepped"):
        return MODES[text], 1.0
    if text.startswith("x"):
        with contextlib.suppress(ValueError):
            scale = float(text[1:])
            if 0.001 <= scale <= 100000:
                return (MODES["scaled"], scale) if scale != 1.0 else (MODES["real"], 1.0)
    raise ValueError(f"time is 'real', 'stepped' or a factor such as 'x20', not {text!r}")


class SimNode:
    """A simulated node: use as a context manager; what it opened is closed and its file removed at the end."""

    def __init__(self, path: Path, *, owner: bool = False, folder: Path | None = None) -> None:
        self.path = path
        self.library_path = build()
        self._owner = owner
        self._folder = folder
        self._library = bind(str(self.library_path))
        self._sim: int | None = self._library.powerd_sim_map(os.fsencode(path))
        if not self._sim:
            raise SimError(f"{path} is not the state of a simulated node")
        self._config = Config()
        self._library.powerd_sim_config_at(self._sim, ctypes.byref(self._config))

    @property
    def library(self) -> ctypes.CDLL:
        """The simulated driver, with its control functions declared."""
        return self._library

    @property
    def pointer(self) -> int:
        """This process's mapping of the node; raises SimError once closed."""
        if not self._sim:
            raise SimError("this simulated node is closed")
        return self._sim

    @property
    def gpus(self) -> int:
        """How many GPUs the node has."""
        return int(self._config.gpus)

    @property
    def time(self) -> str:
        """The time mode, as given to `create`."""
        if self._config.mode == MODES["scaled"]:
            return f"x{self._config.scale:g}"
        return "stepped" if self._config.mode == MODES["stepped"] else "real"

    @property
    def model_name(self) -> str:
        """The name that the driver reports for its GPUs."""
        return str(self._config.model.name.decode())

    def env(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the variables a child needs to see this node, LD_LIBRARY_PATH prepended to that of `base`."""
        before = (os.environ if base is None else base).get("LD_LIBRARY_PATH", "")
        folder = str(self.library_path.parent)
        rest = [part for part in before.split(":") if part and part != folder]
        return {"LD_LIBRARY_PATH": ":".join([folder, *rest]), STATE_VARIABLE: str(self.path)}

    def load(self) -> ctypes.CDLL:
        """Make NVML calls of this process go to this node (call before nvmlInit)."""
        self._library.powerd_sim_attach(self.pointer)
        return self._library

    def now_ns(self) -> int:
        """Simulated CLOCK_BOOTTIME in nanoseconds."""
        return int(self._library.powerd_sim_now_at(self.pointer))

    def advance(self, seconds: float) -> int:
        """Move stepped time on by `seconds` (waits in the other modes); returns the new now in nanoseconds."""
        target = self.now_ns() + round(seconds * 1e9)
        limit_ms = 60_000 if self.time == "stepped" else -1
        reached = int(self._library.powerd_sim_advance_at(self.pointer, target, limit_ms))
        if reached < target:
            raise SimError("stepped time did not move within 60 s: a participant neither waits nor leaves")
        return reached

    def true_energy_mj(self, gpu: int) -> float:
        """True energy of one GPU since the node was made, in mJ."""
        return float(self._library.powerd_sim_true_energy_mj_at(self.pointer, gpu))

    def view(self, gpu: int) -> View:
        """The truth of one GPU as the driver holds it."""
        out = View()
        if self._library.powerd_sim_view_at(self.pointer, gpu, ctypes.byref(out)) != 0:
            raise SimError(f"no GPU {gpu}: this node has {self.gpus}")
        return out

    def show(self) -> dict[str, Any]:
        """Return the truth of the whole node as plain data; `simulated` is always true."""
        rows = []
        for gpu in range(self.gpus):
            view = self.view(gpu)
            row: dict[str, Any] = {"gpu": gpu, "uuid": view.uuid.decode()}
            for name, _ in View._fields_[1:]:  # type: ignore[misc]
                row[name] = getattr(view, name)
            row["locked_clocks_mhz"] = [view.lock_min_mhz, view.lock_max_mhz] if view.lock_max_mhz else None
            row["out_of_band_mw"] = None if view.out_of_band_mw == 2**32 - 1 else view.out_of_band_mw
            row["true_energy_mj"] = view.true_energy_uj / 1000.0
            rows.append(row)
        return {
            "simulated": True,
            "model": self.model_name,
            "time": self.time,
            "seed": int(self._config.seed),
            "now_ns": self.now_ns(),
            "gpus": rows,
        }

    def fault(
        self,
        kind: str,
        gpu: int | None = None,
        *,
        value: int | None = None,
        permission: str = "none",
        version: str = "585.10.01",
        function: str = "*",
        code: int | None = None,
        delay_s: float = 0.0,
        count: int | None = None,
        after: int = 0,
        probability: float = 1.0,
    ) -> int | None:
        """Inject one fault of `faults.KINDS` into one GPU or all; a rule returns its number. Raises ValueError."""
        row = fault_table.KINDS.get(kind)
        if row is None:
            raise ValueError(f"unknown fault {kind!r}; known: {', '.join(fault_table.KINDS)}")
        if gpu is not None and not 0 <= gpu < self.gpus:
            raise ValueError(f"no GPU {gpu}: this node has {self.gpus}")
        number = row.default if value is None else value
        if kind == "rule":
            rule = FaultRule(
                glob=function.encode(),
                gpu=-1 if gpu is None else gpu,
                ret=-1 if code is None else code,
                delay_ns=round(delay_s * 1e9),
                count=-1 if count is None else count,
                skip=after,
                probability=probability,
            )
            slot = int(self._library.powerd_sim_rule_add(self.pointer, ctypes.byref(rule)))
            if slot < 0:
                raise ValueError("the fault table is full: clear it first")
            return slot
        if kind == "permission":
            if permission not in fault_table.PERMISSIONS:
                raise ValueError(f"permission is root, any or none, not {permission!r}")
            self._node(fault_table.NodeKnob.PERM, fault_table.PERMISSIONS[permission])
        elif kind in ("driver-reload", "driver-upgrade"):
            text = version.encode() if kind == "driver-upgrade" else b""
            self._library.powerd_sim_reload(self.pointer, text)
        elif number is None:
            raise ValueError(f"fault {kind} needs a value")
        elif kind == "latency":
            self._node(fault_table.NodeKnob.LATENCY_PPM, number * 10_000)
        elif kind == "foreign-lock":
            for index in self._which(gpu):
                self._library.powerd_sim_set_lock(self.pointer, index, number, number)
        elif isinstance(row.knob, fault_table.NodeKnob):
            self._node(row.knob, number)
        else:
            assert row.knob is not None
            self._switch(row.knob, gpu, number)
        return None

    def rule_fired(self, slot: int) -> int:
        """How often a rule has fired."""
        return int(self._library.powerd_sim_rule_fired(self.pointer, slot))

    def clear_faults(self, gpu: int | None = None) -> None:
        """Switch every standing fault off (on one GPU or all), permission and latency back to how it was made."""
        for row in fault_table.KINDS.values():
            if row.clear is None or row.knob is None:
                continue
            value = int(self._config.persistence) if row.knob == fault_table.Knob.PERSISTENCE else row.clear
            if isinstance(row.knob, fault_table.Knob):
                self._switch(row.knob, gpu, value)
            elif gpu is None:
                self._node(row.knob, value)
        if gpu is None:
            self._node(fault_table.NodeKnob.PERM, int(self._config.perm))
            self._node(fault_table.NodeKnob.LATENCY_PPM, round(self._config.latency * 1e6))
            self._library.powerd_sim_rules_clear(self.pointer)

    def _which(self, gpu: int | None) -> range:
        return range(self.gpus) if gpu is None else range(gpu, gpu + 1)

    def _switch(self, knob: fault_table.Knob, gpu: int | None, value: int) -> None:
        for index in self._which(gpu):
            self._library.powerd_sim_set(self.pointer, index, int(knob), value)

    def _node(self, knob: fault_table.NodeKnob, value: int) -> None:
        self._library.powerd_sim_set_node(self.pointer, int(knob), value)

    def close(self) -> None:
        """Unmap the node and remove its file if this object made it; twice is harmless."""
        if self._sim:
            self._library.powerd_sim_unmap(self._sim)
            self._sim = None
        if self._owner:
            self._owner = False
            self.path.unlink(missing_ok=True)
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> SimNode:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def create(
    model: str = "h100-sxm",
    gpus: int = 8,
    time: str = "real",
    path: str | os.PathLike[str] | None = None,
    seed: int = 1,
    persistence: bool = True,
    perm: str = "any",
    *,
    latency: float = 1.0,
    first_open_s: float = 1.5,
    profiles: Mapping[str, str | os.PathLike[str]] | None = None,
    fit_on: str | Iterable[int] | None = None,
) -> SimNode:
    """Make a simulated node.

    `time` is real, stepped or a factor (x20); `latency` multiplies every injected driver latency (0 = none);
    `profiles` adds measured kernels (name -> CSV); `fit_on` limits measured kernels to some clocks ("every-second" or
    a list in MHz). Raises ValueError for bad arguments, BuildError without a compiler, SimError if the file exists.
    """
    constants = models.find(model)
    mode, scale = parse_time(time)
    if not 1 <= gpus <= 16:
        raise ValueError(f"gpus must be 1..16, not {gpus}")
    if perm not in fault_table.PERMISSIONS:
        raise ValueError(f"perm is root, any or none, not {perm!r}")
    curves = node_curves(constants, {name: Path(file) for name, file in (profiles or {}).items()}, fit_on)
    table = (Kernel * len(curves))(*(compile_kernel(name, *row) for name, row in curves.items()))
    config = Config(
        gpus=gpus,
        mode=mode,
        perm=fault_table.PERMISSIONS[perm],
        persistence=persistence,
        seed=seed,
        scale=scale,
        latency=latency,
        first_open_s=first_open_s,
        driver_version=DRIVER_VERSION.encode(),
        nvml_version=f"13.{DRIVER_VERSION}".encode(),
        cuda_version=13000,
        kernels=len(curves),
        model=models.to_c(constants),
    )
    library = bind(str(build()))
    folder = None
    if path is None:
        shared = Path("/dev/shm")  # noqa: S108 - a folder of our own is made inside
        folder = Path(tempfile.mkdtemp(prefix="powerd-sim-", dir=shared if os.access(shared, os.W_OK) else None))
        folder.chmod(0o755)
        path = folder / "node"
    code = library.powerd_sim_create(os.fsencode(path), ctypes.byref(config), table)
    if code != 0:
        raise SimError(f"cannot make a simulated node at {os.fspath(path)}: {os.strerror(code)}")
    return SimNode(Path(path), owner=True, folder=folder)


def attach(path: str | os.PathLike[str] | None = None) -> SimNode:
    """Open an existing node, by default the one named by POWERD_SIM_STATE; raises SimError."""
    named = os.fspath(path) if path is not None else os.environ.get(STATE_VARIABLE)
    if not named:
        raise SimError(f"no simulated node: run under `powerd sim run`, or set {STATE_VARIABLE}")
    return SimNode(Path(named))
