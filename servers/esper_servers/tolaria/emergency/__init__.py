"""The emergencies of a run: their levels, what raises one by itself, how processes share it."""

from __future__ import annotations
