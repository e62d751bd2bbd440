"""Whether the gradients of a host and of its seeds stay apart (decision 21)."""

from __future__ import annotations
