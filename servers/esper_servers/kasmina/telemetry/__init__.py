"""What a seed host tells: events, packets of a step, its health."""

from __future__ import annotations
