"""Boots a real systemd in a container whose root is an overlay of this machine's, and runs commands in it.

House rules: the container has mount and process namespaces of its own and dies with the test process, so that nothing is
left behind however a run ends; one container at a time on a machine; no network in it but loopback.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

# Where the test's own files are inside; /tmp is not usable, because the container mounts a fresh one.
PREFIX = "/opt/powerd"
PYTHON = f"{PREFIX}/bin/python"
DEPENDENCIES = "/opt/powerd-dependencies"
SHARED = "/opt/powerd-shared"
LOCK = Path("/run/lock/powerd-nspawn.lock")
NEEDED = ("systemd-nspawn", "nsenter", "unshare", "setpriv", "dbus-daemon")
BOOT_S = 90

# Units of the host's image that have no business in a test.
QUIET_UNITS = ("apt-daily.timer", "apt-daily-upgrade.timer", "man-db.timer", "dpkg-db-backup.timer", "e2scrub_all.timer")

# systemd-nspawn's container outlives a systemd-nspawn that was killed. So that one is process 1 of a namespace, whose end is
# the end of all in it, and (pdeathsig, kill-child) ends with the test; the mounts go with the last process that sees them.
SCRIPT = r"""
set -eu
mount -t tmpfs -o mode=0755 tmpfs "$WORK"
mkdir "$WORK/upper" "$WORK/work" "$WORK/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$WORK/upper,workdir=$WORK/work" "$WORK/root"
for unit in $QUIET; do ln -sf /dev/null "$WORK/root/etc/systemd/system/$unit"; done
# Services of the host image stay off; the test starts what it looks at.
rm -f "$WORK/root"/etc/systemd/system/multi-user.target.wants/* "$WORK/root"/etc/systemd/system/sockets.target.wants/*
mkdir -p "$WORK/root"__DEPENDENCIES__ "$WORK/root"__SHARED__
exec systemd-nspawn --quiet --boot --directory="$WORK/root" --machine=powerd-test --register=no --keep-unit \
    --private-network "$@" </dev/null
"""


def missing() -> str | None:
    """What keeps this machine from booting a container, in one line, or None."""
    if os.geteuid() != 0:
        return "booting systemd in a container needs root"
    lacking = [tool for tool in NEEDED if shutil.which(tool) is None]
    if lacking:
        return f"{', '.join(lacking)} missing: apt-get install systemd-container dbus util-linux"
    return None


def require() -> None:
    """Skip where a container cannot boot; in CI that is a failure."""
    if reason := missing():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@dataclass
class Container:
    """A booted systemd; `run` runs a command in it as root."""

    leader: int
    shared: Path
    log: Path
    process: subprocess.Popen[bytes] = field(repr=False)

    def run(
        self, command: str, *, check: bool = True, timeout_s: float = 60, user: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command inside; with `check` a failure shows both of its streams."""
        argv = ["nsenter", "--target", str(self.leader), "--all"]
        shell = ["/bin/sh", "-c", command]
        argv += ["runuser", "-u", user, "--", *shell] if user else shell
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, env=environment, cwd="/"
        )
        if check and done.returncode != 0:
            pytest.fail(f"{command}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def show(self, unit: str, key: str) -> str:
        """One property of a unit."""
        return self.run(f"systemctl show --property={key} --value {unit}").stdout.strip()

    def wait(self, command: str, timeout_s: float = 30) -> str:
        """Run a command until it succeeds and return its output; a failure shows its last output and the journal."""
        until = time.monotonic() + timeout_s
        while True:
            done = self.run(command, check=False)
            if done.returncode == 0:
                return done.stdout
            if time.monotonic() > until:
                journal = self.run("journalctl --no-pager --lines=40", check=False).stdout
                pytest.fail(f"not within {timeout_s} s: {command}\n{done.stdout}\n{done.stderr}\n{journal}")
            time.sleep(0.1)

    def write(self, path: str, text: str, mode: str = "0644") -> None:
        """Write a file inside."""
        staged = self.shared / "staged"
        staged.write_text(text, encoding="utf-8")
        self.run(f"install -D -m {mode} {SHARED}/staged {shlex.quote(path)}")

    def install_powerd(self) -> None:
        """A system-wide environment at /opt/powerd with the built wheel, as `python3 -m venv` and pip would make it."""
        wheel = build_wheel(self.shared)
        base = "/opt/python/bin/python3" if needs_own_python() else f"/usr/bin/python{python_version()}"
        self.run(f"{base} -m venv --without-pip {PREFIX}")
        self.write(f"{PREFIX}/lib/python{python_version()}/site-packages/dependencies.pth", f"{DEPENDENCIES}\n")
        options = "--quiet --no-index --no-deps --root-user-action=ignore --disable-pip-version-check"
        self.run(f"{PYTHON} -m pip install {options} --ignore-installed {SHARED}/{wheel.name}", timeout_s=120)


def python_version() -> str:
    """The minor version that the tests run on; binary dependencies are bound to it."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def needs_own_python() -> bool:
    """Whether the interpreter must be brought along, because the system has none of this version."""
    return not Path(f"/usr/bin/python{python_version()}").exists()


def build_wheel(folder: Path) -> Path:
    """Build this checkout's wheel, without any download."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(root)], check=True, timeout=120)
    return next(folder.glob("powerd-*.whl"))


def children(pid: int) -> list[int]:
    """The child processes of a process with one thread."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def leader_of(nspawn: subprocess.Popen[bytes], log: Path) -> int:
    """The container's process 1 as this machine sees it; waits until it is there."""
    until = time.monotonic() + BOOT_S
    while time.monotonic() < until:
        if nspawn.poll() is not None:
            pytest.fail(f"systemd-nspawn ended with {nspawn.returncode}:\n{log.read_text(errors='replace')}")
        with contextlib.suppress(OSError):
            for process in (child for parent in children(nspawn.pid) for child in children(parent)):
                if Path(f"/proc/{process}/comm").read_text().strip() == "systemd":
                    return process
        time.sleep(0.05)
    pytest.fail(f"no process 1 within {BOOT_S} s:\n{log.read_text(errors='replace')}")


@contextlib.contextmanager
def booted(shared: Path) -> Iterator[Container]:
    """A running container; `shared` is seen inside as /opt/powerd-shared, writable from both sides."""
    work, log = shared.parent / "container", shared.parent / "container.log"
    work.mkdir()
    dependencies = sysconfig.get_paths()["purelib"]
    binds = [f"--bind-ro={dependencies}:{DEPENDENCIES}", f"--bind={shared}:{SHARED}"]
    if needs_own_python():
        binds.append(f"--bind-ro={sys.base_prefix}:/opt/python")
    script = SCRIPT.replace("__DEPENDENCIES__", DEPENDENCIES).replace("__SHARED__", SHARED)
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"]
    command += ["--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    environment = os.environ | {"WORK": str(work), "QUIET": " ".join(QUIET_UNITS)}
    with LOCK.open("w") as lock, log.open("wb") as output:
        fcntl.flock(lock, fcntl.LOCK_EX)
        nspawn = subprocess.Popen(
            [*command, "/bin/sh", "-c", script, "nspawn", *binds],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            container = Container(leader_of(nspawn, log), shared, log, nspawn)
            container.wait("systemctl is-system-running --wait | grep -qx -e running -e degraded", BOOT_S)
            yield container
            power_off(container)
        finally:
            # Its process 1 goes with it, and every mount with that.
            nspawn.kill()
            nspawn.wait()


def power_off(container: Container) -> None:
    """Shut down in order, as a machine would."""
    container.run("systemctl poweroff", check=False)
    with contextlib.suppress(subprocess.TimeoutExpired):
        container.process.wait(timeout=40)
