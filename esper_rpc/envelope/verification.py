from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, SignedEnvelope

from . import reasons
from .authenticity import Rejected, check_age, check_authentic
from .fence import NonceStore
from .keys import Keyring
from .refusals import Refusals

PAST_NS = 60 * 10**9

COMMAND_TYPE = AdaptationCommand.DESCRIPTOR.full_name
COMMAND_ISSUERS: Mapping[str, frozenset[str]] = {COMMAND_TYPE: frozenset({"tamiyo", "operator"})}


@dataclass(frozen=True, slots=True)
class Accepted:
    """A verified envelope. `duplicate` means that it was accepted before and must not be applied again."""

    payload: bytes
    issuer: str
    nonce: str
    duplicate: bool = False
    outcome: CommandOutcome | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifierConfig:
    """Limits of a receiver."""

    max_payload_bytes: int = 256 * 1024
    nonce_ttl_seconds: float = 300.0
    nonce_capacity: int = 100_000


class Verifier:
    """Verifies commands for one receiver: checks first, then one locked step commits fence and nonce.

    Safe to call from any thread.
    """

    def __init__(
        self,
        *,
        keyring: Keyring,
        audience: str,
        receiver_epoch: bytes,
        issuers: Mapping[str, frozenset[str]] = COMMAND_ISSUERS,
        config: VerifierConfig | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        offset_ns: int | None = None,
    ) -> None:
        self._keyring = keyring
        self.audience = audience
        self.receiver_epoch = receiver_epoch
        self._issuers = issuers
        self._config = config or VerifierConfig()
        self._clock_ns = clock_ns
        self._offset_ns = time.time_ns() - clock_ns() if offset_ns is None else offset_ns
        self._nonces = NonceStore(
            ttl_seconds=self._config.nonce_ttl_seconds,
            capacity=self._config.nonce_capacity,
            clock=lambda: clock_ns() / 1e9,
        )
        self._fences: dict[str, int] = {}
        self._lock = threading.Lock()
        self._refusals = Refusals("envelope_rejected", audience=audience)

    def set_clock_offset(self, offset_ns: int) -> None:
        """Set the issuer's wall clock minus our monotonic clock; a step of our wall clock then changes nothing."""
        self._offset_ns = offset_ns

    def now_ns(self) -> int:
        """The issuer's wall clock, by which freshness is judged."""
        return self._clock_ns() + self._offset_ns

    def fences(self) -> dict[str, int]:
        """The last accepted sequence of each issuer."""
        with self._lock:
            return dict(self._fences)

    @property
    def rejections(self) -> dict[str, int]:
        """How many were rejected, by reason."""
        return self._refusals.by_reason()

    def remembered_nonces(self) -> int:
        """How many nonces are live."""
        with self._lock:
            return len(self._nonces)

    def verify(
        self,
        envelope: SignedEnvelope,
        *,
        expected_sequence: int | None = None,
        expected_digest: bytes | None = None,
    ) -> Accepted:
        """Check an envelope and commit it; raises Rejected.

        On the step path pass the outstanding sequence and the SHA-256 of the request: the answer must match both.
        """
        try:
            check_authentic(
                envelope,
                keyring=self._keyring,
                audience=self.audience,
                issuers=self._issuers,
                max_payload_bytes=self._config.max_payload_bytes,
            )
            self._check_freshness(envelope)
            with self._lock:
                return self._commit(envelope, expected_sequence, expected_digest)
        except Rejected as rejected:
            self.count(rejected.reason)
            raise

    def count(self, reason: str) -> None:
        """Count a rejection; the first of each reason is logged."""
        self._refusals.count(reason)

    def record_outcome(self, nonce: str, outcome: CommandOutcome) -> None:
        """Keep what became of an accepted envelope, for its duplicates."""
        with self._lock:
            receipt = self._nonces.find(nonce)
            if receipt is not None:
                receipt.outcome = outcome

    def outcome_of(self, nonce: str) -> CommandOutcome | None:
        """What became of an accepted envelope, None when it is not known or no longer."""
        with self._lock:
            receipt = self._nonces.find(nonce)
            return receipt.outcome if receipt is not None else None

    def _check_freshness(self, envelope: SignedEnvelope) -> None:
        check_age(envelope, self.now_ns(), PAST_NS)
        if envelope.receiver_epoch != self.receiver_epoch:
            raise Rejected(reasons.WRONG_EPOCH)

    def _commit(self, envelope: SignedEnvelope, sequence: int | None, digest: bytes | None) -> Accepted:
        receipt = self._nonces.find(envelope.nonce)
        if receipt is not None:
            if not hmac.compare_digest(receipt.mac, envelope.mac):
                raise Rejected(reasons.NONCE_REPLAYED)
            return Accepted(envelope.payload, envelope.issuer, envelope.nonce, True, receipt.outcome)
        if envelope.sequence <= self._fences.get(envelope.issuer, 0):
            raise Rejected(reasons.SEQUENCE_REPLAYED)
        if sequence is not None and (envelope.sequence, envelope.request_digest) != (sequence, digest):
            raise Rejected(reasons.SEQUENCE_REPLAYED, "not an answer to the outstanding request")
        if self._nonces.is_full():
            raise Rejected(reasons.LOCAL_LIMIT, "too many commands within the replay window")
        self._fences[envelope.issuer] = envelope.sequence
        self._nonces.add(envelope.nonce, envelope.mac)
        return Accepted(envelope.payload, envelope.issuer, envelope.nonce)
