"""Where a rank stands in the job: its pipeline, its rank in it, its tensor-parallel peer number, and how that is found.

House rules: pure functions of what they are given; a size that does not divide is an error that says which; ranks are named in
warnings the way people count them in their launcher: from 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from powerd.errors import RequestError


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's place: ``pipeline`` is the data-parallel index, ``rank`` the one within the pipeline."""

    pipeline: int = 0
    rank: int = 0
    tensor: int = 0
    pipelines: int = 1
    ranks: int = 1
    tensors: int = 1
    local_rank: int = 0  # on this node; the first of a node keeps the profile cache

    def __str__(self) -> str:
        peer = f" (tensor-parallel peer {self.tensor})" if self.tensors > 1 else ""
        return f"rank {self.rank} of pipeline {self.pipeline}{peer}"


def place_of(world_rank: int, world_size: int, ranks: int, tensors: int = 1, *, local_rank: int = 0) -> Place:
    """The place of a rank in the usual layout: tensor-parallel peers are neighbours, then data parallel, then the pipeline.

    This is Megatron's order ``tp-dp-pp``; a framework that lays ranks out otherwise states the place itself.
    """
    per_stage, rest = divmod(world_size, ranks)
    if ranks < 1 or tensors < 1 or rest or per_stage % tensors or not 0 <= world_rank < world_size:
        raise RequestError(f"{world_size} ranks do not make pipelines of {ranks} ranks with {tensors} tensor-parallel peers each")
    rank, within = divmod(world_rank, per_stage)
    pipeline, tensor = divmod(within, tensors)
    return Place(pipeline, rank, tensor, per_stage // tensors, ranks, tensors, local_rank)


@dataclass(frozen=True, slots=True)
class Launch:
    """What a launcher told this process."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str


#: launcher -> names of (rank, world size, local rank); the first whose names are all there counts.
LAUNCHERS: Mapping[str, tuple[str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}


def launch(environ: Mapping[str, str]) -> Launch:
    """Who this process is by its launcher's environment; a process that nobody launched is rank 0 of 1."""
    for name, names in LAUNCHERS.items():
        if all(environ.get(key, "").isdecimal() for key in names):
            rank, size, local = (int(environ[key]) for key in names)
            if rank >= size:
                raise RequestError(f"{names[0]}={rank} but {names[1]}={size}")
            return Launch(rank, size, local, name)
    return Launch(0, 1, 0, "none")


def rendezvous(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for ``torch.distributed`` under any known launcher.

    Under srun the first host of the job is the master and the port is made from the job's number, so that all ranks agree.
    What is set already stays.
    """
    who = launch(environ)
    found = {"RANK": str(who.rank), "WORLD_SIZE": str(who.world_size), "LOCAL_RANK": str(who.local_rank)}
    if who.launcher == "srun":
        hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        job = environ.get("SLURM_JOB_ID", "0")
        found["MASTER_ADDR"] = first_host(hosts)
        found["MASTER_PORT"] = str(20000 + int(job) % 20000 if job.isdecimal() else 29500)
    elif who.launcher in ("none", "mpirun"):
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    return {key: environ.get(key, value) for key, value in found.items()}


def first_host(hosts: str) -> str:
    """The first host of a Slurm node list: ``gpu[07-09,12],login`` -> ``gpu07``."""
    head, bracket, rest = hosts.partition("[")
    if not bracket or "," in head:
        return hosts.partition(",")[0]
    inside, _, tail = rest.partition("]")
    return head + inside.partition(",")[0].partition("-")[0] + tail.partition(",")[0]
