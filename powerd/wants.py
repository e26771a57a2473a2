"""What a client asks for -> wants of the reconcile rule, checked against what the GPUs can do.

House rules: pure; a request is refused as a whole, with the range or the names that would have been right.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from powerd.api import LeaseRequest, WantSpec
from powerd.clock import from_seconds
from powerd.config import LimitsConfig
from powerd.decode import nearest
from powerd.errors import DeviceError, RequestError
from powerd.lease import Lease
from powerd.model import Capabilities, Control, Interval, Want, WantClass
from powerd.reconcile import UNBOUNDED, site_interval, snap

_MAX_TEXT = 200


def interval_of(spec: WantSpec) -> Interval:
    """The interval of a want; a missing bound is open."""
    return Interval(spec.low or 0, UNBOUNDED if spec.high is None else spec.high)


def wants_of(lease: Lease, unreachable: Collection[str] = ()) -> list[Want]:
    """The wants of a live lease on those of its GPUs that can be reached."""
    if not lease.live:
        return []
    return [
        Want(lease.id, gpu, spec.control, interval_of(spec), lease.want_class, lease.reason, lease.created_ns, lease.min_dwell_ns)
        for gpu in lease.gpus
        if gpu not in unreachable
        for spec in lease.wants
    ]


def check_text(name: str, value: str | None, required: bool = False) -> None:
    """RequestError unless it is something that others can read."""
    if required and not (value or "").strip():
        raise RequestError(f"{name} is empty", hint="say in a few words what for: others will read it", code="bad_value")
    if value is not None and (len(value) > _MAX_TEXT or not value.isprintable()):
        raise RequestError(f"{name} has to be printable and at most {_MAX_TEXT} characters long", code="bad_value")


def _show(interval: Interval, control: Control) -> str:
    unit, scale = ("W", 1000) if control is Control.POWER_LIMIT else ("MHz", 1)
    return f"{interval.low / scale:g}..{interval.high / scale:g} {unit}"


def check_specs(specs: tuple[WantSpec, ...], gpus: Iterable[Capabilities], limits: LimitsConfig) -> None:
    """RequestError or DeviceError unless every want can be served on each of these GPUs, were it alone."""
    if not specs:
        raise RequestError("no wants", hint="name at least one control with a bound", code="bad_value")
    if len({s.control for s in specs}) != len(specs):
        raise RequestError("a control is wanted twice", hint="give both bounds in one want", code="bad_value")
    gpus = list(gpus)
    for spec in specs:
        name, unit = spec.control.value, spec.control.unit
        if spec.low is None and spec.high is None:
            raise RequestError(f"{name}: no bound", hint=f"give low, high or both in {unit}", code="bad_value")
        if not all(bound is None or 0 < bound < UNBOUNDED for bound in (spec.low, spec.high)):
            raise RequestError(f"{name}: bounds have to be above 0 {unit}", code="bad_value")
        interval = interval_of(spec)
        if interval.low > interval.high:
            raise RequestError(f"{name}: low {spec.low} is above high {spec.high} {unit}", code="bad_value")
        for capabilities in gpus:
            _check_device(spec.control, interval, capabilities, limits)


def _check_device(control: Control, interval: Interval, capabilities: Capabilities, limits: LimitsConfig) -> None:
    uuid = capabilities.gpu.uuid
    support, device = capabilities.controls.get(control), capabilities.interval(control)
    if support is None or not support.available or device is None:
        usable = [c.value for c, s in capabilities.controls.items() if s.available]
        reason = (support and support.reason) or "not supported"
        denied = "permission" in reason.lower() or "CAP_SYS_ADMIN" in reason
        hint = f"this GPU offers: {', '.join(usable) or 'no control'}"
        raise DeviceError(f"{control.value} on {uuid}: {reason}", hint=hint, code="no_permission" if denied else "not_supported")
    if control is Control.POWER_LIMIT:
        fitted = interval.meet(device)
    else:
        fitted = snap(interval, capabilities.sm_clocks_mhz if control is Control.SM_CLOCK else capabilities.memory_clocks_mhz)
    beyond = control is Control.POWER_LIMIT and device.high < interval.high < UNBOUNDED  # a limit is set, not only respected
    if fitted is None or beyond or not (interval.low <= device.high and interval.high >= device.low):
        raise RequestError(f"{control.value} on {uuid}: outside the device's {_show(device, control)}", code="bad_value")
    site = site_interval(limits, control)
    if site is not None and fitted.meet(site) is None:
        allowed = device.meet(site) or site
        raise RequestError(f"{control.value} on {uuid}: outside the site's limits {_show(allowed, control)}", code="bad_value")


def check_request(
    request: LeaseRequest, capabilities: Mapping[str, Capabilities], lost: Collection[str], limits: LimitsConfig, max_ttl_s: float
) -> None:
    """Refuse a request that cannot be served as it stands; the error says what would be right."""
    check_frame(request, capabilities, lost, max_ttl_s)
    check_specs(request.wants, [capabilities[g] for g in request.gpus], limits)


def check_frame(request: LeaseRequest, capabilities: Mapping[str, Capabilities], lost: Collection[str], max_ttl_s: float) -> None:
    """The same for all of it but the wants."""
    if not request.gpus:
        raise RequestError("no GPUs", hint="give at least one UUID", code="bad_value")
    if len(set(request.gpus)) != len(request.gpus):
        raise RequestError("a GPU is named twice", code="bad_value")
    for gpu in request.gpus:
        if gpu not in capabilities:
            raise RequestError(f"no GPU {gpu[:80]!r} on this node", hint=nearest(gpu, list(capabilities)), code="unknown_gpu")
        if gpu in lost:
            raise DeviceError(f"{gpu} cannot be reached now", hint="powerctl status shows its health", code="gpu_lost")
    check_text("reason", request.reason, required=True)
    check_text("job", request.job)
    if request.ttl_s is not None and not 0 < request.ttl_s <= max_ttl_s:
        raise RequestError(f"ttl_s {request.ttl_s:g} is outside 0..{max_ttl_s:g}", hint="renew by heartbeat", code="bad_value")
    if request.min_dwell_s is not None and not 0 <= request.min_dwell_s <= 3600:
        raise RequestError(f"min_dwell_s {request.min_dwell_s:g} is outside 0..3600", code="bad_value")
    if request.want_class < WantClass.BUDGET:
        raise RequestError(
            f"a lease cannot be of class {request.want_class.name.lower()}",
            hint="budget, lease, policy or default",
            code="bad_value",
        )
    check_wait(request.wait_s)


def check_wait(wait_s: float) -> None:
    """How long an answer may be held back."""
    if not 0 <= wait_s <= 60:
        raise RequestError(f"wait_s {wait_s:g} is outside 0..60", code="bad_value")


def lease_of(
    request: LeaseRequest, *, lease_id: str, token_hash: str, uid: int, user: str, pid: int | None, now_ns: int,
    default_ttl_s: float, attach_s: float,
) -> Lease:  # fmt: skip
    """The lease that a checked request asks for; unless it is detached, its connection has to come within ``attach_s``."""
    ttl_ns = from_seconds(default_ttl_s if request.ttl_s is None else request.ttl_s)
    return Lease(
        id=lease_id, token_hash=token_hash, uid=uid, user=user, pid=pid, gpus=request.gpus, wants=request.wants,
        reason=request.reason, ttl_ns=ttl_ns, created_ns=now_ns, expires_ns=now_ns + ttl_ns, job=request.job,
        detached=request.detached, want_class=request.want_class,
        min_dwell_ns=None if request.min_dwell_s is None else from_seconds(request.min_dwell_s),
        attach_by_ns=None if request.detached else now_ns + from_seconds(attach_s),
    )  # fmt: skip
