"""When a run makes a checkpoint or goes back to one: by schedule, by command, for an operator."""

from __future__ import annotations
