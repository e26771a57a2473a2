"""Pure planners and controllers: no I/O, no clock, no NVML."""
