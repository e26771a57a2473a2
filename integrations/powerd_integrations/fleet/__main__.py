"""``python -m powerd_integrations.fleet fleet.toml``: the live planner as a service.

House rules: everything is put together here; it ends cleanly on SIGTERM and leaves its plan file for readers; exit codes as
powerctl's (78: bad configuration).
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
from pathlib import Path

from powerd.errors import PowerdError, RequestError
from powerd_integrations.fleet import settings as configured
from powerd_integrations.fleet.planner import LivePlanner
from powerd_integrations.fleet.reporter import Periodic
from powerd_integrations.fleet.server import PlannerServer
from powerd_integrations.fleet.settings import FleetSettings
from powerd_integrations.fleet.targets import Targets
from powerd_policies.dynamollm.fleet import FleetController
from powerd_policies.dynamollm.predictor import UNIX_EPOCH_S

BAD_CONFIGURATION = 78


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM; 0 then, 78 for a file that cannot be used."""
    parser = argparse.ArgumentParser(prog="powerd_integrations.fleet", description="The live planner of a fleet of engines.")
    parser.add_argument("file", type=Path, help="fleet.toml")
    parser.add_argument("--check", action="store_true", help="read the file, build the policy, say so and end")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    try:
        settings = configured.load(args.file)
        policy = controller(settings)
        token = Path(settings.planner.token_file).read_text().strip() if settings.planner.token_file else ""
        address = _address(settings.planner.listen)
    except (PowerdError, OSError) as error:
        print(f"powerd-fleet: {error}", file=sys.stderr)
        return BAD_CONFIGURATION
    if args.check:
        print(f"{args.file}: {policy.name} every {policy.period_s:g} s over {', '.join(str(g.group) for g in settings.groups)}")
        return 0
    plan_file = Path(settings.planner.plan_file) if settings.planner.plan_file else None
    planner = LivePlanner(policy, settings.options, plan_file=plan_file, groups=settings.bounds)
    count = planner.add_arrivals if settings.planner.arrivals == "engines" else None
    targets = Targets([(row.group, row.targets) for row in settings.groups], planner.add_instances, count=count)
    server = PlannerServer(address, planner, token)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=server.serve_forever, name="powerd-fleet-http", daemon=True).start()
    scraper = Periodic(targets.look, 1.0, "powerd-fleet-scrape") if targets else None
    print(f"powerd-fleet: {policy.name} on http://{address[0]}:{server.server_address[1]}", flush=True)
    planner.run(stop)
    if scraper is not None:
        scraper.close()
    server.shutdown()
    return 0


def controller(settings: FleetSettings) -> FleetController:
    """Build the policy that the file names."""
    from powerd_integrations.fleet.policy import build

    return build(settings, epoch_s=UNIX_EPOCH_S + time.time() - time.monotonic())  # the planner's clock is the monotonic one


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise RequestError(f"[planner] listen: an address as 127.0.0.1:9480, not {listen!r}", code="bad_value")
    return host.strip("[]"), int(port)


if __name__ == "__main__":
    sys.exit(main())
