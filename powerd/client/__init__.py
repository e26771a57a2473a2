"""The client of powerd: leases, energy windows and readings of this node's GPUs, with the standard library alone.

House rules: nothing outside the standard library; nothing raises into a training step that asked for ``on_error="log"``;
a lease dies with the process that holds it.

    from powerd.client import Client

    client = Client(on_error="log")
    with client.lease(sm_clock_mhz=1200, reason="fine-tuning"), client.energy("epoch") as window:
        train()
    print(window.energy_j)
"""

from powerd.api import Span
from powerd.client.beats import Beats
from powerd.client.core import Client
from powerd.client.joblog import JobLog
from powerd.client.lease import Lease
from powerd.client.replica import Replica
from powerd.client.transport import default_socket
from powerd.client.window import EnergyWindow

__all__ = ["Beats", "Client", "EnergyWindow", "JobLog", "Lease", "Replica", "Span", "default_socket"]
