"""Pipeline training on a simulated node: one process per GPU, driven and conducted exactly as a training framework's ranks are.

House rules: a rank knows what any framework's rank knows (its order, its peers, its own GPU) and drives the same Conductor;
waiting is on the node's clock, so that stepped time is exact; what is printed says ``simulated``.

This is the one integration that may import ``powerd.sim`` and ``powerd.clock``: what it is plugged into *is* the simulator.
"""

from powerd_integrations.simulated_pipeline.job import Job

__all__ = ["Job"]
