"""What stands behind the command line, one file a job; `linattn.__main__` is the only one that imports them."""

from __future__ import annotations


class Refused(Exception):
    """What the user asked for cannot be done. The message is the one sentence that the user reads."""
