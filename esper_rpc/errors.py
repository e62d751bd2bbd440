"""Errors, split by who must act. Nothing here knows gRPC; `status.py` maps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule of one field."""

    field: str
    """Path from the request, for example `step.packet.seed_states[3].risk_score`."""
    description: str


class EsperError(Exception):
    """Root of every error that a caller may see."""

    default_reason = "INTERNAL"

    def __init__(self, message: str, *, reason: str | None = None, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})


class InvalidRequest(EsperError):
    """The caller must change the request; `violations` name the fields."""

    default_reason = "INVALID_REQUEST"

    def __init__(
        self,
        message: str,
        *,
        violations: tuple[Violation, ...] = (),
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.violations = violations


class Unauthenticated(EsperError):
    """The peer did not prove who it is."""

    default_reason = "UNAUTHENTICATED"


class PermissionDenied(EsperError):
    """The peer is known and may not do this."""

    default_reason = "PERMISSION_DENIED"


class NotFound(EsperError):
    """The named thing does not exist."""

    default_reason = "NOT_FOUND"


class AlreadyExists(EsperError):
    """The thing exists with other content."""

    default_reason = "ALREADY_EXISTS"


class FailedPrecondition(EsperError):
    """The system is not in the state that the call needs."""

    default_reason = "FAILED_PRECONDITION"


class ResourceExhausted(EsperError):
    """Try again later; `retry_after_ms` says when."""

    default_reason = "RESOURCE_EXHAUSTED"

    def __init__(
        self,
        message: str,
        *,
        retry_after_ms: int = 0,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.retry_after_ms = retry_after_ms


class Unavailable(EsperError):
    """The peer cannot be reached; a retry may succeed."""

    default_reason = "UNAVAILABLE"


class DeadlineExceeded(EsperError):
    """The time ran out."""

    default_reason = "DEADLINE_EXCEEDED"


class Unimplemented(EsperError):
    """The server does not offer this."""

    default_reason = "UNIMPLEMENTED"


class DataLoss(EsperError):
    """Stored content is not what was stored."""

    default_reason = "DATA_LOSS"


class Cancelled(EsperError):
    """The caller gave up."""

    default_reason = "CANCELLED"


class Internal(EsperError):
    """A fault of ours; the correlation id in `metadata` finds it in the log."""

    default_reason = "INTERNAL"


class ConfigError(EsperError):
    """A setting, file or directory is wrong; the message says which and what is allowed."""

    default_reason = "CONFIG"
