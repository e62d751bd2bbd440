from __future__ import annotations

import json
import os
from collections.abc import Sequence

# Forked DataLoader workers crash a trainer whose gRPC supports forks; must be set before grpc loads.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc

from .errors import FailedPrecondition
from .identity import Identity

MAX_MESSAGE_BYTES = 18 * 1024 * 1024

# Client and server must agree, or the server ends the connection for too many pings.
KEEPALIVE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)
MESSAGE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
# A peer that restarts must be found again within two seconds. The least backoff is none: it is how long an attempt may
# take, its handshake included, and on a busy machine a handshake takes long (grpc/grpc issue 33423).
RECONNECT_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


RETRY_POLICY = {
    "maxAttempts": 3,
    "initialBackoff": "0.05s",
    "maxBackoff": "0.5s",
    "backoffMultiplier": 2,
    # CANCELLED, when it was not the caller: gRPC of a server that stops says so of a call that nobody took up yet.
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
}
# Ten failures in a row end retries, and ten successes earn one back (gRPC proposal A6).
RETRY_THROTTLING = {"maxTokens": 10, "tokenRatio": 0.1}


def retry_config(service: str, methods: Sequence[str]) -> str:
    """Write a gRPC service config that retries these methods, throttled, and heeds the server's pushback."""
    names = [{"service": service, "method": method} for method in methods]
    method_config = [{"name": names, "retryPolicy": RETRY_POLICY}] if names else []
    return json.dumps({"methodConfig": method_config, "retryThrottling": RETRY_THROTTLING})


def open_channel(address: str, *, identity: Identity, role: str, service_config: str = "{}") -> grpc.aio.Channel:
    """Open a channel to a peer that must prove to be of `role`; call it on the loop that will use it."""
    options = [
        ("grpc.service_config", service_config),
        ("grpc.ssl_target_name_override", f"{role}.esper"),
        ("grpc.use_local_subchannel_pool", 1),
        *KEEPALIVE_OPTIONS,
        *MESSAGE_OPTIONS,
        *RECONNECT_OPTIONS,
    ]
    return grpc.aio.secure_channel(address, identity.channel_credentials(), options=options)


class ForkGuard:
    """Remembers the process that opened a channel: gRPC does not survive a fork."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_child(self) -> bool:
        """Whether this process was forked off after the guard was made."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """Raise FailedPrecondition in a forked child."""
        if self.is_child:
            raise FailedPrecondition("A channel cannot be used in a forked child; open one there after the fork.")
