"""Which GPUs of the node a process sees: CUDA_VISIBLE_DEVICES and its relatives -> UUIDs.

House rules: a pure function of (GPUs of the node, environment, device nodes); a UUID is what comes out, an index never;
what cannot be known is a clear error, not a guess.

The rules are CUDA's: an entry that names no GPU ends the list, ``-1`` and the empty text mean none, ``GPU-`` prefixes must be
unique. Indices count the GPUs that the container or the job was given when it was given some (``NVIDIA_VISIBLE_DEVICES``,
``SLURM_STEP_GPUS``, the ``/dev/nvidiaN`` that exist), unless the list names exactly these GPUs by their numbers on the node or
a number is beyond what a renumbered list could hold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence

from powerd.errors import RequestError
from powerd.model import Gpu

_NONE = ("", "-1", "none", "void", "nodevfiles")


def visible(
    gpus: Sequence[Gpu],
    environ: Mapping[str, str] | None = None,
    *,
    device_minors: Collection[int] | None = None,
    use_local_rank: bool = True,
) -> tuple[str, ...]:
    """UUIDs of the GPUs that a process with this environment sees, in CUDA's order.

    With ``LOCAL_RANK`` set and several GPUs visible, only the one of that rank. RequestError when an entry cannot be mapped.
    """
    env = os.environ if environ is None else environ
    given = _given(gpus, env, device_minors)
    shown = _cuda(gpus, given, env)
    rank = env.get("LOCAL_RANK", "").strip()
    if not use_local_rank or not rank or len(shown) < 2:
        return tuple(g.uuid for g in shown)
    if not rank.isdecimal() or int(rank) >= len(shown):
        raise RequestError(
            f"LOCAL_RANK={rank} but {len(shown)} GPUs are visible", hint="name the GPUs by UUID", code="unknown_gpu"
        )
    return (shown[int(rank)].uuid,)


def device_minors(folder: str = "/dev") -> frozenset[int] | None:
    """Minor numbers of the ``/dev/nvidiaN`` that exist here, or ``None`` when there is none (no driver, or a simulated one)."""
    try:
        names = os.listdir(folder)
    except OSError:
        return None
    found = frozenset(int(m[1]) for name in names if (m := re.fullmatch(r"nvidia(\d+)", name)))
    return found or None


def _given(gpus: Sequence[Gpu], env: Mapping[str, str], minors: Collection[int] | None) -> list[Gpu]:
    """What the container or the scheduler handed to this process, in the order in which the driver numbers it (PCI)."""
    given = sorted(gpus, key=lambda g: (g.pci_bus_id.lower(), g.index))
    if minors is not None and all(g.minor_number is not None for g in given):
        given = [g for g in given if g.minor_number in minors]
    slurm = env.get("SLURM_STEP_GPUS") or env.get("SLURM_JOB_GPUS") or ""
    for text in (env.get("NVIDIA_VISIBLE_DEVICES"), slurm or None):
        if text is None or text.strip().lower() == "all":
            continue
        if text.strip().lower() in _NONE:
            # Without the container runtime the variable has no effect; with it there are no device nodes either.
            given = [] if text is not slurm and minors is None else given
            continue
        named = {g.uuid for entry in text.split(",") for g in _one(entry.strip(), gpus, gpus)}
        given = [g for g in given if g.uuid in named]
    return given


def _cuda(gpus: Sequence[Gpu], given: list[Gpu], env: Mapping[str, str]) -> list[Gpu]:
    text = env.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return given
    if text.strip().lower() in _NONE:
        return []
    entries = [e.strip() for e in text.split(",")]
    indices = [int(e) for e in entries if e.isdecimal()]
    on_node = sorted(gpus, key=lambda g: g.index)
    as_numbered_here = bool(indices) and (
        sorted(indices) == sorted(g.index for g in given) or (max(indices) >= len(given) and len(given) < len(gpus))
    )
    numbered = on_node if as_numbered_here else given
    fastest_first = env.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST").strip().upper() != "PCI_BUS_ID"
    if indices and fastest_first and len({g.name for g in given}) > 1:
        raise RequestError(
            "this node has different GPUs and CUDA numbers them fastest first, which only CUDA knows",
            hint="set CUDA_DEVICE_ORDER=PCI_BUS_ID or name the GPUs by UUID",
            code="unknown_gpu",
        )
    shown: list[Gpu] = []
    for entry in entries:
        found = _one(entry, gpus, numbered, by_position=not as_numbered_here)
        if not found or found[0] not in given:
            break  # CUDA ignores an entry that names no device and all that follow
        if found[0] in shown:
            return []  # CUDA shows no device at all when one is named twice
        shown += found
    return shown


def _one(entry: str, gpus: Sequence[Gpu], numbered: Sequence[Gpu], *, by_position: bool = False) -> list[Gpu]:
    """The GPU that one entry names, or nothing; MIG instances stand for their parent only where the name says which it is."""
    if entry.isdecimal():
        number = int(entry)
        if by_position:
            return [numbered[number]] if number < len(numbered) else []
        return [g for g in numbered if g.index == number][:1]
    if re.fullmatch(r"\d+:\d+", entry):  # GPU:instance, the container runtime's way to name a MIG device
        return [g for g in gpus if g.index == int(entry.partition(":")[0])][:1]
    if entry.upper().startswith("MIG-GPU-"):
        entry = entry[4:].partition("/")[0]
    elif entry.upper().startswith("MIG-"):
        raise RequestError(
            f"{entry} is a MIG instance: clocks and limits belong to the whole GPU",
            hint="name the parent GPU by its UUID (nvidia-smi -L shows it)",
            code="not_supported",
        )
    if not entry.upper().startswith("GPU-"):
        return []
    found = [g for g in gpus if g.uuid.lower().startswith(entry.lower())]
    if len(found) > 1:
        raise RequestError(f"{entry} fits {len(found)} GPUs", hint="write more of the UUID", code="unknown_gpu")
    return found


def pick(gpus: Sequence[Gpu], names: Sequence[str | int]) -> tuple[str, ...]:
    """UUIDs of GPUs that a person names by index on the node, UUID or unique UUID prefix, each once; RequestError if unknown."""
    found: list[str] = []
    for name in [part.strip() for text in names for part in str(text).split(",")]:
        if name == "all":
            matches = list(gpus)
        elif name.isdecimal():
            matches = [g for g in gpus if g.index == int(name)]
        else:
            matches = _one(name if name.upper().startswith(("GPU-", "MIG-")) else f"GPU-{name}", gpus, gpus)
        if not matches:
            known = ", ".join(str(g.index) for g in gpus) or "none"
            raise RequestError(f"no GPU {name!r} on this node", hint=f"GPUs here: {known}; `powerctl status` lists them",
                               code="unknown_gpu")  # fmt: skip
        found += [g.uuid for g in matches if g.uuid not in found]
    return tuple(found)
