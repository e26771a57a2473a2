"""Resolves the main, the peer, the framework and the Ray environment from nothing and writes their constraints files.

House rules: pins come from environments that were really installed, never from a resolver's guess; every run starts
from an empty environment, so a pin that nothing needs any more disappears.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD_TOOLS = ["pip", "hatchling", "editables"]
# The interpreter brings its own setuptools on Python 3.11; it is nobody's dependency here.
NOT_PINNED = {"powerd", "setuptools"}
# Peers are compared at fixed versions: a new one is a decision, not the result of a resolver.
PEER_VERSIONS = {
    "nvitop": "1.7.2",
    "gpustat": "1.1.1",
    "py3nvml": "0.2.7",
    "zeus": "0.16.0",
    "lowtime": "0.3.0",
    "nvidia-ml-py": "13.615.71",
}
# What the integrations plug into, likewise. torch comes from the index as it is: which build is the index's business.
TORCH_VERSIONS = {
    "torch": "2.13.0",
    "lightning": "2.6.6",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "megatron-core": "0.16.1",
    "deepspeed": "0.19.8",
}
# Ray Serve and gRPC, and the compiler that our .proto is checked with.
RAY_VERSIONS = {"ray[serve]": "2.60.0", "grpcio": "1.85.1", "grpcio-tools": "1.85.1"}
HEADER = "# Written by `make constraints` from a fresh environment; docs/dependencies.md says what each is for.\n"


def pip(python: Path, *arguments: str) -> str:
    """Run pip in an environment and return what it printed."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


def resolve(name: str, requirements: list[str]) -> list[str]:
    """Install into a fresh environment; returns its `name==version` lines."""
    place = ROOT / "build" / "pins" / name
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = place / "bin" / "python"
    pip(python, "install", "-qq", "--upgrade", *BUILD_TOOLS)
    pip(python, "install", "-qq", "--no-build-isolation", *requirements)
    pip(python, "check")
    lines = pip(python, "freeze", "--all", "--exclude-editable").splitlines()
    # A local label such as +cpu names the build that this machine's index had; another machine's may have another.
    return [line.partition("+")[0] for line in lines if "==" in line and line.split("==")[0].lower() not in NOT_PINNED]


def pin_without_installing(python: Path, requirement: str) -> str:
    """Resolve one package that nobody is made to install (the [sim] extra's compiler)."""
    report = json.loads(pip(python, "install", "-qq", "--dry-run", "--no-deps", "--report", "-", requirement))
    found = report["install"][0]["metadata"]
    return f"{found['name']}=={found['version']}"


def write(name: str, lines: list[str]) -> None:
    """Write one constraints file."""
    (ROOT / name).write_text(HEADER + "\n".join(sorted(lines, key=str.lower)) + "\n")


def pin_torch() -> None:
    """Write constraints-torch.txt."""
    os.environ["DS_BUILD_OPS"] = "0"  # deepspeed compiles nothing when it is installed
    tools = [f"{tool}=={version}" for tool, version in TORCH_VERSIONS.items()]
    write("constraints-torch.txt", resolve("torch", ["-e", ".[plan]", *tools]))


def pin_ray() -> None:
    """Write constraints-ray.txt."""
    tools = [f"{tool}=={version}" for tool, version in RAY_VERSIONS.items()]
    write("constraints-ray.txt", resolve("ray", ["-e", ".[ray,keda]", *tools]))


def main() -> None:
    """Write constraints.txt, constraints-peers.txt, constraints-torch.txt and constraints-ray.txt."""
    lines = resolve("main", ["-e", ".[all]", "--group", "dev"])
    lines.append(pin_without_installing(ROOT / "build" / "pins" / "main" / "bin" / "python", "ziglang"))
    write("constraints.txt", lines)
    peers = [f"{tool}=={PEER_VERSIONS[tool]}" for tool in sys.argv[1:]]
    lines = resolve("peers", ["-e", ".", *peers])
    write("constraints-peers.txt", lines)
    pin_torch()
    pin_ray()


if __name__ == "__main__":
    main()
