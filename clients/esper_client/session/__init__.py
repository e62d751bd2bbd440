"""The session of a training loop: what it asks after every step, and what it makes of the answer."""

from __future__ import annotations

from .config import SessionConfig
from .loss import Loss, read_loss
from .training_session import TrainingSession

__all__ = ["Loss", "SessionConfig", "TrainingSession", "read_loss"]
