"""Signed emergencies: to the trainer of a run under its SPIFFE id, and by it to everybody under the name `run`."""

from __future__ import annotations

import hmac
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from esper_rpc import rules
from esper_rpc.errors import InvalidRequest
from esper_rpc.proto.leyline.v1 import EmergencyLevel, EmergencySignal, SignedEnvelope

from . import reasons
from .authenticity import Rejected, check_age, check_authentic
from .fence import NonceStore
from .keys import Keyring
from .refusals import Refusals
from .signing import sign

SIGNAL_TYPE = EmergencySignal.DESCRIPTOR.full_name
ISSUERS = {SIGNAL_TYPE: frozenset({"trainer", "weatherlight", "operator"})}
ANNOUNCED = "run"
"""The audience of what a trainer announces: whoever watches runs holds the key for it."""
SCHEMA_VERSION = 1
PAST_NS = 60 * 10**9
NONCE_SECONDS = 300.0
MALFORMED = "malformed_payload"
MAX_PAYLOAD_BYTES = 64 * 1024
MAX_NONCES = 4096


@dataclass(frozen=True, slots=True)
class Verified:
    """A signal that is what it says. `duplicate`: it was accepted before, and must not be acted on again."""

    signal: EmergencySignal
    issuer: str
    issued_at_ns: int
    duplicate: bool


def seal(
    signal: EmergencySignal, *, keyring: Keyring, audience: str, run_id: str, issued_at_ns: int, nonce: str = ""
) -> SignedEnvelope:
    """Sign a signal, under a nonce drawn at random unless one is given."""
    return sign(
        signal.SerializeToString(),
        payload_type=SIGNAL_TYPE,
        keyring=keyring,
        audience=audience,
        run_id=run_id,
        issued_at_ns=issued_at_ns,
        nonce=nonce or str(uuid.uuid4()),
    )


class SignalVerifier:
    """Verifies the signals of one run for one receiver. Safe to call from any thread.

    There is no challenge: whoever raises an alarm must not have to ask first. What was accepted is remembered for five
    minutes, five times as long as a signal is fresh. `now_ns` is the issuers' wall clock.
    """

    def __init__(
        self,
        *,
        keyring: Keyring,
        audience: str,
        run_id: str,
        now_ns: Callable[[], int] = time.time_ns,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.audience = audience
        self.run_id = run_id
        self._keyring = keyring
        self._now_ns = now_ns
        self._nonces = NonceStore(ttl_seconds=NONCE_SECONDS, capacity=MAX_NONCES, clock=clock)
        self._refusals = Refusals("signal_rejected", run_id=run_id)
        self._lock = threading.Lock()

    @property
    def rejections(self) -> dict[str, int]:
        """How many were rejected, by reason."""
        return self._refusals.by_reason()

    def verify(self, envelope: SignedEnvelope) -> Verified:
        """Check an envelope and remember it; raises Rejected, and then nothing has changed."""
        try:
            check_authentic(
                envelope,
                keyring=self._keyring,
                audience=self.audience,
                issuers=ISSUERS,
                max_payload_bytes=MAX_PAYLOAD_BYTES,
            )
            if envelope.run_id != self.run_id:
                raise Rejected(reasons.WRONG_AUDIENCE, f"it is for the run {envelope.run_id!r}")
            check_age(envelope, self._now_ns(), PAST_NS)
            return self._commit(envelope, self._parse(envelope.payload))
        except Rejected as refusal:
            self.count(refusal.reason)
            raise

    def count(self, reason: str) -> None:
        """Count a rejection; the first of each reason is logged."""
        self._refusals.count(reason)

    def _parse(self, payload: bytes) -> EmergencySignal:
        try:
            signal = EmergencySignal.FromString(payload)
            rules.check(signal)
        except (DecodeError, InvalidRequest) as error:
            raise Rejected(MALFORMED) from error
        if signal.version != SCHEMA_VERSION or signal.level not in EmergencyLevel.values() or not signal.level:
            raise Rejected(reasons.UNSUPPORTED, f"version {signal.version}, level {signal.level}")
        if signal.run_id not in ("", self.run_id):
            raise Rejected(reasons.WRONG_AUDIENCE, f"it is of the run {signal.run_id!r}")
        return signal

    def _commit(self, envelope: SignedEnvelope, signal: EmergencySignal) -> Verified:
        with self._lock:
            receipt = self._nonces.find(envelope.nonce)
            if receipt is not None and not hmac.compare_digest(receipt.mac, envelope.mac):
                raise Rejected(reasons.NONCE_REPLAYED)
            if receipt is None:
                if not envelope.nonce:
                    raise Rejected(MALFORMED, "it has no nonce")
                if self._nonces.is_full():
                    raise Rejected(reasons.LOCAL_LIMIT, "too many signals within the replay window")
                self._nonces.add(envelope.nonce, envelope.mac)
        return Verified(signal, envelope.issuer, envelope.issued_at_ns, receipt is not None)
