"""The series of the Prometheus page that name somebody: who set what, and what each training job used.

House rules: as powerd.sinks.metrics, which holds the table; whatever is no longer so leaves the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from powerd.api import JobView
from powerd.model import Control, Setpoint, WantClass
from powerd.sinks.metrics import Metrics

_TRAINING = ("energy_joules", "steps", "step_energy_joules", "step_seconds", "saving_ratio")


def show_jobs(metrics: Metrics, jobs: Iterable[JobView]) -> None:
    """What these jobs reported, each under its name; a late report may take a step's energy back, the counter stays."""
    told: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in _TRAINING}
    for job in jobs:
        values = (job.energy_j, job.steps + job.lost_steps, job.energy_per_retained_step_j, job.time_s, job.saving_fraction)
        for name, value in zip(_TRAINING, values, strict=True):
            if value is not None:
                told[name][(job.job,)] = value
    for name, series in told.items():
        metrics.replace(f"powerd_training_{name}", series)


def show_setpoints(metrics: Metrics, setpoints: Iterable[Setpoint], holders: Mapping[str, str]) -> None:
    """What is not at baseline and for whom; ``holders`` names the user of a lease, any other source goes by its own name."""
    set_by: dict[tuple[str, ...], float] = {}
    locks: dict[tuple[str, ...], float] = {}
    users: dict[tuple[str, ...], float] = {}
    for setpoint in setpoints:
        if setpoint.value is None:
            continue
        gpu = (setpoint.uuid, metrics.index(setpoint.uuid))
        winner = next((want for want in setpoint.considered if want.source == setpoint.winner), None)
        kind = (winner.want_class if winner else WantClass.DEFAULT).name.lower()
        source = setpoint.winner or ""
        set_by[(*gpu, str(setpoint.control), kind, holders.get(source, source))] = 1.0
        if setpoint.control is Control.SM_CLOCK:
            locks[(*gpu, "minimum")] = setpoint.value.low * 1e6
            locks[(*gpu, "maximum")] = setpoint.value.high * 1e6
    for user in holders.values():
        users[(user,)] = users.get((user,), 0.0) + 1
    metrics.replace("powerd_gpu_set_by", set_by)
    metrics.replace("powerd_gpu_sm_clock_lock_hertz", locks)
    metrics.replace("powerd_user_leases", users)
