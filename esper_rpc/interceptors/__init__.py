"""What every call passes before its method."""

from __future__ import annotations

import grpc

from esper_rpc.audit import AuditLog
from esper_rpc.concurrency import ConcurrencyLimit
from esper_rpc.identity.authorisation import Rows
from esper_rpc.quota import Quotas

from .admission import AdmissionInterceptor
from .authorisation import AuthorisationInterceptor
from .identity import IdentityInterceptor
from .metrics import MetricsInterceptor
from .tracing import TracingInterceptor

__all__ = ["IdentityInterceptor", "server_interceptors"]


def server_interceptors(
    identity: IdentityInterceptor,
    rows: Rows,
    quotas: Quotas,
    limit: ConcurrencyLimit,
    audit: AuditLog,
) -> list[grpc.aio.ServerInterceptor]:
    """Return the interceptors, outermost first; `rows` says who may call what, and may grow until the server starts."""
    return [
        MetricsInterceptor(),  # Around all: what is refused counts as well.
        TracingInterceptor(),  # So that a refusal shows in the trace that led to it.
        identity,  # Nothing is decided about a peer that has not said who it is.
        AuthorisationInterceptor(rows, audit),  # What this peer may do.
        AdmissionInterceptor(quotas, limit, audit),  # Last: only what would be served uses up room.
    ]
