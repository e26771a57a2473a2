"""A second Ray node on this machine: ``node_job.py ADDRESS GPUS``; it leaves when stdin closes.

House rules: everything of it listens on 127.0.0.1, which ``ray start`` refuses, so that its inner part is called here; what runs
on the node has this process's environment, as on a machine of its own.
"""

from __future__ import annotations

import os
import sys

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

from ray._private.node import Node
from ray._private.parameter import RayParams


def main() -> None:
    address, gpus = sys.argv[1:]
    about = RayParams(
        gcs_address=address, redis_address=address, node_ip_address="127.0.0.1", num_cpus=2, num_gpus=int(gpus),
        object_store_memory=80 * 2**20, include_log_monitor=False, min_worker_port=0, max_worker_port=0, node_manager_port=0,
    )  # fmt: skip
    node = Node(about, head=False, shutdown_at_exit=True, spawn_reaper=True)
    print("joined", flush=True)
    sys.stdin.read()
    node.kill_all_processes(check_alive=False, allow_graceful=True)


if __name__ == "__main__":
    main()
