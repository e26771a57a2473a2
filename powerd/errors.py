"""One small error tree and one table: code -> HTTP status -> exit code.

House rules: every error says whose fault it is (request, device, daemon) and what to do next;
nothing is changed when one is raised.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """Whose fault an error is."""

    REQUEST = "request"
    DEVICE = "device"
    DAEMON = "daemon"


@dataclass(frozen=True, slots=True)
class Code:
    """One row of the table that server, client and CLIs share."""

    name: str
    fault: Fault
    http_status: int
    exit_code: int


EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_OVERRIDDEN = 3
EXIT_CONFLICT = 4
EXIT_UNAVAILABLE = 69
EXIT_TEMPFAIL = 75
EXIT_DENIED = 77
EXIT_CONFIG = 78
EXIT_TIMEOUT = 124

CODES: dict[str, Code] = {
    c.name: c
    for c in (
        Code("bad_request", Fault.REQUEST, 400, EXIT_USAGE),
        Code("bad_value", Fault.REQUEST, 422, EXIT_USAGE),
        Code("unknown_gpu", Fault.REQUEST, 404, EXIT_USAGE),
        Code("not_found", Fault.REQUEST, 404, EXIT_USAGE),
        Code("denied", Fault.REQUEST, 403, EXIT_DENIED),
        Code("monitor_only", Fault.REQUEST, 403, EXIT_DENIED),
        Code("conflict", Fault.REQUEST, 409, EXIT_CONFLICT),
        Code("lease_lost", Fault.REQUEST, 410, EXIT_CONFLICT),
        Code("version", Fault.REQUEST, 426, EXIT_USAGE),
        Code("too_many", Fault.REQUEST, 429, EXIT_TEMPFAIL),
        Code("not_supported", Fault.DEVICE, 422, EXIT_USAGE),
        Code("no_permission", Fault.DEVICE, 403, EXIT_DENIED),
        Code("gpu_lost", Fault.DEVICE, 503, EXIT_TEMPFAIL),
        Code("wedged", Fault.DEVICE, 503, EXIT_TEMPFAIL),
        Code("no_driver", Fault.DEVICE, 503, EXIT_UNAVAILABLE),
        Code("overridden", Fault.DEVICE, 200, EXIT_OVERRIDDEN),
        Code("timeout", Fault.DAEMON, 504, EXIT_TIMEOUT),
        Code("unavailable", Fault.DAEMON, 503, EXIT_UNAVAILABLE),
        Code("busy", Fault.DAEMON, 503, EXIT_TEMPFAIL),
        Code("bad_config", Fault.DAEMON, 500, EXIT_CONFIG),
        Code("internal", Fault.DAEMON, 500, EXIT_FAILURE),
    )
}


class PowerdError(Exception):
    """Base of all powerd errors: one line that says what is wrong and what to do."""

    code_name = "internal"

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = CODES[code or self.code_name]

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class RequestError(PowerdError):
    """The request cannot be served as it stands; nothing was changed."""

    code_name = "bad_request"


class DeniedError(PowerdError):
    """The caller may not do this."""

    code_name = "denied"


class LeaseLostError(PowerdError):
    """The lease is gone; the GPU is back at baseline or at the next want."""

    code_name = "lease_lost"


class DeviceError(PowerdError):
    """The GPU or its driver refused; ``nvml_code`` is NVML's own number when there is one."""

    code_name = "not_supported"

    def __init__(self, message: str, *, hint: str = "", code: str | None = None, nvml_code: int = 0) -> None:
        super().__init__(message, hint=hint, code=code)
        self.nvml_code = nvml_code


class UnavailableError(PowerdError):
    """The daemon (or its hw unit) cannot be reached."""

    code_name = "unavailable"


class ConfigError(PowerdError):
    """The configuration was refused as a whole; the last good one stays in force."""

    code_name = "bad_config"
