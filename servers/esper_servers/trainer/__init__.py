"""The trainer side put together: what `esper_client.attach` finds."""

from __future__ import annotations

from .attaching import Session, attach
from .detached import DetachedSession
from .membership import Membership
from .orchestration import orchestrate
from .serving import ServedModel, serve
from .sites import choose_sites, wrap_sites

__all__ = [
    "DetachedSession",
    "Membership",
    "ServedModel",
    "Session",
    "attach",
    "choose_sites",
    "orchestrate",
    "serve",
    "wrap_sites",
]
