"""``python -m powerd_integrations.keda --plan http://planner:9480``: the external scaler as a service.

House rules: everything is put together here; it ends cleanly on SIGTERM; it decides nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys

from powerd_integrations.fleet.published import PlanMirror
from powerd_integrations.keda.scaler import Scaler, handlers


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="powerd_integrations.keda", description="KEDA's external scaler for a powerd fleet.")
    parser.add_argument("--plan", required=True, metavar="URL|FILE", help="the planner's URL, or the path of its plan file")
    parser.add_argument(
        "--listen", default="127.0.0.1:9481", metavar="HOST:PORT", help="where KEDA finds it (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    try:
        scaler = Scaler(PlanMirror(args.plan))
    except ValueError as error:
        parser.error(str(error))
    return asyncio.run(_serve(scaler, args.listen))


async def _serve(scaler: Scaler, listen: str) -> int:
    import grpc.aio

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handlers(scaler),))
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        print(f"powerd-keda: cannot listen on {listen}: {error}", file=sys.stderr)
        return 69
    await server.start()
    print(f"powerd-keda: on port {port}", flush=True)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await server.stop(2.0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
