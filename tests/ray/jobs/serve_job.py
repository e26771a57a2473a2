"""Ray Serve on loopback with powerd's application: ``serve_job.py FLEET.TOML FOLDER PORT GPUS``; JSON lines out, commands in.

House rules: everything of Ray listens on 127.0.0.1, keeps to its folder, sends no usage; it ends when stdin does.
"""

from __future__ import annotations

import json
import logging
import os
import sys

# Ray's own switch for machines whose firewall asks: without it Ray listens on every interface.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

import ray
from ray import serve

from powerd_integrations.ray_serve.app import build


def say(**row: object) -> None:
    print(json.dumps(row), flush=True)


def replicas() -> list[dict[str, object]]:
    """Every engine replica that Serve knows, with its process."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeInstanceDetails

    details = ServeInstanceDetails(**ray.get(_get_global_client()._controller.get_serve_instance_details.remote()))
    found = []
    for app in details.applications.values():
        for name, deployment in app.deployments.items():
            for one in deployment.replicas:
                found.append({"deployment": name, "state": str(one.state.value), "pid": one.pid, "id": one.replica_id})
    return found


def main() -> None:
    config, folder, port, gpus = sys.argv[1:]
    ray.init(
        num_cpus=4, num_gpus=int(gpus), include_dashboard=False, object_store_memory=80 * 2**20, _temp_dir=folder,
        _node_ip_address="127.0.0.1", logging_level=logging.WARNING, log_to_driver=True,
    )  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(build({"config": config}), name="fleet", route_prefix="/")
    say(ready=True, address=ray.get_runtime_context().gcs_address)
    for line in sys.stdin:
        match line.strip():
            case "replicas":
                say(replicas=replicas())
            case "stop":
                break
    serve.shutdown()
    ray.shutdown()
    say(ended=True)


if __name__ == "__main__":
    main()
