"""powerd's configuration: its sections, the places that follow from them, and how its files are read.

House rules: every key is a dataclass field with a default, a unit in its name and a one-line help; nothing else reads
configuration files; a reload that fails changes nothing.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from powerd.errors import ConfigError
from powerd.knobs import knob, lay
from powerd.model import SloClass

SYSTEM_FILE = Path("/etc/powerd/powerd.toml")


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """``[daemon]``: the unprivileged unit."""

    control: bool = knob(False, "false: monitor only, nothing is ever set; true: leases and policies may set clocks and limits")
    run_dir: str = knob("", "where the API and attach sockets are made; empty: /run/powerd as root, else $XDG_RUNTIME_DIR/powerd")
    state_dir: str = knob("", "leases, store, ledger; empty: /var/lib/powerd as root, else $XDG_STATE_HOME/powerd")
    panic_file: str = knob("/etc/powerd/panic", "while this file exists every GPU is at baseline (a fleet can push it)")
    reattach_s: float = knob(5.0, "seconds after a restart in which leases may come back by token", low=0.5, high=60)


@dataclass(frozen=True, slots=True)
class HwConfig:
    """``[hw]``: the privileged unit."""

    run_dir: str = knob("", "where hw.sock is made; empty: /run/powerd-hw as root, else $XDG_RUNTIME_DIR/powerd-hw")
    journal_dir: str = knob("", "the journal; empty: /var/lib/powerd-hw as root, else $XDG_STATE_HOME/powerd-hw")
    peer_user: str = knob("", "the user whose powerd may connect; empty: root and the user that runs hw")
    sample_hz: float = knob(10.0, "samples per second and GPU", low=1, high=100)
    grace_s: float = knob(5.0, "seconds that settings outlive a powerd that died", low=0.5, high=60)
    read_deadline_s: float = knob(2.0, "a read that takes longer marks its GPU wedged", low=0.1, high=60)
    write_deadline_s: float = knob(10.0, "a set that takes longer marks its GPU wedged", low=0.1, high=120)
    min_dwell_s: float = knob(2.0, "minimum seconds between two steps down of one control", low=0, high=600)
    powercap_dir: str = knob(
        "", "the powercap tree that CPU and DRAM energy is read from; empty: /sys/class/powercap, and none on a simulated node"
    )
    drift: str = knob("yield", "when somebody else changes a setting that powerd holds", one_of=("yield", "warn", "enforce"))


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """``[limits]``: the site's own bounds; hw enforces them whatever powerd asks. 0 means the device's own bound."""

    power_limit_min_w: float = knob(0.0, "never below, watts", low=0, high=10_000)
    power_limit_max_w: float = knob(0.0, "never above, watts", low=0, high=10_000)
    sm_clock_min_mhz: int = knob(0, "no lock below, MHz", low=0, high=10_000)
    sm_clock_max_mhz: int = knob(0, "no lock above, MHz", low=0, high=10_000)
    memory_clock_min_mhz: int = knob(0, "no lock below, MHz", low=0, high=20_000)
    memory_clock_max_mhz: int = knob(0, "no lock above, MHz", low=0, high=20_000)


@dataclass(frozen=True, slots=True)
class BaselineConfig:
    """``[baseline]``: what "restored" means. 0 = the limit found before the first write / clocks unlocked."""

    power_limit_w: float = knob(0.0, "declared power limit, watts", low=0, high=10_000)
    sm_clock_min_mhz: int = knob(0, "declared lock of the SM clock, lower end", low=0, high=10_000)
    sm_clock_max_mhz: int = knob(0, "declared lock of the SM clock, upper end", low=0, high=10_000)
    memory_clock_min_mhz: int = knob(0, "declared lock of the memory clock, lower end", low=0, high=20_000)
    memory_clock_max_mhz: int = knob(0, "declared lock of the memory clock, upper end", low=0, high=20_000)


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """``[access]``: who may do what on the Unix socket."""

    group: str = knob("powerd", "members of this Unix group may control every GPU, as may root and the daemon's own user")
    open_reads: bool = knob(False, "single-tenant node: everybody may read every GPU at full rate")


@dataclass(frozen=True, slots=True)
class LeasesConfig:
    """``[leases]``: bounds on leases."""

    default_ttl_s: float = knob(60.0, "TTL of a lease that asks for none", low=1, high=86_400)
    max_ttl_s: float = knob(86_400.0, "longest TTL; a heartbeat renews it", low=1, high=31_536_000)
    max_per_uid: int = knob(256, "open leases per user", low=1, high=100_000)


@dataclass(frozen=True, slots=True)
class TcpConfig:
    """``[tcp]``: the optional TCP listener; off unless ``listen`` is set."""

    listen: str = knob("", 'address and port such as "127.0.0.1:9478"; empty: no TCP')
    certificate: str = knob("", "PEM file of the server certificate; needed unless the address is loopback")
    key: str = knob("", "PEM file of the private key")
    token_file: str = knob("", "file with one bearer token; needed for everything but permitted loopback reads")
    read_token_file: str = knob("", "file with a bearer token that reads everything and sets nothing, such as for Prometheus")
    loopback_reads: bool = knob(False, "reads from loopback without a token")


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """``[store]``: the embedded SQLite store."""

    enabled: bool = knob(True, "keep history on this node")
    raw_hours: float = knob(48.0, "hours of 1 Hz samples", low=1, high=8_760)
    minute_days: float = knob(30.0, "days of 1-minute roll-ups and of the steps of training jobs", low=1, high=3_650)
    hour_days: float = knob(1_095.0, "days of 1-hour roll-ups, events and training jobs", low=1, high=36_500)


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """``[metrics]``: the Prometheus page."""

    enabled: bool = knob(True, "serve /metrics")
    dcgm: bool = knob(False, "serve /metrics/dcgm too: the same GPUs under dcgm-exporter's names, labels and units")
    job_names: bool = knob(True, "series for every training job by its name; false where there are too many names")


@dataclass(frozen=True, slots=True)
class InfluxConfig:
    """``[influx]``: history to an InfluxDB v2 server (or one that takes its writes); off unless ``url`` is set."""

    url: str = knob("", 'such as "https://influx.example.org:8086"; empty: no InfluxDB')
    org: str = knob("", "organisation")
    bucket: str = knob("", "bucket; needed when url is set")
    token_file: str = knob("", "file with a token that may write the bucket; empty: the systemd credential influx_token, if any")
    ca_file: str = knob("", "PEM file of the authorities that may sign the server's certificate; empty: the system's")
    insecure_http: bool = knob(False, "true: send the token in the clear to a server beyond this machine")
    sample_hz: float = knob(1.0, "points per second and GPU: means of the samples in between", low=0.01, high=10)
    batch_lines: int = knob(5000, "lines of one request at most", low=1, high=50_000)
    timeout_s: float = knob(10.0, "seconds that one request may take", low=0.1, high=300)
    spool_max_mib: int = knob(512, "MiB of unsent points (compressed) on disk; the oldest make room", low=1, high=1_000_000)
    spool_max_days: float = knob(7.0, "days that an unsent point is kept", low=0.01, high=3_650)
    tag_values_per_day: int = knob(
        1000, 'different jobs (and pools) a day; what comes after is tagged "other"', low=1, high=1_000_000
    )


@dataclass(frozen=True, slots=True)
class ReplicasConfig:
    """``[replicas]``: how inference replicas are followed (docs/inference.md)."""

    scrape_s: float = knob(1.0, "seconds between two looks at an engine's metrics page", low=0.1, high=10)
    timeout_s: float = knob(1.0, "seconds that an engine may take to answer", low=0.05, high=10)
    stale_s: float = knob(4.0, "full clock when no page could be believed for so many seconds", low=0.2, high=120)
    good_scrapes: int = knob(3, "good pages in a row before a clock is lowered again", low=1, high=100)
    window_s: float = knob(15.0, "seconds over which latencies are judged", low=1, high=600)
    park_after_s: float = knob(10.0, "an engine with nothing to do for so long is idle: its clock is parked", low=0.5, high=3600)
    allowed_hosts: str = knob("", "hosts beside this one whose metrics pages may be read, comma separated")
    profile_dir: str = knob("", "folder with the site's own engine profiles; empty: those that come with powerd")


@dataclass(frozen=True, slots=True)
class StaticReplica:
    """``[[replica]]``: an inference replica that runs for as long as the configuration names it; may be repeated."""

    NEEDED: ClassVar = ("name", "pool", "gpus", "metrics_url")

    name: str = knob("", "its name on this node")
    pool: str = knob("", "the pool of alike replicas that it belongs to")
    gpus: tuple[str, ...] = knob((), "UUIDs of its GPUs")
    metrics_url: str = knob("", 'such as "http://127.0.0.1:8000/metrics" or "unix:/run/engine.sock:/metrics"')
    ttft_s: float = knob(0.0, "SLO: seconds to the first token; unset: promised is tbt_s alone", low=0.001, high=3600)
    tbt_s: float = knob(0.0, "SLO: seconds between two tokens; unset: promised is ttft_s alone", low=0.0001, high=3600)
    classes: tuple[SloClass, ...] = knob(
        (), "shorter prompts with a shorter TTFT, shortest first: [{max_prompt_tokens = 255, ttft_s = 0.25}]"
    )
    tp: int = knob(1, "tensor parallelism", low=1, high=64)
    engine: str = knob("auto", "what its metrics page is", one_of=("auto", "vllm", "sglang"))
    chunk_tokens: int = knob(512, "prompt tokens of one iteration at most (vLLM: max_num_batched_tokens)", low=1, high=1 << 20)
    profile: str = knob("", "engine profile; empty: the clock is parked when idle and full otherwise")


@dataclass(frozen=True, slots=True)
class Config:
    """All of powerd's configuration; immutable, replaced as a whole."""

    daemon: DaemonConfig = field(default_factory=DaemonConfig)
    hw: HwConfig = field(default_factory=HwConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    leases: LeasesConfig = field(default_factory=LeasesConfig)
    tcp: TcpConfig = field(default_factory=TcpConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    influx: InfluxConfig = field(default_factory=InfluxConfig)
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)
    replica: tuple[StaticReplica, ...] = field(default=(), metadata={"rows": StaticReplica})


def sections() -> list[str]:
    """The names of the ``[sections]``; ``[[replica]]`` is a list of its own."""
    return [f.name for f in fields(Config) if "rows" not in f.metadata]


def _place(name: str, system: str, variable: str, fallback: str) -> Path:
    """Where something of ours is by default: beside a simulated node, in the system's folder as root, else in the user's."""
    # A systemd unit has its folders from systemd (these variables say so), on a simulated node too.
    ours = "RUNTIME_DIRECTORY" in os.environ or "STATE_DIRECTORY" in os.environ
    if (simulated := os.environ.get("POWERD_SIM_STATE")) and not ours:
        # A simulated node is a machine of its own: it never meets the real one's daemon or files, and takes its own along.
        return Path(f"{simulated}.d") / name
    if os.geteuid() == 0:
        return Path(system)
    return Path(os.environ.get(variable) or Path.home() / fallback) / Path(system).name


def run_dir(config: Config) -> Path:
    """Where powerd's sockets are."""
    if config.daemon.run_dir:
        return Path(config.daemon.run_dir)
    return _place("run", "/run/powerd", "XDG_RUNTIME_DIR", ".cache")


def state_dir(config: Config) -> Path:
    """Where powerd keeps leases and history."""
    if config.daemon.state_dir:
        return Path(config.daemon.state_dir)
    return _place("state", "/var/lib/powerd", "XDG_STATE_HOME", ".local/state")


def hw_socket(config: Config) -> Path:
    """The socket between powerd and powerd-hw."""
    if config.hw.run_dir:
        return Path(config.hw.run_dir) / "hw.sock"
    return _place("hw", "/run/powerd-hw", "XDG_RUNTIME_DIR", ".cache") / "hw.sock"


def journal_dir(config: Config) -> Path:
    """Where powerd-hw keeps its journal."""
    if config.hw.journal_dir:
        return Path(config.hw.journal_dir)
    return _place("journal", "/var/lib/powerd-hw", "XDG_STATE_HOME", ".local/state")


def default_file() -> Path:
    """The configuration file that is read when none is named."""
    return _place("etc", str(SYSTEM_FILE.parent), "XDG_CONFIG_HOME", ".config") / SYSTEM_FILE.name


def parse(text: str, file: str = "powerd.toml", base: Config | None = None) -> Config:
    """Check one TOML text and lay it over ``base`` (default: all defaults); ConfigError names file, line and remedy."""
    config = lay(text, file, base or Config())
    for name, low, high in (
        ("limits", "power_limit_min_w", "power_limit_max_w"), ("limits", "sm_clock_min_mhz", "sm_clock_max_mhz"),
        ("limits", "memory_clock_min_mhz", "memory_clock_max_mhz"), ("baseline", "sm_clock_min_mhz", "sm_clock_max_mhz"),
        ("baseline", "memory_clock_min_mhz", "memory_clock_max_mhz"),
    ):  # fmt: skip
        a, b = getattr(getattr(config, name), low), getattr(getattr(config, name), high)
        if b and a > b:
            raise ConfigError(f"{file}: {name}.{low} {a:g} is above {name}.{high} {b:g}")
    return config


def _read(path: Path, trusted: bool) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    with os.fdopen(descriptor, encoding="utf-8") as stream:
        info = os.fstat(stream.fileno())
        if trusted and (info.st_uid not in (0, os.geteuid()) or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
            raise ConfigError(f"{path}: others can write it", hint="chown root and chmod 0644")
        try:
            return stream.read()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8") from error


def load(path: Path | None = None, *, trusted: bool = True) -> Config:
    """The file (a missing default file means defaults) and then its ``powerd.d/*.toml`` in order."""
    main = path or default_file()
    config = Config()
    if main.exists() or path is not None:
        config = parse(_read(main, trusted), str(main), config)
    for extra in sorted((main.parent / "powerd.d").glob("*.toml")):
        config = parse(_read(extra, trusted), str(extra), config)
    return config


def keys() -> list[tuple[str, str, Any, str]]:
    """Every key as (section, key, default, help): the documentation page is made from this."""
    rows: list[tuple[str, str, Any, str]] = []
    for section in sections():
        rows += [(section, f.name, f.default, str(f.metadata["help"])) for f in fields(getattr(Config(), section))]
    return rows
