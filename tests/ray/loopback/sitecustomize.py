"""Keeps Ray Serve's replicas on loopback: they offer their gRPC port to everybody, and no setting of Serve's changes that.

House rule: found by every Python of the test's Ray through PYTHONPATH; changes this one address and nothing else.
"""

import importlib.abc
import importlib.machinery
import sys

PATCHED = "ray._common.tls_utils"


class _OnLoopback(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != PATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):  # type: ignore[no-untyped-def]
            run(module)
            add = module.add_port_to_grpc_server
            module.add_port_to_grpc_server = lambda server, address: add(server, address.replace("[::]", "127.0.0.1"))

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _OnLoopback())
