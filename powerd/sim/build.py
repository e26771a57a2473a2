"""Compiles what the simulators have in C on first use into a cache folder: the simulated driver, the core of the cluster.

House rules: a library is named by a hash of its sources and compiler, so it is never stale; two processes may
compile at once, the rename decides; nothing is fetched: without a compiler there is one clear error.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "nvml"
LIBRARY = "libnvidia-ml.so.1"
FLAGS = ["-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", f"-Wl,-soname,{LIBRARY}"]


class BuildError(RuntimeError):
    """A library cannot be built; the message says what to install."""


@dataclass(frozen=True, slots=True)
class Library:
    """What is built from all C files of one folder."""

    what: str  # as a person names it
    name: str
    sources: Path
    flags: tuple[str, ...]
    links: tuple[str, ...] = ()


DRIVER = Library("the simulated driver", LIBRARY, SOURCES, tuple(FLAGS), ("-lm", "-lpthread"))


def find_compiler(what: str = DRIVER.what) -> list[str]:
    """Return the command of the first C compiler found: $CC, cc, gcc, clang, then the ziglang package."""
    named = os.environ.get("CC")
    if named and shutil.which(named.split()[0]):
        return named.split()
    for name in ("cc", "gcc", "clang"):
        path = shutil.which(name)
        if path:
            return [path]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    raise BuildError(f"no C compiler for {what}: install gcc or clang, or `pip install powerd[sim]` (ziglang)")


def cache_root() -> Path:
    """Return the folder that holds compiled libraries."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "powerd" / "sim"


def fingerprint(compiler: list[str], library: Library = DRIVER) -> str:
    """Return the name of the build: a hash of every source file, the flags and the compiler."""
    digest = hashlib.sha256("\0".join([*library.flags, *compiler]).encode())
    for source in sorted(library.sources.glob("*.[ch]")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def build(library: Library = DRIVER) -> Path:
    """Return the path of the compiled library, compiling it first if need be; raises BuildError."""
    compiler = find_compiler(library.what)
    folder = cache_root() / fingerprint(compiler, library)
    built = folder / library.name
    if built.exists():
        return built
    folder.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=folder, suffix=".part")
    os.close(handle)
    try:
        sources = [str(source) for source in sorted(library.sources.glob("*.c"))]
        command = [*compiler, *library.flags, "-o", part, *sources, *library.links]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            detail = (done.stderr or done.stdout).strip().splitlines()
            raise BuildError(f"{compiler[0]} cannot build {library.what}: {detail[0] if detail else done.returncode}")
        Path(part).chmod(0o755)
        Path(part).rename(built)
    finally:
        Path(part).unlink(missing_ok=True)
    return built
