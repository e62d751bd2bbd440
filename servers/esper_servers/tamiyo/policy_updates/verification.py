from __future__ import annotations

import re

from google.protobuf.message import DecodeError

from esper_rpc.envelope import Keyring, Rejected, reasons
from esper_rpc.envelope.authenticity import check_age, check_authentic
from esper_rpc.proto.leyline.v1 import PolicyUpdate, SignedEnvelope

UPDATE_TYPE = PolicyUpdate.DESCRIPTOR.full_name
ISSUERS = {UPDATE_TYPE: frozenset({"simic"})}
AUDIENCE = "tamiyo"
SCHEMA_VERSION = 1
FRESH_NS = 24 * 3600 * 10**9
MAX_PAYLOAD_BYTES = 16 * 1024 * 1024 + 4096
"""Of the envelope: the policy, and what stands beside it in the message."""
VERSION_NOT_ABOVE = "version_not_above"
_NUMBERED = re.compile(r".*?(?<!\d)(\d{1,18})", re.DOTALL)


def open_update(envelope: SignedEnvelope, *, keyring: Keyring, now_ns: int, highest: int) -> PolicyUpdate:
    """Return the update that simic signed for every Tamiyo; raises Rejected.

    An update that was accepted once is below the highest number for ever, also after a rollback: that is what keeps a
    recorded update from coming back, so that nothing else is kept of it (architecture, section 5).
    """
    check_authentic(envelope, keyring=keyring, audience=AUDIENCE, issuers=ISSUERS, max_payload_bytes=MAX_PAYLOAD_BYTES)
    check_age(envelope, now_ns, FRESH_NS)
    update = _parse(envelope.payload)
    if number_of(update.tamiyo_policy_version) <= highest:
        raise Rejected(VERSION_NOT_ABOVE, f"{update.tamiyo_policy_version!r} must end in more than {highest}")
    return update


def number_of(version: str) -> int:
    """Return the number that a version ends in, by which versions are ordered; -1 when it ends in none."""
    match = _NUMBERED.fullmatch(version)
    return int(match[1]) if match else -1


def _parse(payload: bytes) -> PolicyUpdate:
    try:
        update = PolicyUpdate.FromString(payload)
    except DecodeError as error:
        raise Rejected(reasons.UNSUPPORTED, "the payload is no PolicyUpdate") from error
    if update.version != SCHEMA_VERSION:
        raise Rejected(reasons.UNSUPPORTED, f"schema version {update.version}; this server speaks {SCHEMA_VERSION}")
    if update.training_run_id:
        raise Rejected(reasons.UNSUPPORTED, "a policy for one run only")
    return update
