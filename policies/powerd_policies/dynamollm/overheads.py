"""What a change of the fleet costs in time, with each of the published fixes on or off (DynamoLLM section 4.5).

House rules: the raw stages are the published ones, the middle of a published range; what a fix leaves over is assumed, and a
named field; seconds that serve nobody are told apart from seconds until it is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Fixes:
    """The paper's remedies; each can be taken away for an ablation."""

    cached_weights: bool = True  # weights come from inside the cluster
    snapshot: bool = True  # a VM's and an engine's state are restored, not built
    background_start: bool = True  # an instance is started before the peak that it is for
    weights_in_memory: bool = True  # a re-shard copies from GPU to GPU, it does not load again
    matching: bool = True  # GPUs keep the shards that they have
    overlap: bool = True  # the old instances serve until the new ones are ready, where memory allows
    resident_nvml: bool = True  # clocks are set in a process that stays, not by a command each time

    @classmethod
    def none(cls) -> Fixes:
        """Return every fix taken away."""
        return cls(*([False] * 7))


@dataclass(frozen=True, slots=True)
class Reshard:
    """One change of tensor parallelism: ``total_s`` until the new instances serve, ``blocked_s`` of it in which nobody does."""

    total_s: float
    blocked_s: float


@dataclass(frozen=True, slots=True)
class Overheads:
    """Seconds of every action on a fleet; what is not published is named as assumed."""

    fixes: Fixes = field(default_factory=Fixes)
    vm_s: float = 90.0  # 1 to 2 minutes
    init_s: float = 120.0  # the distributed environment
    download_s: float = 180.0
    engine_s: float = 18.0
    load_s: float = 15.0  # weights and KV cache to the GPUs
    restored_s: float = 20.0  # assumed: VM, environment and engine from a snapshot
    cached_s: float = 12.0  # assumed: 140 GB of weights over 100 Gbit/s
    t_s: float = 0.05  # T: an eighth of the model over NVLink
    weights_bytes: int = 140_000_000_000
    sync_s: float = 2.0  # assumed: the GPUs of a new instance agree and rebuild their engine around weights that they hold
    nvidia_smi_s: float = 0.065  # 50 to 80 ms
    nvml_s: float = 0.0045  # median of a resident process

    def start_stages(self, *, new_node: bool = True) -> Mapping[str, float]:
        """Return the seconds of each stage of a start; without ``new_node`` the VM is there already."""
        built = self.vm_s if new_node else 0.0
        if self.fixes.snapshot:
            stages = {"restore": self.restored_s}
        else:
            stages = {"vm": built, "init": self.init_s, "engine": self.engine_s}
        return stages | {"weights": self.cached_s if self.fixes.cached_weights else self.download_s, "kv": self.load_s}

    def start_s(self, *, new_node: bool = True) -> float:
        """Return the seconds from the wish for an instance to its first request."""
        return sum(self.start_stages(new_node=new_node).values())

    def lead_s(self, *, new_node: bool = True) -> float:
        """Return how long before a predicted peak an instance is wanted: 0 unless it is started in the background."""
        return self.start_s(new_node=new_node) if self.fixes.background_start else 0.0

    def transfer_s(self, bytes_of_busiest_gpu: int) -> float:
        """Return the seconds in which one GPU takes in or gives out so many bytes over NVLink."""
        return self.t_s * bytes_of_busiest_gpu / (self.weights_bytes / 8)

    def naive_bytes(self, from_tp: int, to_tp: int) -> int:
        """Return what the busiest GPU takes in when no GPU keeps anything: its whole new shard; nothing where TP stays."""
        return 0 if from_tp == to_tp else self.weights_bytes // to_tp

    def reshard(self, from_tp: int, to_tp: int, moved_bytes: int | None = None, *, fits_memory: bool = True) -> Reshard:
        """Return what a change from ``from_tp`` to ``to_tp`` costs.

        ``moved_bytes`` is what the busiest GPU moves (``reshard.ReshardPlan.busiest_bytes``); None, or matching taken away: its
        whole new shard. ``fits_memory``: old and new weights fit the GPUs together, without which there is no overlap.
        """
        if from_tp == to_tp:
            return Reshard(0.0, 0.0)
        if not self.fixes.weights_in_memory:
            rebuilt = self.restored_s if self.fixes.snapshot else self.init_s + self.engine_s
            total_s = rebuilt + (self.cached_s if self.fixes.cached_weights else self.download_s) + self.load_s
            return Reshard(total_s, total_s)
        moved = self.naive_bytes(from_tp, to_tp) if moved_bytes is None or not self.fixes.matching else moved_bytes
        transfer_s = self.transfer_s(moved)
        total_s = transfer_s + self.sync_s
        return Reshard(total_s, 0.0 if self.fixes.overlap and fits_memory else total_s)

    def reshard_s(self, from_tp: int, to_tp: int, moved_bytes: int | None = None) -> float:
        """Return the seconds until the new instances serve."""
        return self.reshard(from_tp, to_tp, moved_bytes).total_s

    @property
    def clock_set_s(self) -> float:
        """Seconds that one setting of a GPU's clock takes."""
        return self.nvml_s if self.fixes.resident_nvml else self.nvidia_smi_s

    @property
    def starts_in_background(self) -> bool:
        """Whether instances are started ahead of the peak that they are for."""
        return self.fixes.background_start
