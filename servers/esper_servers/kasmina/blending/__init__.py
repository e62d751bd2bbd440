"""How the output of a seed is mixed into that of its host, and how fast."""

from __future__ import annotations
