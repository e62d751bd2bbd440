"""What every call passes before its method."""

from __future__ import annotations

import grpc

from .authorisation import AuthorisationInterceptor
from .identity import IdentityInterceptor, peer_of
from .metrics import MetricsInterceptor

__all__ = ["peer_of", "server_interceptors"]


def server_interceptors() -> list[grpc.aio.ServerInterceptor]:
    """Return the interceptors, outermost first."""
    return [
        MetricsInterceptor(),  # Around all: what is refused counts as well.
        IdentityInterceptor(),  # Then: nothing is decided about a peer that has not said who it is.
        AuthorisationInterceptor(),  # Last: what this peer may do.
    ]
