"""Kills, faults and what must hold after them."""
