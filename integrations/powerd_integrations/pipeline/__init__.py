"""Perseus for any pipeline-parallel training framework: record the order, profile clocks, plan, follow by beats, mind stragglers.

House rules: no framework is imported here; an adapter of a few lines drives one ``Conductor`` per rank.

An adapter makes one conductor per rank and calls, from the thread that trains:

    conductor = Conductor(place, exchange, client, order=order, options=Options(slowdown=0.0), shape="what fits the profile")
    for batch in data:
        conductor.step_begin()
        ...                                          # for each instruction, in the order in which it really runs:
        conductor.begin(stage, "forward", microbatch)    # when its inputs have arrived, so that waiting is not counted as work
        conductor.end(stage, "forward", microbatch)      # when its work is done (a Timing tells the GPU's moment instead)
        ...
        conductor.step_end()                         # after the last backward; here, and only here, the ranks talk at times
    conductor.close()

- ``place`` says where the rank stands; ``exchange.gather(value)`` is a collective over *all* ranks of the job (JSON values).
- kinds are those of profiles: forward, backward, input, weight, recompute. ``order`` (what each rank will run, if it is known) is
  compared with the second step; without it, or where it is wrong, the recorded order counts.
- A step without a backward is an evaluation pass and does not count. All ranks must run the same number of training steps.
- ``client`` is ``powerd.client.Client(on_error="log")``; without a daemon training goes on and the conductor tries again.
- ``step_abort()`` instead of ``step_end()`` when the step broke off.
- Stepped simulation gives ``Options(background=False)`` and so has everything done in the calling thread.
"""

from powerd_integrations.pipeline.agreement import State
from powerd_integrations.pipeline.conductor import Conductor
from powerd_integrations.pipeline.exchange import Alone, Exchange
from powerd_integrations.pipeline.options import Options
from powerd_integrations.pipeline.place import Launch, Place, launch, place_of, rendezvous
from powerd_integrations.pipeline.timing import HostTiming, Timing

__all__ = [
    "Alone",
    "Conductor",
    "Exchange",
    "HostTiming",
    "Launch",
    "Options",
    "Place",
    "State",
    "Timing",
    "launch",
    "place_of",
    "rendezvous",
]
