from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, NamedTuple, Protocol

from esper_rpc.config import Range, validate
from esper_rpc.envelope import reasons
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, EmergencyLevel
from esper_rpc.verdict import MALFORMED, Verdict, failed, rejected
from esper_servers.tolaria.rollback.rollback import FAST, FULL
from esper_servers.tolaria.state.checkpoint_store import StoreConfig
from esper_servers.tolaria.state.snapshot_cache import CacheConfig

from .checkpoints import Checkpoints

ROLLBACK_FAILED = "rollback_failed"
COMMANDED = "commanded"
_ANY_STEP = 2**53
_LONGEST_REASON = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are made of a run, where, and how many are kept."""

    snapshot_every_steps: Annotated[int, Range(0, 1_000_000_000)] = 0
    """In memory; 0 for none."""
    save_every_steps: Annotated[int, Range(0, 1_000_000_000)] = 0
    """On the disk; 0 for none."""
    directory: str = ""
    """Runs have directories of their own in it; empty for `state/trainer/checkpoints` of the home."""
    keep: Annotated[int, Range(1, 1000)] = 3
    part_mb: Annotated[int, Range(1, 1_000_000)] = 1024
    snapshots: Annotated[int, Range(0, 10)] = 5
    memory_mb: Annotated[int, Range(0, 10_000_000)] = 4096

    def __post_init__(self) -> None:
        validate(self)

    @property
    def is_enabled(self) -> bool:
        """Whether any are made without being asked for, so that there is something to go back to."""
        return bool(self.snapshot_every_steps or self.save_every_steps)

    @property
    def needs_directory(self) -> bool:
        """Whether there is a place on the disk."""
        return bool(self.save_every_steps or self.directory)

    @property
    def store(self) -> StoreConfig:
        """For those on the disk."""
        return StoreConfig(keep=self.keep, part_mb=self.part_mb)

    @property
    def cache(self) -> CacheConfig:
        """For those in memory."""
        return CacheConfig(snapshots=self.snapshots, memory_mb=self.memory_mb)


class _Wanted(NamedTuple):
    step: int
    reason: str
    tier: str


class Session(Protocol):
    """Tells how far the run is."""

    epoch: int
    global_step: int


class CheckpointSchedule:
    """Makes checkpoints that are due at the end of a step, and there carries out commands to roll back.

    Not at the safe point: in a step that has begun, alphas and seeds would go on by one step from the checkpoint.
    """

    def __init__(
        self, checkpoints: Checkpoints, session: Session, config: CheckpointConfig, *, rollbacks_per_epoch: int
    ) -> None:
        self._checkpoints = checkpoints
        self._session = session
        self._config = config
        self._limit = rollbacks_per_epoch
        self._asked: Counter[int] = Counter()
        self._waiting: dict[str, _Wanted] = {}
        self._answers: dict[str, Verdict] = {}

    def carry_out(self, command: AdaptationCommand) -> Verdict | None:
        """Take a command at the safe point; None until the step has ended in which it came."""
        if command.command_id in self._answers:
            return self._answers.pop(command.command_id)
        if command.command_id in self._waiting:
            return None
        wanted = _read(command)
        if wanted is None:
            return rejected(MALFORMED)
        if self._asked[self._session.epoch] >= self._limit:
            return rejected(reasons.LOCAL_LIMIT)
        self._asked[self._session.epoch] += 1
        self._waiting[command.command_id] = wanted
        return None

    def end_step(self) -> None:
        """Do what is due between two steps."""
        was_asked = self._checkpoints.step_end.reach()
        for command_id in list(self._waiting):
            self._answers[command_id] = self._roll_back(self._waiting.pop(command_id))
            was_asked = True
        # Whoever asked has what is due, or went back to what there is.
        if was_asked:
            return
        epoch, step = self._session.epoch, self._session.global_step
        if _is_due(step, self._config.save_every_steps) and not self._checkpoints.is_writing:
            self._checkpoints.save(epoch=epoch, step=step)
        elif _is_due(step, self._config.snapshot_every_steps):
            self._checkpoints.snapshot(epoch=epoch, step=step)

    def _roll_back(self, wanted: _Wanted) -> Verdict:
        result = self._checkpoints.roll_back(
            latest_step=min(self._session.global_step, wanted.step),
            reason=wanted.reason,
            severity=EmergencyLevel.EMERGENCY_LEVEL_ELEVATED,
            tier=wanted.tier,
        )
        if result.succeeded:
            return Verdict(CommandOutcome.RESULT_APPLIED, result.tier)
        return failed(ROLLBACK_FAILED)


def _read(command: AdaptationCommand) -> _Wanted | None:
    """Return what it asks for; None when it says more than that, or something that cannot be meant."""
    given = dict(command.rollback_payload.items())
    step, reason, tier = given.pop("step", _ANY_STEP), given.pop("reason", COMMANDED), given.pop("tier", FAST)
    if given or isinstance(step, bool) or not isinstance(step, int | float) or not 0 <= step <= _ANY_STEP:
        return None
    if not isinstance(reason, str) or len(reason) > _LONGEST_REASON or tier not in (FAST, FULL):
        return None
    return _Wanted(int(step), reason, str(tier))


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
