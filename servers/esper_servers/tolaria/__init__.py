"""Tolaria, the training orchestrator: the loop, its emergencies, checkpoints and what it measures."""

from __future__ import annotations
