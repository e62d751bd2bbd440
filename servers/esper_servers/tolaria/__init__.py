"""Tolaria, the trainer's side of a run: checkpoints, rollback and emergencies."""

from __future__ import annotations
