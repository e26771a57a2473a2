"""Compiles the simulated driver on first use into a cache folder.

House rules: the library is named by a hash of its sources and compiler, so it is never stale; two processes may
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
from pathlib import Path

SOURCES = Path(__file__).parent / "nvml"
LIBRARY = "libnvidia-ml.so.1"
FLAGS = ["-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", f"-Wl,-soname,{LIBRARY}"]


class BuildError(RuntimeError):
    """The simulated driver cannot be built; the message says what to install."""


def find_compiler() -> list[str]:
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
    raise BuildError("no C compiler for the simulated driver: install gcc or clang, or `pip install powerd[sim]` (ziglang)")


def cache_root() -> Path:
    """Return the folder that holds compiled libraries."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "powerd" / "sim"


def fingerprint(compiler: list[str]) -> str:
    """Return the name of the build: a hash of every source file, the flags and the compiler."""
    digest = hashlib.sha256("\0".join([*FLAGS, *compiler]).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def build() -> Path:
    """Return the path of the compiled library, compiling it first if need be; raises BuildError."""
    compiler = find_compiler()
    folder = cache_root() / fingerprint(compiler)
    library = folder / LIBRARY
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=folder, suffix=".part")
    os.close(handle)
    try:
        sources = [str(source) for source in sorted(SOURCES.glob("*.c"))]
        command = [*compiler, *FLAGS, "-o", part, *sources, "-lm", "-lpthread"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            detail = (done.stderr or done.stdout).strip().splitlines()
            raise BuildError(f"{compiler[0]} cannot build the simulated driver: {detail[0] if detail else done.returncode}")
        Path(part).chmod(0o755)
        Path(part).rename(library)
    finally:
        Path(part).unlink(missing_ok=True)
    return library
