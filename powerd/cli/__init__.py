"""The commands that people type: powerctl and the rarer verbs of powerd."""
