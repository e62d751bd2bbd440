"""The state of a training as a checkpoint: captured, kept in memory, written to the disk and read again."""

from __future__ import annotations
