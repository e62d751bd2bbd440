"""Several losses, one gradient: how much each seed counts, and what is done when gradients pull apart."""

from __future__ import annotations
