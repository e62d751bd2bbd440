"""The one table between errors and gRPC statuses, applied by servers and inverted by clients."""

from __future__ import annotations

import uuid
from typing import Any, NoReturn

import grpc
import structlog
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from . import errors

DOMAIN = "esper"

TABLE: tuple[tuple[type[errors.EsperError], grpc.StatusCode], ...] = (
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (errors.PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.Unimplemented, grpc.StatusCode.UNIMPLEMENTED),
    (errors.DataLoss, grpc.StatusCode.DATA_LOSS),
    (errors.Cancelled, grpc.StatusCode.CANCELLED),
    (errors.Internal, grpc.StatusCode.INTERNAL),
)
_CODE_OF = dict(TABLE)
_ERROR_OF = {code.value[0]: error for error, code in TABLE}

log = structlog.get_logger(__name__)


def to_status(error: errors.EsperError) -> status_pb2.Status:
    """Describe an error for the wire."""
    code = next((_CODE_OF[cls] for cls in type(error).__mro__ if cls in _CODE_OF), grpc.StatusCode.INTERNAL)
    status = status_pb2.Status(code=code.value[0], message=error.message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))
    if isinstance(error, errors.InvalidRequest) and error.violations:
        fields = [
            error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
            for v in error.violations
        ]
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=fields))
    if isinstance(error, errors.ResourceExhausted) and error.retry_after_ms:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(error.retry_after_ms)
        status.details.add().Pack(retry)
    return status


def from_status(status: status_pb2.Status) -> errors.EsperError:
    """Invert `to_status`."""
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, bad, retry):
            detail.Unpack(message)
    error = _ERROR_OF.get(status.code, errors.Internal)
    kwargs: dict[str, Any] = {"reason": info.reason or None, "metadata": dict(info.metadata)}
    if error is errors.InvalidRequest:
        kwargs["violations"] = tuple(errors.Violation(v.field, v.description) for v in bad.field_violations)
    if error is errors.ResourceExhausted:
        kwargs["retry_after_ms"] = retry.retry_delay.ToMilliseconds()
    return error(status.message, **kwargs)


def from_rpc_error(error: grpc.RpcError) -> errors.EsperError:
    """Turn what a gRPC call raised into the error that the server meant."""
    status = rpc_status.from_call(error)
    if status is None:
        code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
        details = error.details() if hasattr(error, "details") else str(error)
        status = status_pb2.Status(code=code.value[0], message=details or "")
    return from_status(status)


def hide_unexpected(error: Exception) -> errors.EsperError:
    """Log an unexpected exception under a correlation id, and return an error that says no more than that id."""
    # A setting or file of this machine is the business of who runs it, not of who calls.
    if isinstance(error, errors.EsperError) and not isinstance(error, errors.ConfigError):
        return error
    correlation_id = uuid.uuid4().hex
    log.error("unexpected_error", correlation_id=correlation_id, exc_info=error)
    return errors.Internal(
        f"Internal error; the server's log has it under {correlation_id}.", metadata={"correlation_id": correlation_id}
    )


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """End a call with the status of an error."""
    known = hide_unexpected(error)
    status = rpc_status.to_status(to_status(known))
    metadata = tuple(status.trailing_metadata)
    if isinstance(known, errors.ResourceExhausted) and known.retry_after_ms:
        metadata += (("grpc-retry-pushback-ms", str(known.retry_after_ms)),)
    await context.abort(status.code, status.details, metadata)
    raise AssertionError("abort returns never")
