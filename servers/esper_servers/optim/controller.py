from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from esper_rpc.breaker import BreakerConfig, CircuitBreaker
from esper_rpc.config import Range, validate
from esper_rpc.errors import ConfigError, FailedPrecondition, InvalidRequest
from esper_rpc.proto.leyline.v1 import CircuitState

from . import groups, rates, telemetry
from .plateau import Plateau
from .rebuild import Joining, OptimizerChange, rebuild
from .schedules import LEAST_RATE, Constant, Frozen, Schedule, adaptive_of, ramp

JOINING_SHARE: Final = 0.1
"""The rate of parameters that join, as a share of the base."""
LEAST_TOTAL: Final = 0.01
"""All multipliers of the mesh together go no lower; each single one is limited by the host."""
MOST_TOTAL: Final = 4.0
SCHEDULE, MESH, PLATEAU, JOINED, LEFT, RESTORED = "schedule", "mesh", "plateau", "joined", "left", "restored"
"""Why rates changed, in a snapshot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRateConfig:
    """How the controller treats what joins, and how much it remembers."""

    least_rate: Annotated[float, Range(0.0, 1.0)] = LEAST_RATE
    epoch_steps: Annotated[int, Range(1, 10**9)] = 1
    """Calls of `step` in an epoch: 1 where it is called once an epoch, as schedulers often are."""
    warm_up_epochs: Annotated[int, Range(0, 10**6)] = 10
    """How long parameters that join are warmed up."""
    warm_up_factor: Annotated[float, Range(0.0, 1.0)] = 0.01
    snapshots: Annotated[int, Range(1, 10**6)] = 1000
    breaker: BreakerConfig = dataclasses.field(default_factory=lambda: BreakerConfig(failures=3))

    def __post_init__(self) -> None:
        validate(self)


class Snapshot(NamedTuple):
    """The rates of all groups after a change, and its cause."""

    step: int
    cause: str
    total: float
    rates: tuple[float, ...]


@dataclass(slots=True, eq=False)
class _Rule:
    """How the rate of one group comes about."""

    base: float
    schedule: Schedule
    plateau: Plateau = dataclasses.field(default_factory=Plateau)
    joined_at: int | None = None
    """The step at which the mesh had it join; None for a group of the user."""
    rate: float = math.nan
    """What the controller wrote last."""


class UnifiedLRController:
    """The only one who changes the learning rates of an optimizer (invariants L1 to L3 of requirements 3.5).

    Every group has a schedule. On top come the multiplier of the mesh and the warm-up of what joined. What others
    change is noticed at the next `step`, told, and undone. It is a LearningRateAuthority for a seed host, which calls
    `step` after optimizer.step(). Use it from the training thread.

    Raises:
        ConfigError: When a scheduler drives the optimizer, a group has no rate, or there are not as many schedules as
            groups.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        schedule: Schedule | Sequence[Schedule] | None = None,
        config: LearningRateConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config or LearningRateConfig()
        self._optimizer = optimizer
        self._rules: dict[Tensor, _Rule] = {}
        self._apart: list[Optimizer] = []
        self._serves_ranks = False
        self._observed: list[float] = []
        self.total = 1.0
        """The product of all multipliers."""
        self.violations = 0
        """Changes by others that were undone."""
        self.history: deque[Snapshot] = deque(maxlen=self.config.snapshots)
        self.breaker = CircuitBreaker(config=self.config.breaker, clock=clock, on_transition=telemetry.breaker_moved)
        self._step = 0
        self._govern(schedule)
        self._write(SCHEDULE)

    @property
    def rates(self) -> tuple[float, ...]:
        """The rate of each group, as the controller wrote it last."""
        return tuple(rule.rate for _, rule in self._governed())

    @property
    def is_conservative(self) -> bool:
        """Whether somebody else keeps changing rates, so that the mesh may not."""
        return self.breaker.state != CircuitState.CIRCUIT_STATE_CLOSED

    def serve_ranks(self) -> None:
        """Serve one of several ranks that train a model, whose rates must be the same in each step.

        What joins learns in an optimizer of its own, by `step`: that of the user steps before the gradients of seeds
        are averaged. What is observed waits until the ranks agree on it.
        """
        self._serves_ranks = True

    def step(self) -> None:
        """End a step: undo what others changed, then go on to the next rates."""
        self.check()
        for optimizer in self._apart:
            optimizer.step()
        self._step += 1
        self._write(SCHEDULE)

    def check(self) -> int:
        """Undo every change that is not the controller's; returns how many groups had one (L1, L3)."""
        changed = [(index, *found) for index, found in enumerate(self._governed()) if self._is_changed(*found)]
        for index, group, rule in changed:
            telemetry.violation(index, group, expected=rule.rate, is_loud=not self.is_conservative)
            rates.write(group, rule.rate)
        self.violations += len(changed)
        if self.breaker.allow():
            (self.breaker.record_failure if changed else self.breaker.record_success)()
        if changed:
            self._remember(RESTORED)
        return len(changed)

    def observe(self, loss: float) -> None:
        """Let adaptive schedules know the loss of an evaluation; of several ranks, at the end of the step its mean."""
        if self._serves_ranks:
            self._observed.append(loss)
        else:
            self.settle(loss)

    def take_observed(self) -> tuple[int, float]:
        """Return how many losses were observed on this rank since the last step, and their sum."""
        found, self._observed = self._observed, []
        return len(found), math.fsum(found)

    def settle(self, loss: float) -> None:
        """Go on from a loss that all ranks agree on."""
        adaptive = {rule: found for _, rule in self._governed() if (found := adaptive_of(rule.schedule))}
        if not adaptive:
            return
        self.check()
        for rule, schedule in adaptive.items():
            rule.plateau = rule.plateau.after(loss, schedule)
        self._write(PLATEAU)

    def scale(self, multiplier: float) -> bool:
        """Multiply every learning rate; False, with nothing changed, when that is too far or the breaker is open."""
        total = self.total * multiplier
        if self.is_conservative or not LEAST_TOTAL <= total <= MOST_TOTAL:
            return False
        self.follow(multiplier)
        return True

    def follow(self, multiplier: float) -> None:
        """Multiply every learning rate, as the first of several ranks has decided."""
        self.check()
        self.total *= multiplier
        self._write(MESH)

    def adopt(self, module: nn.Module) -> None:
        """Train the parameters of a fossilised seed, at 10 % of the base rate after a warm-up."""
        present = {each for optimizer in self._optimizers for each in groups.held(optimizer)}
        parameters = [each for each in groups.trainable(module) if each not in present]
        if parameters and self._serves_ranks:
            self._join_apart(parameters)
        elif parameters:
            leader = self._leader()
            joining = Joining(parameters=parameters, rate=leader.base * JOINING_SHARE)
            self.rebuild(OptimizerChange(joining=[joining]))

    def release(self, module: nn.Module) -> None:
        """Train the parameters of an adopted seed no longer; a module that was not adopted is left alone."""
        present = groups.held(self._optimizer)
        leaving = [each for each in module.parameters() if each in present]
        if leaving:
            self.rebuild(OptimizerChange(leaving=leaving))
        elif self._apart:
            self._leave_apart(module)

    def rebuild(self, change: OptimizerChange) -> None:
        """Change which parameters are trained; all others keep what is remembered of them (L2). All or nothing.

        `rate` of what joins is its base: it warms up to that, and follows the schedule of the first group that learns,
        or none where the whole model is frozen.

        Raises:
            InvalidRequest, FailedPrecondition: See `rebuild`; nothing was changed.
        """
        self.check()
        before, leader = list(self._governed()), self._leader()
        like = next(group for group, rule in before if rule is leader)
        rebuild(self._optimizer, change, like=self._place(like))
        # A group may have another first parameter than before.
        self._rules = {group["params"][0]: rule for group, rule in before if group["params"]}
        for joining in change.joining:
            self._rules[joining.parameters[0]] = self._joined(joining.rate, leader)
        self._write(JOINED if change.joining else LEFT)

    def metrics(self) -> dict[str, float]:
        """Return what a step may tell of the optimizer: its rate, and its momentum if it has one."""
        leader = self._leader()
        group = next(group for group, rule in self._governed() if rule is leader)
        found = {"optimizer_lr": leader.rate}
        momentum = group.get("momentum", (group.get("betas") or (None,))[0])
        return found if momentum is None else found | {"optimizer_momentum": float(momentum)}

    def gauges(self) -> dict[str, float]:
        """Return how it stands, by the names of the design."""
        found = {"rate": self._leader().rate, "multiplier": self.total, "violations": float(self.violations)}
        found["breaker_state"] = float(self.breaker.state)
        return {f"tolaria.lr_controller.{name}": value for name, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside the optimizer, as plain values. Schedules are not in it."""
        return {
            "step": self._step,
            "total": self.total,
            "groups": [
                {"base": rule.base, "joined_at": rule.joined_at, "plateau": dataclasses.asdict(rule.plateau)}
                for _, rule in self._governed()
            ],
            "apart": [optimizer.state_dict() for optimizer in self._apart],
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise FailedPrecondition when it is of a training without a controller."""
        if "groups" not in state:
            raise FailedPrecondition(
                "The checkpoint is of a training without a UnifiedLRController: attach without one (learning_rate=) to"
                " resume it. To train on under a controller, load the model and its optimizer alone into a new run."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it, after what had joined has joined again; the optimizer is restored before or after.

        Raises:
            FailedPrecondition: When it is of a training without a controller.
            InvalidRequest: When the optimizer has another number of groups.
        """
        self.check_state(state)
        rules = [rule for _, rule in self._governed()]
        if len(state["groups"]) != len(rules):
            raise InvalidRequest(f"The state is of {len(state['groups'])} groups, the optimizer has {len(rules)}.")
        self._step, self.total = state["step"], state["total"]
        for rule, saved in zip(rules, state["groups"], strict=True):
            rule.base, rule.joined_at = saved["base"], saved["joined_at"]
            rule.plateau, rule.rate = Plateau(**saved["plateau"]), math.nan
        for optimizer, kept in zip(self._apart, state.get("apart", ()), strict=False):
            optimizer.load_state_dict(kept)
        self._write(RESTORED)

    def _govern(self, schedule: Schedule | Sequence[Schedule] | None) -> None:
        found = [group for group in self._optimizer.param_groups if group["params"]]
        schedules = _for_each(schedule, found)
        for index, (group, each) in enumerate(zip(found, schedules, strict=True)):
            if "initial_lr" in group:
                raise ConfigError(
                    "A scheduler drives this optimizer. Give its schedule to the controller instead, and make the"
                    " optimizer anew, or attach without a controller."
                )
            base = rates.read(group)
            if not base >= 0:
                raise ConfigError(f"Group {index} of the optimizer has no learning rate.")
            self._rules[group["params"][0]] = _Rule(base, each)

    def _governed(self) -> Iterator[tuple[dict[str, Any], _Rule]]:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if group["params"]:
                    yield group, self._rule_of(group)

    def _rule_of(self, group: dict[str, Any]) -> _Rule:
        rule = self._rules.get(group["params"][0])
        if rule is None:
            # The user's own add_param_group: it is held at what it came with.
            rate = rates.read(group)
            base = rate / self.total if rate >= 0 else 0.0
            rule = self._rules[group["params"][0]] = _Rule(base, Constant(), rate=rate)
            telemetry.group_found(base)
        return rule

    @property
    def _optimizers(self) -> tuple[Optimizer, ...]:
        return (self._optimizer, *self._apart)

    def _join_apart(self, parameters: list[nn.Parameter]) -> None:
        self.check()
        leader = self._leader()
        like = next(group for group, rule in self._governed() if rule is leader)
        self._apart.append(groups.alone(self._optimizer, parameters, like=like, rate=leader.base * JOINING_SHARE))
        self._rules[parameters[0]] = self._joined(leader.base * JOINING_SHARE, leader)
        self._write(JOINED)

    def _leave_apart(self, module: nn.Module) -> None:
        released = set(module.parameters())
        for optimizer in self._apart:
            groups.take_out(optimizer, released)
        self._apart = [optimizer for optimizer in self._apart if optimizer.param_groups]
        self._rules = {first: rule for first, rule in self._rules.items() if first not in released}
        self._write(LEFT)

    def _joined(self, rate: float, leader: _Rule) -> _Rule:
        schedule = Constant() if isinstance(leader.schedule, Frozen) else leader.schedule
        return _Rule(rate, schedule, plateau=leader.plateau, joined_at=self._step)

    def _leader(self) -> _Rule:
        """The rule that what joins follows: of the first group that learns."""
        rules = [rule for _, rule in self._governed()]
        return min(rules, key=lambda rule: (rule.joined_at is not None, isinstance(rule.schedule, Frozen)))

    def _place(self, group: dict[str, Any]) -> int:
        return next(index for index, each in enumerate(self._optimizer.param_groups) if each is group)

    def _is_changed(self, group: dict[str, Any], rule: _Rule) -> bool:
        return not rates.is_same(rates.read(group), rule.rate)

    def _rate(self, rule: _Rule) -> float:
        if isinstance(rule.schedule, Frozen):
            return 0.0
        rate = rule.schedule.rate(rule.base, self._step) * self.total
        rate *= rule.plateau.share
        if rule.joined_at is not None:
            steps = self.config.warm_up_epochs * self.config.epoch_steps
            rate *= ramp(self._step - rule.joined_at, steps, self.config.warm_up_factor)
        return max(rate, min(rule.base, self.config.least_rate))

    def _write(self, cause: str) -> None:
        for group, rule in self._governed():
            rate = self._rate(rule)
            # Not again: a rate on a device costs a call for each.
            if rate != rule.rate:
                rates.write(group, rate)
            rule.rate = rate
        self._remember(cause)

    def _remember(self, cause: str) -> None:
        self.history.append(Snapshot(self._step, cause, self.total, self.rates))


def _for_each(schedule: Schedule | Sequence[Schedule] | None, found: Sequence[object]) -> Iterable[Schedule]:
    if not isinstance(schedule, Sequence):
        return [schedule or Constant()] * len(found)
    if len(schedule) != len(found):
        raise ConfigError(f"There are {len(schedule)} schedules for {len(found)} groups of the optimizer.")
    return schedule
