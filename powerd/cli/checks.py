"""What `powerctl doctor` looks at, as functions that return findings.

House rules: a finding says what is so and, unless it is good, what to do; nothing is changed; other programs are recognised by
their process, never by parsing what they print.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from powerd.api import NodeView


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    level: Level
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Manager:
    """Another program that sets GPU clocks or limits: how it is recognised and what to do about it."""

    name: str
    commands: tuple[str, ...] = ()  # as the kernel names the process (15 characters)
    arguments: tuple[str, ...] = ()  # a part of the command line, for scripts
    remedy: str = ""


#: Who else moves these settings (docs/client.md says how each collides).
MANAGERS = (
    Manager("nvidia-powerd", ("nvidia-powerd",), remedy="systemctl disable --now nvidia-powerd: it moves power limits"),
    Manager("DCGM", ("nv-hostengine", "dcgm-exporter"),
            remedy="monitoring is fine; set no targets: `dcgmi config --get` shows them, `dcgmi config --clear` drops them"),
    Manager("zeusd", ("zeusd",), remedy="stop zeusd, or leave control = false here: two writers undo one another"),
    Manager("GEOPM", ("geopmd", "geopmctl"), remedy="stop geopmd, or leave control = false here"),
    Manager("EAR", ("eard",), remedy="switch EAR's GPU power cap off"),
    Manager("NVIDIA Dynamo power agent", arguments=("power_agent.py",),
            remedy="keep the GPUs' pods free of gpu-power-limit annotations, or remove the agent from this node"),
    Manager("nvidia-smi in a loop", arguments=("nvidia-smi -lgc", "nvidia-smi -pl"), remedy="stop it: powerd yields to it"),
)  # fmt: skip


def processes(proc: Path = Path("/proc")) -> Iterator[tuple[int, str, str]]:
    """Every process that can be seen: pid, kernel's name, command line."""
    for entry in proc.iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            name = (entry / "comm").read_text(errors="replace").strip()
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue  # gone meanwhile
        yield int(entry.name), name, line


