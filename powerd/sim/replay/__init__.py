"""Replays request traces on the cluster simulator under fleet controllers: everything computed here is modelled."""
