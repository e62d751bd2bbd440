"""Pauses that a caller asks for: a quota for each, and a trail of what was granted."""

from __future__ import annotations
