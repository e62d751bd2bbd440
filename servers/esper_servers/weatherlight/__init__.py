"""What keeps a mesh running: the authority that renews its certificates."""

from __future__ import annotations
