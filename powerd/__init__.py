"""powerd: measure and set GPU clocks and power limits so that AI jobs use the least energy that still meets their time target."""

__version__ = "0.1.0"
