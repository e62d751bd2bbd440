from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from esper_rpc.proto.leyline.v1 import CommandOutcome, SystemStatePacket
from esper_servers.tamiyo.reporting import Reported
from esper_servers.tamiyo.risk.engine import Verdict

MOST_OBSERVATIONS = 16_384
LATENCIES = ("hook_latency_ms", "step_latency_ms")
_SETTLING = frozenset({CommandOutcome.RESULT_APPLIED, CommandOutcome.RESULT_FAILED})
"""What is refused or comes late changed nothing: there is nothing to observe."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What one answered step told of its run."""

    run_id: str
    receiver_epoch: bytes
    epoch: int
    verdict: Verdict
    loss: float | None
    """As told; it may be NaN or infinite."""
    latencies: Mapping[str, float]
    """In milliseconds, by metric; what was not told is absent."""
    decision_us: int
    breaker_moves: int
    """Transitions of the inference breaker since the controller started."""
    outcomes: tuple[CommandOutcome, ...]


@dataclass(frozen=True, slots=True)
class RunClosed:
    """A run ended."""

    run_id: str


class Observations:
    """What was seen of the runs under observation, in order, until it is taken in. Bounded: what is too much is lost.

    A run is watched from the first outcome of a command on; a step of any other run costs one look.
    """

    def __init__(self, capacity: int = MOST_OBSERVATIONS) -> None:
        self._capacity = capacity
        self._noted: deque[Observation | RunClosed] = deque()
        self.watched: set[str] = set()
        self.breaker_moves = 0
        self.lost = 0

    def __len__(self) -> int:
        return len(self._noted)

    def note(self, reported: Reported) -> None:
        """Keep a step, if its run is watched or it tells what became of a command. Not for the step path."""
        run_id, outcomes = reported.step.run_id, _settled(reported)
        if not outcomes and run_id not in self.watched:
            return
        self.watched.add(run_id)
        self._keep(_observe(reported, outcomes, self.breaker_moves))

    def take_over(self, seen: Iterable[Observation | RunClosed]) -> None:
        """Keep what another process has seen."""
        for each in seen:
            if isinstance(each, Observation):
                self.watched.add(each.run_id)
            self._keep(each)

    def watch_only(self, run_ids: AbstractSet[str]) -> None:
        """Watch no more runs than these, and those of which something waits to be taken."""
        self.watched &= run_ids | {seen.run_id for seen in self._noted}

    def note_closed(self, run_id: str) -> None:
        """Keep that a run ended."""
        if run_id in self.watched:
            self._keep(RunClosed(run_id))

    def note_breaker(self) -> None:
        """Count a transition of the inference breaker."""
        self.breaker_moves += 1

    def take(self, most: int) -> Iterator[Observation | RunClosed]:
        """Take the oldest out."""
        for _ in range(min(most, len(self._noted))):
            yield self._noted.popleft()

    def _keep(self, seen: Observation | RunClosed) -> None:
        if len(self._noted) < self._capacity:
            self._noted.append(seen)
        else:
            self.lost += 1


def _settled(reported: Reported) -> tuple[CommandOutcome, ...]:
    return tuple(outcome for outcome in reported.step.outcomes if outcome.result in _SETTLING and outcome.command_id)


def _observe(reported: Reported, outcomes: tuple[CommandOutcome, ...], breaker_moves: int) -> Observation:
    packet = reported.step.packet
    told = packet.training_metrics
    return Observation(
        run_id=reported.step.run_id,
        receiver_epoch=reported.run.request.receiver_epoch,
        epoch=packet.current_epoch,
        verdict=reported.verdict,
        loss=_loss(packet),
        latencies={name: told[name] for name in LATENCIES if name in told and math.isfinite(told[name])},
        decision_us=reported.ledger.total_us,
        breaker_moves=breaker_moves,
        outcomes=outcomes,
    )


def _loss(packet: SystemStatePacket) -> float | None:
    """The loss of the step, else that on the training set, else that on the validation set."""
    if "loss" in packet.training_metrics:
        return packet.training_metrics["loss"]
    if packet.HasField("training_loss"):
        return packet.training_loss
    return packet.validation_loss if packet.HasField("validation_loss") else None
