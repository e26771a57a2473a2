"""A real Slurm of one node on loopback, from the distribution's own packages, unpacked and never installed.

House rules: everything lies in one folder; nobody but loopback is listened to by name; both daemons are ended by their ids.
Authentication is Slurm's own ``none``: munge proves who asks, which is not what is tested here.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.real.servers import MissingError, free_port, unavailable, unpacked, wait_for

PACKAGES = ("slurm-client", "slurmctld", "slurmd", "slurm-wlm-basic-plugins", "libmunge2", "libhwloc15", "liblua5.1-0")


class Slurm:
    """slurmctld and slurmd with one node, ``localhost``; use as a context manager."""

    def __init__(self, folder: Path, cpus: int = 8) -> None:
        if os.geteuid() != 0:
            unavailable("slurmd starts tasks for others and needs root")
        try:
            self._roots = {name: unpacked(name) for name in PACKAGES}
        except MissingError as error:
            unavailable(str(error))
        plugins = next(self._roots["slurm-wlm-basic-plugins"].glob("usr/lib/*/slurm-wlm"))
        libraries = [str(path) for root in self._roots.values() for path in root.glob("usr/lib/*-linux-gnu")]
        self.folder = folder
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        (folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
PluginDir={plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
""")
        self.env = {"SLURM_CONF": str(folder / "slurm.conf"), "LD_LIBRARY_PATH": ":".join([str(plugins), *libraries])}
        self._running: list[subprocess.Popen[bytes]] = []

    def program(self, name: str) -> str:
        """The path of srun, sbatch, sinfo ..."""
        return str(self._roots["slurm-client"] / "usr" / "bin" / name)

    def run(self, *words: str, env: Mapping[str, str] | None = None, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """One command of the client."""
        argv = [self.program(words[0]), *words[1:]]
        return subprocess.run(
            argv, env={**(env or os.environ), **self.env}, text=True, capture_output=True, timeout=timeout_s, cwd=self.folder
        )

    def _start(self, package: str, *more: str) -> None:
        program = self._roots[package] / "usr" / "sbin" / f"{package}-wlm"
        with (self.folder / f"{package}.log").open("ab") as log:
            self._running.append(
                subprocess.Popen(
                    [str(program), "-D", *more],
                    env={**os.environ, **self.env},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def _idle(self) -> bool:
        for process in self._running:
            logs = "".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log"))
            assert process.poll() is None, logs
        return self.run("sinfo", "--noheader", "--format=%t").stdout.strip() == "idle"

    def __enter__(self) -> Slurm:
        try:
            self._start("slurmctld", "-i")
            self._start("slurmd", "-d", str(self._roots["slurmd"] / "usr" / "sbin" / "slurmstepd-wlm"))
            wait_for("the node is idle", self._idle, 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._running):
            process.terminate()
        for process in self._running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
