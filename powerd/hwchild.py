"""powerd-hw as a child of powerd, for development and demonstrations; on a real node it is a unit of its own.

House rules: when the child dies its journal is replayed before the next one starts; at the end it is asked first, then restored.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from pathlib import Path

from powerd.config import Config, keys
from powerd.log import log

_STOP_S = 10.0
_RESTART_S = (0.0, 0.5, 2.0, 5.0)


def toml(config: Config) -> str:
    """A configuration as the TOML text that gives it again."""
    lines = []
    for section, key, _, _ in keys():
        value = getattr(getattr(config, section), key)
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else str(value).lower()
        lines.append(f"{section}.{key} = {text}")
    return "\n".join(lines) + "\n"


class HwChild:
    """Starts ``python -I -m powerd.hw serve`` and keeps it running."""

    def __init__(self, socket_path: Path, config: Config) -> None:
        self.socket_path = socket_path
        self._config_file = socket_path.with_name("powerd.toml")
        self._config = config
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def run(self) -> None:
        """Keep the child running until ``stop``; a configuration that it refuses (78) is not tried again."""
        self._write()
        failures = 0
        while not self._stopping:
            started = asyncio.get_running_loop().time()
            self._process = await self._spawn("serve", "--socket", str(self.socket_path), "--exit-with-peer")
            log("hw_started", pid=self._process.pid)
            code = await self._process.wait()
            if self._stopping:
                return
            log("hw_ended", code=code)
            await self._restore()
            if code == 78:
                return
            failures = 0 if asyncio.get_running_loop().time() - started > 60 else failures + 1
            await asyncio.sleep(_RESTART_S[min(failures, len(_RESTART_S) - 1)])

    def _write(self) -> None:
        new = self._config_file.with_suffix(".new")
        new.write_text(toml(self._config))
        new.chmod(0o600)
        new.replace(self._config_file)

    def reload(self, config: Config) -> None:
        """Give the child a new configuration; one that is not up yet reads it when it starts."""
        self._config = config
        self._write()
        if self.pid is not None and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGHUP)

    async def stop(self) -> None:
        """Ask the child to end (it puts everything back), then make sure."""
        self._stopping = True
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(_STOP_S):
                    await process.wait()
            except TimeoutError:
                log("hw_killed", pid=process.pid)
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode != 0:
            await self._restore()

    async def _restore(self) -> None:
        restore = await self._spawn("restore")
        log("hw_restored", code=await restore.wait())

    async def _spawn(self, *arguments: str) -> asyncio.subprocess.Process:
        # -I: neither the working directory nor PYTHON* variables may choose what the privileged side runs.
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-m",
            "powerd.hw",
            *arguments,
            "--config",
            str(self._config_file),
            stdin=asyncio.subprocess.DEVNULL,
        )