def managers(proc: Path = Path("/proc"), environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Other programs on this node that set GPU clocks or limits."""
    env = os.environ if environ is None else environ
    seen = list(processes(proc))
    own = os.getpid()
    findings = []
    for manager in MANAGERS:
        pids = [
            pid for pid, name, line in seen
            if pid != own and (name in {c[:15] for c in manager.commands} or any(a in line for a in manager.arguments))
        ]  # fmt: skip
        if pids:
            what = f"{manager.name} runs here (pid {', '.join(map(str, pids[:3]))})"
            findings.append(Finding("other managers", Level.NOTE, what, manager.remedy))
    if frequency := env.get("SLURM_GPU_FREQ"):
        findings.append(
            Finding("other managers", Level.PROBLEM, f"Slurm sets this step's clocks (--gpu-freq={frequency})",
                    "submit without --gpu-freq: its reset at step end undoes leases")
        )  # fmt: skip
    elif any(name == "slurmd" for _, name, _ in seen):
        findings.append(
            Finding(
                "other managers", Level.NOTE, "slurmd runs here", "jobs that ask for --gpu-freq set clocks behind powerd's back"
            )
        )
    return findings or [Finding("other managers", Level.OK, "none seen")]


def _nvml() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None


def driver(proc: Path = Path("/proc"), dev: Path = Path("/dev"), load: Callable[[], ctypes.CDLL | None] = _nvml) -> list[Finding]:
    """Whether an NVIDIA driver, or a simulated one, is there."""
    library = load()
    if library is not None and hasattr(library, "powerd_sim_version"):
        return [Finding("driver", Level.OK, "simulated (libnvidia-ml.so.1 is powerd's simulator)")]
    version = proc / "driver" / "nvidia" / "version"
    if not version.exists():
        text = "no NVIDIA kernel driver is loaded" + (", but NVML is installed" if library is not None else "")
        return [Finding("driver", Level.PROBLEM, text, "load it (modprobe nvidia), or try `powerd sim run -- powerctl doctor`")]
    if library is None:
        return [Finding("driver", Level.PROBLEM, "the driver is loaded but libnvidia-ml.so.1 is not found",
                        "install the driver's user-space libraries of the same version")]  # fmt: skip
    missing = [] if (dev / "nvidiactl").exists() else [
        Finding("driver", Level.PROBLEM, "/dev/nvidiactl is missing", "run nvidia-modprobe, or give the container the GPUs")
    ]  # fmt: skip
    return missing or [Finding("driver", Level.OK, "loaded")]


def node(view: NodeView) -> list[Finding]:
    """What the daemon says of itself, its hw unit and its GPUs."""
    found = [Finding("daemon", Level.OK, f"powerd {view.version} answers (API {view.api_version})")]
    if not view.config_reload_ok:
        found.append(Finding("daemon", Level.PROBLEM, f"the last configuration was refused: {view.config_error}",
                             "correct it (`powerd check-config`) and reload"))  # fmt: skip
    if view.hw_connected:
        found.append(Finding("hw unit", Level.OK, f"connected, generation {view.hw_generation}, {view.sample_hz:g} Hz"))
    else:
        found.append(
            Finding("hw unit", Level.PROBLEM, "powerd-hw is not connected", "systemctl status powerd-hw; journalctl -u powerd-hw")
        )
    if view.panic:
        found.append(
            Finding("control", Level.PROBLEM, "panic: every GPU is at baseline", "powerctl resume, or remove the panic file")
        )
    elif view.quiesced:
        found.append(Finding("control", Level.NOTE, "quiesced for maintenance", "powerctl resume"))
    elif view.control:
        found.append(Finding("control", Level.OK, "powerd may set clocks and limits"))
    else:
        why = f"monitor only: {view.control_why.removeprefix('monitor only: ')}"
        found.append(Finding("control", Level.NOTE, why, "control = true in [daemon] of powerd.toml"))
    if not view.gpus:
        found.append(Finding("GPUs", Level.PROBLEM, "the daemon sees no GPU", "see the driver above"))
    told: dict[tuple[str, str, str], list[str]] = {}  # (check, text, remedy) -> GPUs: eight equal GPUs are one line
    for capability in view.gpus:
        index = str(capability.gpu.index)
        for control, support in capability.controls.items():
            if not support.available:
                told.setdefault(("permission", f"{control} cannot be set: {support.reason}", ""), []).append(index)
        if capability.persistence is False:
            text = "persistence mode is off: settings go with the last client"
            told.setdefault(("persistence", text, "enable nvidia-persistenced"), []).append(index)
        if not capability.energy_counter:
            told.setdefault(("energy", "no energy counter; energy is integrated from power readings", ""), []).append(index)
        if capability.mig:
            told.setdefault(("MIG", "MIG is on: clocks and limits act on all its instances", ""), []).append(index)
    for (check, text, remedy), gpus in told.items():
        found.append(Finding(check, Level.NOTE, f"GPU {', '.join(gpus)}: {text}", remedy))
    if view.gpus and all(s.available for c in view.gpus for s in c.controls.values()):
        found.append(Finding("permission", Level.OK, "every control can be set"))
    return found


def after_stop(run_dir: Path, journal_dir: Path, proc: Path = Path("/proc")) -> list[Finding]:
    """Proof that a stopped powerd left nothing: no process, no socket, nothing in the journal that is not undone."""
    from powerd.hw import journal as journals

    found = []
    ours = [(pid, line) for pid, _, line in processes(proc) if pid != os.getpid() and _is_ours(line)]
    found += [Finding("processes", Level.PROBLEM, f"still running: pid {pid}: {line[:80]}", "stop it") for pid, line in ours]
    if not ours:
        found.append(Finding("processes", Level.OK, "no powerd, no powerd-hw"))
    left = [p for p in (run_dir / "powerd.sock", run_dir / "attach.sock") if p.exists()]
    found += [
        Finding("sockets", Level.NOTE, f"{p} is still there", "a systemd socket unit may own it; else remove it") for p in left
    ]
    journal = journal_dir / journals.FILE_NAME
    try:
        data = journal.read_bytes()
    except FileNotFoundError:
        found.append(Finding("journal", Level.OK, f"nothing was ever set ({journal} does not exist)"))
    except PermissionError:
        found.append(Finding("journal", Level.NOTE, f"{journal} cannot be read", "run it as root"))
    else:
        # Of which driver load the file is does not matter here: nothing may be open, so its own word is taken.
        load = journals._HEADER.unpack_from(data)[4] if len(data) >= journals.RECORD_BYTES else b""
        known = journals.parse(data, journals.boot_id(), load)
        rows = [f"{uuid} {control}" for uuid, control in known.entries] + ([known.damaged] if known.damaged else [])
        found += [Finding("journal", Level.PROBLEM, f"not undone: {row}", "powerd restore") for row in rows]
        if not rows:
            found.append(Finding("journal", Level.OK, "everything that was set has been undone"))
    return found


def _is_ours(line: str) -> bool:
    words = line.split()
    return any(w in ("powerd.main", "powerd.hw") for w in words) or any(
        w.rsplit("/", 1)[-1] == "powerd" and words[i + 1 : i + 2] in (["run"], ["hw"]) for i, w in enumerate(words)
    )
