"""Every dependency is named with its reason, pinned, and really declared where the code imports it."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import packages_distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.arch import source_tree as tree

PROJECT = tomllib.loads((tree.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGE = (tree.ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")

#: import -> package of what is not installed beside powerd's own tools (docs/dependencies.md, "Frameworks").
FRAMEWORKS = {
    "torch": "torch",
    "lightning": "lightning",
    "transformers": "transformers",
    "megatron": "megatron-core",
    "deepspeed": "deepspeed",
}
#: Likewise of the fourth environment ("Ray and gRPC").
SERVING = {"ray": "ray", "starlette": "starlette", "grpc": "grpcio", "google": "protobuf"}


def declared() -> dict[str, Requirement]:
    """Every third-party requirement of the project, its extras, its development tools and its build."""
    lines = [
        *PROJECT["project"]["dependencies"],
        *(line for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra),
        *PROJECT["dependency-groups"]["dev"],
        *PROJECT["build-system"]["requires"],
    ]
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in found if requirement.name != "powerd"}


def documented(heading: str) -> set[str]:
    """The names in the first column of the table under a heading."""
    section = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return {canonicalize_name(name) for name in re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)}


def pins(name: str) -> dict[str, str]:
    """Package -> version of a constraints file."""
    lines = (tree.ROOT / name).read_text(encoding="utf-8").splitlines()
    found = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): version for package, version in found}


def test_the_client_needs_nothing() -> None:
    assert PROJECT["project"]["dependencies"] == []


def test_every_dependency_is_documented_and_nothing_else_is() -> None:
    assert documented("The project's own") == set(declared())


def test_every_dependency_is_pinned_at_a_version_it_allows() -> None:
    pinned = {**pins("constraints-torch.txt"), **pins("constraints-ray.txt"), **pins("constraints.txt")}
    wrong = [
        f"{name} {pinned.get(name)}"
        for name, requirement in declared().items()
        if name not in pinned or not requirement.specifier.contains(pinned[name])
    ]
    assert wrong == []


def test_the_peers_are_documented_at_the_versions_that_are_pinned() -> None:
    pinned = pins("constraints-peers.txt")
    peers = documented("Peers")
    assert {"nvitop", "gpustat", "py3nvml", "zeus", "lowtime", "nvidia-ml-py"} == peers
    assert [name for name in peers if f"{name} {pinned[name]}" not in PAGE] == []


def test_the_frameworks_are_documented_at_the_versions_that_are_pinned() -> None:
    pinned = pins("constraints-torch.txt")
    frameworks = documented("Frameworks")
    assert frameworks >= set(FRAMEWORKS.values())
    assert [name for name in frameworks if f"{name} {pinned[name]}" not in PAGE] == []


def test_what_serves_is_documented_at_the_versions_that_are_pinned() -> None:
    pinned = pins("constraints-ray.txt")
    serving = documented("Ray and gRPC")
    assert serving >= {"ray", "grpcio", "grpcio-tools", "protobuf"}
    assert [name for name in serving if f"{name} {pinned[name]}" not in PAGE] == []


def test_what_the_code_imports_is_declared() -> None:
    providers = {**packages_distributions(), **{name: [package] for name, package in {**FRAMEWORKS, **SERVING}.items()}}
    undeclared = [
        f"{module}:{item.line} imports {item.module}"
        for module, items in tree.graph().items()
        for item in items
        if not (tree.is_ours(item.module) or tree.is_stdlib(item.module))
        and not {canonicalize_name(name) for name in providers.get(item.module.split(".")[0], [])} & set(declared())
    ]
    assert undeclared == []
