"""Runtime of the Esper mesh: identity, signed envelopes, servers, channels and the step guard."""

from __future__ import annotations

from . import errors

__all__ = ["errors"]
