"""The product's Python files and what each imports, read from the source so that lazy imports count as well."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Import name -> the folder that holds it.
PACKAGES = {
    "powerd": ROOT / "powerd",
    "powerd_policies": ROOT / "policies" / "powerd_policies",
    "powerd_integrations": ROOT / "integrations" / "powerd_integrations",
}


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module; `lazy` when it is inside a function, `typing_only` when under `if TYPE_CHECKING`."""

    module: str
    line: int
    lazy: bool = False
    typing_only: bool = False


def files() -> list[Path]:
    """Every Python file of the product."""
    return sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))


def shown(path: Path) -> str:
    """The path as a person names it."""
    return path.relative_to(ROOT).as_posix()


@cache
def modules() -> dict[str, Path]:
    """Module name -> file, for the whole product."""
    found: dict[str, Path] = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def within(module: str, *names: str) -> bool:
    """Whether a module is one of the names or inside one of them."""
    return any(module == name or module.startswith(name + ".") for name in names)


def is_ours(module: str) -> bool:
    """Whether a module belongs to the product."""
    return within(module, *PACKAGES)


def is_stdlib(module: str) -> bool:
    """Whether a module comes with Python (`_typeshed` comes with every type checker)."""
    return module.split(".", maxsplit=1)[0] in sys.stdlib_module_names | {"_typeshed"}


def imports_of(module: str, source: str, known: frozenset[str], is_package: bool = False) -> list[Import]:
    """What a module's source imports; `from package import submodule` counts as the submodule."""
    found: list[Import] = []

    def add(node: ast.Import | ast.ImportFrom, lazy: bool, typing_only: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, lazy, typing_only) for alias in node.names)
            return
        base = node.module or ""
        if node.level:
            above = module.split(".") if is_package else module.split(".")[:-1]
            above = above[: len(above) - (node.level - 1)]
            base = ".".join([*above, base] if base else above)
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            found.append(Import(inner if inner in known else base, node.lineno, lazy, typing_only))

    def visit(node: ast.AST, lazy: bool, typing_only: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                add(child, lazy, typing_only)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                visit(child, True, typing_only)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for statement in child.body:
                    visit(ast.Module([statement], []), lazy, True)
                for statement in child.orelse:
                    visit(ast.Module([statement], []), lazy, typing_only)
            else:
                visit(child, lazy, typing_only)

    visit(ast.parse(source), False, False)
    return found


@cache
def graph() -> dict[str, list[Import]]:
    """Module -> what it imports, for the whole product."""
    known = frozenset(modules())
    return {
        module: imports_of(module, path.read_text(encoding="utf-8"), known, path.name == "__init__.py")
        for module, path in modules().items()
    }


def closure(start: str) -> Iterator[tuple[str, Import]]:
    """Every (module, import) reached from a module and all inside it, through imports that really run."""
    waiting = [module for module in graph() if within(module, start)]
    seen: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module in seen or module not in graph():
            continue
        seen.add(module)
        # Importing a.b.c runs a and a.b first.
        waiting.extend(module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1))
        for item in graph()[module]:
            if not item.typing_only:
                yield module, item
                if is_ours(item.module):
                    waiting.append(item.module)
