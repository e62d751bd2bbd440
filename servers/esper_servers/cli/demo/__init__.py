"""`esper demo`: a mesh, and one training with and one without it."""

from __future__ import annotations

from .command import demo

__all__ = ["demo"]
