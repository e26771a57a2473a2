"""A local inference service on a simulated node, driven exactly as a real one: front, engines, reconfiguration, controller,
powerd.

House rules: everything above the engines is the code that production runs, over real HTTP; engines live in this process, so
that stepped time is exact; what is printed says ``simulated``.

Like the simulated pipeline it may import ``powerd.sim`` and ``powerd.clock``: what it is plugged into *is* the simulator.
"""
