"""The policy that a fleet's file names, ready to decide.

House rules: policies and their options are those of the simulator (`powerctl dynamollm replay`); an option that a policy does not
have is an error before anything starts.
"""
