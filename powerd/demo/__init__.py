"""The main job in one command: sweep, choose, train with Perseus, die, be restored; all of it on a simulated node.

House rules: every process is the real one (daemon, hw unit, client, job, an independent NVML reader), only the driver is
simulated; every number says so; nothing that was started is left running.
"""
