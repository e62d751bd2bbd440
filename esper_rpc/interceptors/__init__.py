"""What every call passes before its method."""

from __future__ import annotations

import grpc

from .authorisation import AuthorisationInterceptor
from .identity import IdentityInterceptor, peer_of

__all__ = ["peer_of", "server_interceptors"]


def server_interceptors() -> list[grpc.aio.ServerInterceptor]:
    """Return the interceptors, outermost first."""
    return [
        IdentityInterceptor(),  # First: nothing is decided about a peer that has not said who it is.
        AuthorisationInterceptor(),  # Then: what this peer may do.
    ]
