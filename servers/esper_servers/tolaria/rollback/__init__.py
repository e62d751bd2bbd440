"""A run goes back to a checkpoint: three phases with all who hold a part of it, on one rank or several."""

from __future__ import annotations
