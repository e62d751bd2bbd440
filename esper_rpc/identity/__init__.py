"""Certificates, SPIFFE ids and who may call what."""

from __future__ import annotations

from .authorisation import authorise
from .authority import Authority, IssuedLeaf
from .credentials import Identity, LiveIdentity
from .spiffe import SpiffeId

__all__ = ["Authority", "Identity", "IssuedLeaf", "LiveIdentity", "SpiffeId", "authorise"]
