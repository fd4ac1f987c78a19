"""What ends a command."""

from __future__ import annotations


class Failure(Exception):
    """One sentence for the user: what failed, and what to do."""
