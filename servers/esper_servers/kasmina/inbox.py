from __future__ import annotations

from collections import deque
from typing import NamedTuple

from google.protobuf.message import DecodeError

from esper_rpc import rules, verdict
from esper_rpc.envelope import Rejected, Verifier, reasons
from esper_rpc.envelope.verification import Accepted
from esper_rpc.errors import InvalidRequest
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, CommandType, SeedOperation, SignedEnvelope

from .kernels.library import KernelLibrary
from .progress import Progress
from .telemetry.events import SeedEvents
from .telemetry.notices import WARNING, Tell

MOST_QUEUED = 10_000
"""Commands that wait for a safe point at most; a loop that stands still would gather them without end."""
SUPPORTED = frozenset(
    {CommandType.COMMAND_TYPE_SEED, CommandType.COMMAND_TYPE_PAUSE, CommandType.COMMAND_TYPE_OPTIMIZER}
)


class Queued(NamedTuple):
    """A verified command that waits for a safe point."""

    command: AdaptationCommand
    since: int
    """The global step at which it came."""
    receiver_epoch: bytes = b""
    """The challenge that it was issued for."""
    issuer: str = ""
    """The role that signed it."""


class CommandInbox:
    """Verifies what arrives and queues it, from any thread. What is refused changes nothing."""

    def __init__(
        self, *, verifier: Verifier, library: KernelLibrary, events: SeedEvents, progress: Progress, tell: Tell
    ) -> None:
        self.verifier = verifier
        self._tell = tell
        self._library = library
        self._events = events
        self._progress = progress
        self._queue: deque[Queued] = deque()
        self.supported = set(SUPPORTED)
        """The types of commands that somebody here carries out."""

    def __len__(self) -> int:
        return len(self._queue)

    def receive(
        self, envelope: SignedEnvelope, *, expected_sequence: int | None, request_digest: bytes | None
    ) -> tuple[CommandOutcome, bool]:
        """Verify an envelope and queue its command; tells also whether the identical one had come before."""
        try:
            accepted = self.verifier.verify(
                envelope, expected_sequence=expected_sequence, expected_digest=request_digest
            )
        except Rejected as refusal:
            return self._refuse(envelope.nonce, refusal.reason), False
        if accepted.duplicate:
            return accepted.outcome or self._outcome(verdict.QUEUED, accepted.nonce), True
        outcome = self._enqueue(accepted, envelope.receiver_epoch)
        self.verifier.record_outcome(accepted.nonce, outcome)
        return outcome, False

    def take(self) -> Queued:
        """Take what has waited longest; raises IndexError when nothing waits."""
        return self._queue.popleft()

    def put_back(self, queued: Queued) -> None:
        """Let a command wait for another safe point."""
        self._queue.append(queued)

    def _enqueue(self, accepted: Accepted, receiver_epoch: bytes) -> CommandOutcome:
        command, nonce = _parse(accepted.payload), accepted.nonce
        reason = verdict.MALFORMED if command is None else self._why_not(command, nonce)
        if command is None or reason:
            self.verifier.count(reason)
            return self._refuse(nonce, reason)
        if command.seed_operation.operation == SeedOperation.SEED_OPERATION_GERMINATE:
            self._library.request(command.seed_operation.blueprint_id)
        self._queue.append(Queued(command, self._progress.global_step, receiver_epoch, accepted.issuer))
        return self._outcome(verdict.QUEUED, nonce, command)

    def _why_not(self, command: AdaptationCommand, nonce: str) -> str:
        """Why a well-formed command is refused, empty when it is not."""
        if len(self._queue) >= MOST_QUEUED:
            self._tell("seed_queue_dropped", WARNING, reason=reasons.LOCAL_LIMIT, command_id=command.command_id)
            return reasons.LOCAL_LIMIT
        if command.command_id != nonce:
            return reasons.NONCE_REPLAYED
        return "" if command.command_type in self.supported else reasons.UNSUPPORTED

    def _refuse(self, command_id: str, reason: str) -> CommandOutcome:
        return self._events.settled(self._outcome(verdict.rejected(reason), command_id))

    def _outcome(
        self, what: verdict.Verdict, command_id: str, command: AdaptationCommand | None = None
    ) -> CommandOutcome:
        return what.on(command_id, self._progress.global_step, command)


def _parse(payload: bytes) -> AdaptationCommand | None:
    try:
        command = AdaptationCommand.FromString(payload)
        rules.check(command)
    except (DecodeError, InvalidRequest):
        return None
    return command
