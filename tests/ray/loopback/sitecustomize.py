"""Keeps Ray Serve's replicas on loopback: they offer their gRPC port to everybody, and no setting of Serve's changes that.

House rule: found by every Python of the test's Ray through PYTHONPATH; changes this one address and nothing else.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

PATCHED = "ray._common.tls_utils"


class _OnLoopback(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != PATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            add = module.add_port_to_grpc_server
            module.add_port_to_grpc_server = lambda server, address: add(server, address.replace("[::]", "127.0.0.1"))

        loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _OnLoopback())
