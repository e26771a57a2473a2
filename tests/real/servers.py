"""Real servers for tests: InfluxDB 1.6.7's engine, VictoriaMetrics and Prometheus, from the distribution's own packages.

House rules: packages are downloaded by apt-get once, unpacked into a cache folder and never installed; servers listen on free
ports of loopback only and are ended by their process id; what cannot be had skips its test and says why; with CI=true it fails.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.real.front import Front

#: Program -> the package that brings it.
PACKAGES = {"influxd": "influxdb", "victoria-metrics": "victoria-metrics", "prometheus": "prometheus", "promtool": "prometheus"}


class MissingError(Exception):
    """A program cannot be had here, and why."""


def cache_folder() -> Path:
    """Where the packages are kept unpacked between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "powerd-test-servers"


def _apt(folder: Path, *words: str) -> str:
    """Run apt-get in a folder; what went wrong, or nothing."""
    try:
        done = subprocess.run(["apt-get", "-q", *words], cwd=folder, capture_output=True, text=True, timeout=240)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"apt-get {' '.join(words)}: {error}"
    return "" if done.returncode == 0 else f"apt-get {' '.join(words)}: {done.stderr.strip()[-300:]}"


def _fetch(package: str, into: Path) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise MissingError(f"{package}: no apt-get and dpkg on this machine")
    folder = into.with_name(f"{into.name}.new")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if _apt(folder, "download", package):  # most often because the lists are not there or are old
        updated = _apt(folder, "update")
        if why := _apt(folder, "download", package):
            raise MissingError(f"{package}: {why} {updated}")
    (archive,) = folder.glob("*.deb")
    done = subprocess.run(["dpkg", "-x", archive.name, "."], cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise MissingError(f"{package}: dpkg -x: {done.stderr.strip()[-300:]}")
    archive.unlink()
    folder.rename(into)


def unpacked(package: str) -> Path:
    """The folder of a package's files, downloaded on first use; MissingError says why it cannot be had."""
    top = cache_folder()
    top.mkdir(parents=True, exist_ok=True)
    with (top / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        folder = top / package
        if not folder.exists():
            _fetch(package, folder)
    return folder


def program(name: str) -> Path:
    """The path of a program, downloaded on first use; MissingError says why it cannot be had."""
    package = PACKAGES[name]
    path = unpacked(package) / "usr" / "bin" / name
    if not path.exists():
        raise MissingError(f"{package} has no {name}")
    return path


def unavailable(why: str) -> NoReturn:
    """Skip this test, or fail it where everything has to be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


def need(name: str) -> Path:
    """A program's path for a test that cannot do without it."""
    try:
        return program(name)
    except MissingError as error:
        unavailable(str(error))


def free_port() -> int:
    """A TCP port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, test: Callable[[], object], timeout_s: float = 30.0) -> Any:
    """Poll a condition of another process until it is true; its value."""
    end = time.monotonic() + timeout_s
    while not (value := test()):
        assert time.monotonic() < end, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.05)
    return value


def http(url: str, form: dict[str, str] | None = None, *, query: dict[str, str] | None = None, timeout_s: float = 60.0) -> str:
    """The body of a GET, or of a POST when there is a form."""
    if query:
        url = f"{url}?{urllib.parse.urlencode(query)}"
    data = urllib.parse.urlencode(form).encode() if form is not None else None
    with urllib.request.urlopen(url, data, timeout=timeout_s) as answer:
        return str(answer.read().decode())


def answers(url: str) -> bool:
    """Whether a server answers a GET at all."""
    try:
        http(url, timeout_s=2)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


class Server(ABC):
    """A real server process on loopback; stopped and started again it keeps its port and its data."""

    name = ""
    health = "/health"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.binary = program(self.name)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """How it is started."""

    def start(self) -> None:
        """Start it and wait until it answers."""
        assert self.process is None, "it runs already"
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        wait_for(f"{self.name} answers", self._is_up)

    def _is_up(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"{self.name} ended:\n{self.log()[-2000:]}"
        return answers(self.url + self.health)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it, with SIGKILL if asked or if it does not go; twice is harmless."""
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def log(self) -> str:
        """What it said."""
        return (self.folder / "log").read_text(errors="replace")


class VictoriaMetrics(Server):
    """VictoriaMetrics, unmodified: a real v2 write endpoint at ``url``; duplicates of one timestamp count once."""

    name = "victoria-metrics"

    def command(self) -> list[str]:
        options = (
            "-retentionPeriod=10y",
            "-search.latencyOffset=0s",
            "-dedup.minScrapeInterval=1ms",
            "-memory.allowedBytes=128MB",
        )
        return [str(self.binary), f"-storageDataPath={self.folder}/data", f"-httpListenAddr=127.0.0.1:{self.port}", *options]

    def export(self, match: str) -> list[dict[str, Any]]:
        """All series of a selector with their values and timestamps (ms); what was just written is made visible first."""
        with contextlib.suppress(urllib.error.HTTPError):
            http(f"{self.url}/internal/force_flush")
        return [json.loads(line) for line in http(f"{self.url}/api/v1/export", query={"match[]": match}).splitlines()]

    def count(self, match: str) -> int:
        """How many samples the series of a selector have."""
        return sum(len(series["values"]) for series in self.export(match))

    def invalid_rows(self) -> int:
        """How many lines it could not read; it answers 204 all the same."""
        for line in http(f"{self.url}/metrics").splitlines():
            if line.startswith('vm_rows_invalid_total{type="influx"}'):
                return int(float(line.split()[-1]))
        return 0


class Influxd(Server):
    """InfluxDB 1.6.7's own engine; ``url`` speaks its 1.x API, :class:`Front` gives it the v2 write address."""

    name = "influxd"
    health = "/ping"

    def command(self) -> list[str]:
        config = self.folder / "influxd.conf"
        if not config.exists():
            self._rpc = free_port()
            config.write_text(
                f'reporting-disabled = true\nbind-address = "127.0.0.1:{self._rpc}"\n'
                f'[meta]\ndir = "{self.folder}/meta"\n[data]\ndir = "{self.folder}/data"\nwal-dir = "{self.folder}/wal"\n'
                "max-values-per-tag = 0\nmax-series-per-database = 0\n"
                f'[http]\nbind-address = "127.0.0.1:{self.port}"\nlog-enabled = false\nmax-body-size = 0\n'
                "[monitor]\nstore-enabled = false\n"
            )
        return [str(self.binary), "-config", str(config)]

    def create(self, bucket: str, keep: str = "INF") -> None:
        """Make a database that stands for a bucket; again is harmless."""
        self.query(f'CREATE DATABASE "{bucket}" WITH DURATION {keep} REPLICATION 1 NAME "raw"', bucket)

    def query(self, text: str, bucket: str) -> list[dict[str, Any]]:
        """An InfluxQL statement's series: ``name``, ``tags``, ``columns``, ``values`` (times in ns)."""
        answer = json.loads(http(f"{self.url}/query", {"q": text, "db": bucket, "epoch": "ns"}))
        (result,) = answer["results"]
        assert "error" not in result, result["error"]
        return list(result.get("series", []))

    def value(self, text: str, bucket: str) -> Any:
        """The first value after the time of a statement with one result; None when there is none."""
        series = self.query(text, bucket)
        return series[0]["values"][0][1] if series else None


class Prometheus(Server):
    """Prometheus with the configuration that a test gives it."""

    name = "prometheus"
    health = "/-/ready"

    def __init__(self, folder: Path, config: str) -> None:
        super().__init__(folder)
        (folder / "prometheus.yml").write_text(config)

    def command(self) -> list[str]:
        return [
            str(self.binary), f"--config.file={self.folder}/prometheus.yml", f"--storage.tsdb.path={self.folder}/data",
            f"--web.listen-address=127.0.0.1:{self.port}", "--web.enable-lifecycle",
        ]  # fmt: skip

    def _is_up(self) -> bool:
        if not super()._is_up():
            return False
        try:  # ready answers 503 until it is
            http(self.url + self.health, timeout_s=2)
        except OSError:
            return False
        return True

    def query(self, text: str) -> list[dict[str, Any]]:
        """The result of an instant query; AssertionError with Prometheus' own words when it is refused."""
        try:
            answer = json.loads(http(f"{self.url}/api/v1/query", {"query": text}))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{text}: {error.read().decode()}") from error
        return list(answer["data"]["result"])


def _started(kind: type[Server], factory: pytest.TempPathFactory) -> Iterator[Any]:
    need(kind.name)
    server = kind(factory.mktemp(kind.name))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def victoria_metrics(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VictoriaMetrics]:
    """One running VictoriaMetrics for all tests of this process; leave it running."""
    yield from _started(VictoriaMetrics, tmp_path_factory)


@pytest.fixture(scope="session")
def influxd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Influxd]:
    """One running influxd for all tests of this process; leave it running and use a database of your own."""
    yield from _started(Influxd, tmp_path_factory)


@pytest.fixture(scope="session")
def influx_front(influxd: Influxd) -> Iterator[Front]:
    """The v2 write address of :func:`influxd`."""
    front = Front(influxd)
    front.start()
    yield front
    front.stop()


@pytest.fixture(scope="session")
def promtool() -> Path:
    """The path of promtool."""
    return need("promtool")


@pytest.fixture
def start_prometheus(tmp_path: Path) -> Iterator[Callable[[str], Prometheus]]:
    """Start a Prometheus with a configuration text; it ends with the test."""
    need("prometheus")
    running: list[Prometheus] = []

    def start(config: str) -> Prometheus:
        server = Prometheus(tmp_path / f"prometheus{len(running)}", config)
        running.append(server)
        server.start()
        return server

    yield start
    for server in running:
        server.stop()
