from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from esper_rpc.errors import EsperError, InvalidRequest
from esper_rpc.identity import SpiffeId
from esper_rpc.status import TABLE

CALL_SECONDS = 30.0
"""A call that takes longer hangs."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: messages, and the error that ended the call if one did."""

    responses: tuple[dict[str, Any], ...] = ()
    """As protobuf JSON with the names of the .proto, defaults included."""
    error: EsperError | None = None

    @property
    def code(self) -> str:
        """The name of the gRPC status."""
        if self.error is None:
            return "OK"
        return next((code.name for error, code in TABLE if isinstance(self.error, error)), "INTERNAL")

    @property
    def violations(self) -> tuple[tuple[str, str], ...]:
        """Fields with the rule that each breaks; a field may break several."""
        found = self.error.violations if isinstance(self.error, InvalidRequest) else ()
        return tuple((violation.field, violation.description) for violation in found)


class Transport(Protocol):
    """A way to reach a servicer."""

    async def call(
        self, method: MethodDescriptor, messages: Sequence[bytes], caller: SpiffeId, wanted: int | None
    ) -> Answer:
        """Call an RPC with serialised messages; of a stream read `wanted` responses, None reads to its end."""
        ...


def as_dict(message: Message) -> dict[str, Any]:
    """Write a response as protobuf JSON with every field."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def read_response(method: MethodDescriptor, raw: bytes) -> dict[str, Any]:
    """Parse the bytes of a response."""
    return as_dict(GetMessageClass(method.output_type).FromString(raw))
