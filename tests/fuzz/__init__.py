"""Damaged input for what reads files: the only outcome is a result or a UserError, in bounded time and memory.

A file of targets/ has a list `TARGETS`; a new file there is found by itself. `pytest tests/fuzz` runs some cases of
each, `python -m tests.fuzz --minutes 30` new ones until the time is over.
"""
