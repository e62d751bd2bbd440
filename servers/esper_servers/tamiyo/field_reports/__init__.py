"""What became of a run after a command: observed, written down, handed on until somebody acknowledges it."""

from __future__ import annotations
