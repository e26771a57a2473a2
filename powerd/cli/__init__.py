"""powerctl: the client for people and scripts.

House rules: every read verb has ``--json``, every write verb ``--dry-run``; an error is one line on stderr that says what to do;
what comes from a simulated node says so.
"""
