from __future__ import annotations

import base64
import hmac
import time
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf import json_format

from esper_rpc.envelope import Keyring, mac_input, sign
from esper_rpc.envelope.emergency import SIGNAL_TYPE
from esper_rpc.envelope.verification import COMMAND_TYPE
from esper_rpc.proto.leyline.v1 import AdaptationCommand, EmergencySignal, SignedEnvelope

SECOND_NS = 10**9
STALE_NS = 3600 * SECOND_NS
FUTURE_NS = 3600 * SECOND_NS
_KEYS = {"command", "signal", "nonce", "status", "variant", "issuer"}

Variant = Callable[[dict[str, Any]], None]


def signed(argument: Mapping[str, Any], keyring: Callable[[str], Keyring]) -> dict[str, Any]:
    """Sign a command or a signal for whoever gave this status, or in one way wrongly; returns protobuf JSON.

    `command` is an AdaptationCommand, or `signal` an EmergencySignal with its `nonce`; `status` is a captured
    GetStatusResponse, `issuer` a role, by default `operator`.
    """
    unknown = set(argument) - _KEYS
    variant = argument.get("variant", "good")
    if unknown or variant not in VARIANTS:
        raise ValueError(f"$sign takes {', '.join(sorted(_KEYS))}; the variants are {', '.join(VARIANTS)}")
    issuer = argument.get("issuer", "operator")
    options = {
        "keyring": keyring(issuer),
        "audience": argument["status"]["audience"],
        "issued_at_ns": time.time_ns(),
        "run_id": argument["status"]["run_id"],
    }
    payload, more = _signal(argument) if "signal" in argument else _command(argument, issuer)
    before, after = VARIANTS[variant]
    options |= more
    before(options)
    envelope = sign(payload, **options)
    after(envelope)
    return json_format.MessageToDict(envelope, preserving_proto_field_name=True)


def _command(argument: Mapping[str, Any], issuer: str) -> tuple[bytes, dict[str, Any]]:
    command = json_format.ParseDict(argument["command"], AdaptationCommand())
    status = argument["status"]
    fences = [int(fence["sequence"]) for fence in status.get("fences", ()) if fence["issuer"] == issuer]
    return command.SerializeToString(), {
        "payload_type": COMMAND_TYPE,
        "nonce": command.command_id,
        "receiver_epoch": base64.b64decode(status["receiver_epoch"]),
        "sequence": max(fences, default=0) + 1,
    }


def _signal(argument: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    signal = json_format.ParseDict(argument["signal"], EmergencySignal())
    return signal.SerializeToString(), {"payload_type": SIGNAL_TYPE, "nonce": argument["nonce"]}


def _nothing(_: Any) -> None:
    return


def _later(nanoseconds: int) -> Variant:
    return lambda options: options.update(issued_at_ns=options["issued_at_ns"] + nanoseconds)


def _used_sequence(options: dict[str, Any]) -> None:
    options["sequence"] -= 1


def _other_epoch(options: dict[str, Any]) -> None:
    options["receiver_epoch"] = bytes(byte ^ 0xFF for byte in options["receiver_epoch"])


def _other_audience(options: dict[str, Any]) -> None:
    options["audience"] += "-other"


def _other_run(options: dict[str, Any]) -> None:
    options["run_id"] += "-other"


def _other_type(options: dict[str, Any]) -> None:
    options["payload_type"] = "esper.leyline.v1.PolicyUpdate"


def _wrong_key(envelope: SignedEnvelope) -> None:
    envelope.mac = hmac.digest(bytes(32), mac_input(envelope), "sha256")


def _unknown_key(envelope: SignedEnvelope) -> None:
    envelope.key_id = "no-such-key"


def _tampered(envelope: SignedEnvelope) -> None:
    envelope.payload += b"\x00"


def _unsigned(envelope: SignedEnvelope) -> None:
    envelope.ClearField("mac")


VARIANTS: dict[str, tuple[Variant, Callable[[SignedEnvelope], None]]] = {
    "good": (_nothing, _nothing),
    "stale": (_later(-STALE_NS), _nothing),
    "future": (_later(FUTURE_NS), _nothing),
    "used_sequence": (_used_sequence, _nothing),
    "other_epoch": (_other_epoch, _nothing),
    "other_audience": (_other_audience, _nothing),
    "other_run": (_other_run, _nothing),
    "other_type": (_other_type, _nothing),
    "wrong_key": (_nothing, _wrong_key),
    "unknown_key": (_nothing, _unknown_key),
    "tampered": (_nothing, _tampered),
    "unsigned": (_nothing, _unsigned),
}
"""What is changed before and after signing."""
