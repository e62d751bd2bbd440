from __future__ import annotations

import hashlib
import math
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import orjson
import structlog
import torch
from google.protobuf.message import DecodeError
from torch import Tensor, nn

from esper_client.seed_host import RunDescription
from esper_rpc import rules
from esper_rpc.envelope import Keyring, Rejected, Verifier, reasons
from esper_rpc.errors import DataLoss, FailedPrecondition, InvalidRequest, NotFound
from esper_rpc.proto.kasmina.v1 import SeedEvent
from esper_rpc.proto.leyline.v1 import (
    AdaptationCommand,
    CommandOutcome,
    CommandType,
    MetricPoint,
    SeedLifecycleStage,
    SeedOperation,
    SeedState,
    SignedEnvelope,
    TelemetryLevel,
    TelemetryPacket,
)
from esper_rpc.proto.urza.v1 import KernelManifest
from esper_servers.blueprints.catalogue import BlueprintFactory
from esper_servers.blueprints.extras import describe_module
from esper_servers.blueprints.kernel import KernelRejected, instantiate

from . import lifecycle
from .alpha import SCHEDULES, AlphaSchedule
from .export import without_sites
from .kernel_library import Kernel, KernelLibrary
from .learning_rate import LearningRateAuthority
from .limits import LocalLimits
from .seed_slot import SeedSlot
from .site import Site

log = structlog.get_logger(__name__)

EMBARGO_STEPS = 100
KERNEL_WAIT_STEPS = 200
# The controller asks for the next stage at this alpha; float32 on the wire must not fall below it.
FULL_ALPHA = 0.98
ILLEGAL_TRANSITION = "illegal_transition"
UNKNOWN_SEED = "unknown_seed"
GATE_NOT_FINITE = "g1_gradient_health"
GATE_ALPHA = "g2_stability"
MALFORMED = "malformed_payload"
GATE_IMPACT = "g4_system_impact"
KERNEL_LATE = "kernel_late"
BUILD_FAILED = "build_failed"
SEED_FAILED = "seed_failed"
SHAPE_MISMATCH = "shape_mismatch"
LOSS_SMOOTHING = 0.1
# A tenth and a little, so that a loss near zero is not judged by its noise.
LOSS_TOLERANCE = 0.1
LOSS_MARGIN = 0.02
DEFAULT_PAUSE_MS = 1000

Listener = Callable[[SeedEvent | None], None]
"""Gets None when the host closes."""


class InProcessSeedHost:
    """Seeds in a model of this process. `submit` may be called from any thread, the rest from the training thread."""

    def __init__(
        self,
        *,
        model: nn.Module,
        sites: Mapping[str, Site],
        keyring: Keyring,
        audience: str,
        library: KernelLibrary,
        factories: Mapping[str, BlueprintFactory],
        learning_rate: LearningRateAuthority,
        limits: LocalLimits | None = None,
        has_training_thread: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._sites = dict(sites)
        self._has_training_thread = has_training_thread
        self._at_safe_point: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._epoch_bytes = os.urandom(16)
        self.verifier = Verifier(keyring=keyring, audience=audience, receiver_epoch=self._epoch_bytes)
        self._library = library
        self._factories = factories
        self._learning_rate = learning_rate
        self._limits = limits or LocalLimits()
        self._clock = clock
        self._lock = threading.RLock()
        self.seeds = {
            f"seed-{site_id}": SeedSlot(seed_id=f"seed-{site_id}", site_id=site_id, site=site, depth=depth)
            for depth, (site_id, site) in enumerate(sites.items())
        }
        self._pending: deque[tuple[AdaptationCommand, int]] = deque()
        self._pauses: deque[float] = deque()
        self._loss = math.nan
        self.global_step = 0
        self.recent_outcomes: deque[CommandOutcome] = deque(maxlen=64)
        self._listeners: list[Listener] = []
        self._topology = orjson.dumps(describe_module(model))

    @property
    def receiver_epoch(self) -> bytes:
        """The challenge of this start."""
        return self._epoch_bytes

    @property
    def queued_commands(self) -> int:
        """Commands that wait for a safe point."""
        return len(self._pending)

    def describe(self) -> RunDescription:
        """Describe the model as it is at present."""
        with self._lock:
            slots = list(self.seeds.values())
            return RunDescription(
                tuple(s.run_site() for s in slots), tuple(s.run_seed() for s in slots), self._topology
            )

    def submit(
        self,
        envelope: SignedEnvelope,
        *,
        expected_sequence: int | None = None,
        request_digest: bytes | None = None,
    ) -> CommandOutcome:
        """Verify a command and queue it; a refusal is an outcome, and changes nothing."""
        return self.receive(envelope, expected_sequence=expected_sequence, request_digest=request_digest)[0]

    def receive(
        self,
        envelope: SignedEnvelope,
        *,
        expected_sequence: int | None = None,
        request_digest: bytes | None = None,
    ) -> tuple[CommandOutcome, bool]:
        """Like `submit`, and tell whether the identical envelope had come before."""
        try:
            accepted = self.verifier.verify(
                envelope, expected_sequence=expected_sequence, expected_digest=request_digest
            )
        except Rejected as rejected:
            return self._reject(envelope.nonce, rejected.reason), False
        if accepted.duplicate:
            return accepted.outcome or self._outcome(accepted.nonce, CommandOutcome.RESULT_QUEUED), True
        outcome = self._enqueue(accepted.payload, accepted.nonce)
        self.verifier.record_outcome(accepted.nonce, outcome)
        return outcome, False

    def observe(self, loss: float, global_step: int) -> None:
        """Note the loss of the step that just ended."""
        known = math.isfinite(self._loss) and math.isfinite(loss)
        self._loss = self._loss + LOSS_SMOOTHING * (loss - self._loss) if known else loss
        self.global_step = global_step

    def apply_pending(self) -> list[CommandOutcome]:
        """Carry out what is queued, at the safe point."""
        outcomes = []
        with self._lock:
            for _ in range(len(self._pending)):
                command, queued_at = self._pending.popleft()
                outcome = self._apply(command, queued_at)
                if outcome is None:
                    self._pending.append((command, queued_at))
                    continue
                self.verifier.record_outcome(command.command_id, outcome)
                outcomes.append(self._remember(outcome))
        while self._at_safe_point:
            _run(*self._at_safe_point.popleft())
        return outcomes

    def at_safe_point(self, work: Callable[[], Any]) -> Future[Any]:
        """Do work that changes the model: by the training thread at its next safe point, or at once without one."""
        done: Future[Any] = Future()
        if self._has_training_thread:
            self._at_safe_point.append((work, done))
        else:
            _run(work, done)
        return done

    def advance_alphas(self) -> None:
        """Move every blending seed one step on."""
        with self._lock:
            for slot in self.seeds.values():
                if slot.stage == lifecycle.BLENDING and not slot.site.paused:
                    slot.advance_alpha()

    def advance_alpha(self, seed_id: str) -> float:
        """Move one seed on; raises NotFound or FailedPrecondition."""
        with self._lock:
            slot = self.seeds.get(seed_id)
            if slot is None:
                raise NotFound(f"There is no seed {seed_id!r}.")
            if slot.stage != lifecycle.BLENDING:
                raise FailedPrecondition(f"Seed {seed_id!r} is not blending.")
            return slot.advance_alpha()

    def finalize_step(self, step_index: int) -> list[TelemetryPacket]:
        """Step the seeds' optimizers, let time pass for them, and return their packets."""
        packets = []
        with self._lock:
            self.global_step = max(self.global_step, step_index)
            self._learning_rate.step()
            for slot in self.seeds.values():
                self._finalize(slot)
                if slot.stage in lifecycle.LIVE or slot.stage == lifecycle.FOSSILIZED:
                    packets.append(self._packet(slot, step_index))
        packets.append(self._global_packet(step_index))
        return packets

    def export_seed_states(self) -> list[SeedState]:
        """Return the state of every seed."""
        with self._lock:
            return [slot.state(self._loss) for slot in self.seeds.values()]

    def update_epoch(self, epoch: int) -> None:
        """Let live seeds age."""
        with self._lock:
            for slot in self.seeds.values():
                if slot.stage in lifecycle.LIVE:
                    slot.age_epochs += 1

    def set_clock_offset(self, offset_ns: int) -> None:
        """Set the issuer's wall clock minus our monotonic clock."""
        self.verifier.set_clock_offset(offset_ns)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call a function at every event, from whatever thread it happens in; returns how to stop."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def state_dict(self) -> dict[str, Any]:
        """Return seeds, stages, alphas and optimizers."""
        with self._lock:
            seeds = {seed_id: slot.state_dict() for seed_id, slot in self.seeds.items()}
            return {
                "version": 1,
                "loss": self._loss,
                "learning_rate": self._learning_rate.state_dict(),
                "seeds": seeds,
                "digests": {seed_id: digest(seed["module"] or {}) for seed_id, seed in seeds.items()},
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, before the user restores the optimizer. All or nothing.

        Raises:
            InvalidRequest: When the checkpoint is of other seeds.
            DataLoss: When the weights of a seed are not those that were saved.
            FailedPrecondition: When a blueprint is not installed, or a seed is fossilised here already.
        """
        with self._lock:
            self._check(state)
            modules = {seed_id: self._rebuild(self.seeds[seed_id], saved) for seed_id, saved in state["seeds"].items()}
            self._loss = state["loss"]
            for seed_id, saved in state["seeds"].items():
                self._restore(self.seeds[seed_id], saved, modules[seed_id])
            self._learning_rate.load_state_dict(state["learning_rate"])

    def export(self) -> nn.Module:
        """Return a plain copy: each site is its host, followed by its seed if that is fossilised."""
        with self._lock:
            return without_sites(self._model, self._sites.values())

    def close(self) -> None:
        """End those who listen, and those who wait for a safe point that will not come."""
        for listener in list(self._listeners):
            listener(None)
        self._listeners.clear()
        while self._at_safe_point:
            self._at_safe_point.popleft()[1].cancel()

    def _enqueue(self, payload: bytes, nonce: str) -> CommandOutcome:
        try:
            command = AdaptationCommand.FromString(payload)
            rules.check(command)
        except (DecodeError, InvalidRequest):
            return self._reject(nonce, MALFORMED)
        if command.command_id != nonce:
            return self._reject(nonce, reasons.NONCE_REPLAYED)
        if command.command_type not in _SUPPORTED:
            return self._reject(nonce, reasons.UNSUPPORTED)
        operation = command.seed_operation
        if operation.operation == SeedOperation.SEED_OPERATION_GERMINATE:
            self._library.request(operation.blueprint_id)
        self._pending.append((command, self.global_step))
        return self._outcome(nonce, CommandOutcome.RESULT_QUEUED, command=command)

    def _reject(self, command_id: str, reason: str) -> CommandOutcome:
        if reason not in self.verifier.rejections or reason in (reasons.UNSUPPORTED, MALFORMED, reasons.LOCAL_LIMIT):
            self.verifier.count(reason)
        return self._remember(self._outcome(command_id, CommandOutcome.RESULT_REJECTED, reason))

    def _outcome(
        self,
        command_id: str,
        result: CommandOutcome.Result.ValueType,
        reason: str = "",
        command: AdaptationCommand | None = None,
    ) -> CommandOutcome:
        outcome = CommandOutcome(command_id=command_id, result=result, reason=reason, global_step=self.global_step)
        if command is not None:
            outcome.seed_id = command.target_seed_id
            outcome.operation = command.seed_operation.operation
        return outcome

    def _remember(self, outcome: CommandOutcome) -> CommandOutcome:
        self.recent_outcomes.append(outcome)
        slot = self.seeds.get(outcome.seed_id)
        stage = slot.stage if slot is not None else lifecycle.DORMANT
        self._emit(outcome.seed_id, stage, stage, outcome.reason, outcome.command_id, outcome)
        return outcome

    def _emit(
        self,
        seed_id: str,
        before: SeedLifecycleStage.ValueType,
        after: SeedLifecycleStage.ValueType,
        reason: str,
        command_id: str = "",
        outcome: CommandOutcome | None = None,
    ) -> None:
        if not self._listeners:
            return
        event = SeedEvent(
            seed_id=seed_id, from_stage=before, to_stage=after, reason=reason, command_id=command_id,
            global_step=self.global_step, outcome=outcome,
        )  # fmt: skip
        event.occurred_at.GetCurrentTime()
        for listener in list(self._listeners):
            listener(event)

    def _apply(self, command: AdaptationCommand, queued_at: int) -> CommandOutcome | None:
        if command.command_type == CommandType.COMMAND_TYPE_PAUSE:
            return self._pause(command)
        if command.command_type == CommandType.COMMAND_TYPE_OPTIMIZER:
            return self._adjust_optimizer(command)
        slot = self.seeds.get(command.target_seed_id)
        if slot is None:
            return self._outcome(command.command_id, CommandOutcome.RESULT_FAILED, UNKNOWN_SEED, command)
        target = lifecycle.target_of(command.seed_operation.operation, slot.stage)
        if target is None:
            return self._outcome(command.command_id, CommandOutcome.RESULT_REJECTED, ILLEGAL_TRANSITION, command)
        if target == lifecycle.GERMINATED:
            return self._germinate(slot, command, queued_at)
        failed, has_failed = self._gate(slot, target)
        if failed:
            if has_failed:
                self._cull(slot, failed, command.command_id)
            return self._outcome(command.command_id, CommandOutcome.RESULT_FAILED, failed, command)
        self._move(slot, target, command)
        return self._outcome(command.command_id, CommandOutcome.RESULT_APPLIED, command=command)

    def _germinate(self, slot: SeedSlot, command: AdaptationCommand, queued_at: int) -> CommandOutcome | None:
        found = self._library.get(command.seed_operation.blueprint_id)
        if found is None and self.global_step - queued_at < KERNEL_WAIT_STEPS:
            return None
        limited = sum(s.stage in lifecycle.LIVE for s in self.seeds.values()) >= self._limits.live_seeds
        if limited:
            return self._over_limit(command)
        before = slot.stage
        slot.move(lifecycle.GERMINATED)
        self._emit(slot.seed_id, before, slot.stage, "germinate", command.command_id)
        reason = self._plant(slot, command, found) if isinstance(found, Kernel) else (found or KERNEL_LATE)
        if reason == reasons.LOCAL_LIMIT:
            self.verifier.count(reason)
        if reason:
            self._cull(slot, reason, command.command_id)
            return self._outcome(command.command_id, CommandOutcome.RESULT_FAILED, reason, command)
        return self._outcome(command.command_id, CommandOutcome.RESULT_APPLIED, command=command)

    def _plant(self, slot: SeedSlot, command: AdaptationCommand, kernel: Kernel) -> str:
        try:
            module = self._build(slot, kernel, seed=uuid.UUID(command.command_id).int)
            reason = _trial(module, slot.site)
        except KernelRejected as rejected:
            return rejected.reason
        except Exception as error:  # noqa: BLE001  # A blueprint is foreign code; whatever it raises, the training goes on.
            log.warning("blueprint_failed", seed_id=slot.seed_id, error=str(error))
            return BUILD_FAILED
        added = sum(p.numel() for p in module.parameters()) + sum(s.parameter_count for s in self.seeds.values())
        if added > self._limits.added_parameters:
            return reasons.LOCAL_LIMIT
        if not reason:
            blueprint = kernel.blueprint
            slot.plant(module, blueprint.descriptor.blueprint_id, blueprint.extras_digest)
            slot.manifest = blueprint.manifest.SerializeToString()
            slot.risk = blueprint.descriptor.risk
        return reason

    def _build(self, slot: SeedSlot, kernel: Kernel, *, seed: int) -> nn.Module:
        return instantiate(
            kernel.blueprint.manifest,
            self._factories,
            feature_shape=slot.site.output_shape,
            dtype=slot.site.dtype,
            device=slot.site.device,
            weights=kernel.weights,
            seed=seed,
        )

    def _gate(self, slot: SeedSlot, target: SeedLifecycleStage.ValueType) -> tuple[str, bool]:
        """Why a move must not be made, empty when it may, and whether the seed has failed or is only too early."""
        if target in (lifecycle.CULLED, slot.stage):
            return "", False
        if slot.has_failed() or not slot.has_finite_weights():
            return SEED_FAILED if slot.site.failure else GATE_NOT_FINITE, True
        if target == lifecycle.BLENDING and not slot.updates and slot.optimizer is not None:
            return GATE_NOT_FINITE, False
        if target == lifecycle.SHADOWING and slot.site.alpha < FULL_ALPHA:
            return GATE_ALPHA, False
        before = slot.loss_at_graft
        if target == lifecycle.FOSSILIZED and before is not None:
            # Written so that a loss that is not a number fails.
            passed = self._loss <= before + LOSS_TOLERANCE * abs(before) + LOSS_MARGIN
            return ("", False) if passed else (GATE_IMPACT, True)
        return "", False

    def _move(self, slot: SeedSlot, target: SeedLifecycleStage.ValueType, command: AdaptationCommand) -> None:
        if target == lifecycle.CULLED:
            self._cull(slot, "commanded", command.command_id)
            return
        before = slot.stage
        if target != before:
            slot.move(target)
        else:
            slot.is_fine_tuning = True
        if target == lifecycle.BLENDING:
            slot.schedule = _schedule_of(command)
            slot.loss_at_graft = self._loss if math.isfinite(self._loss) else None
        if target == lifecycle.FOSSILIZED and slot.site.seed is not None:
            slot.optimizer = None
            self._learning_rate.adopt(slot.site.seed)
        self._emit(slot.seed_id, before, target, "commanded", command.command_id)

    def _cull(self, slot: SeedSlot, reason: str, command_id: str = "") -> None:
        before = slot.stage
        slot.move(lifecycle.CULLED)
        slot.uproot()
        slot.embargo_left = EMBARGO_STEPS
        self._emit(slot.seed_id, before, slot.stage, reason, command_id)

    def _finalize(self, slot: SeedSlot) -> None:
        slot.steps_in_stage += 1
        if slot.site.paused and self._clock() >= slot.paused_until:
            slot.site.paused = False
        slot.step_optimizer()
        if slot.stage in lifecycle.LIVE and slot.has_failed():
            self._cull(slot, SEED_FAILED if slot.site.failure else GATE_NOT_FINITE)
        else:
            self._recover(slot)

    def _recover(self, slot: SeedSlot) -> None:
        """Culled, embargoed, reset, dormant: the moves that need no command."""
        if slot.stage == lifecycle.EMBARGOED:
            slot.embargo_left -= 1
        onward = {
            lifecycle.CULLED: lifecycle.EMBARGOED,
            lifecycle.EMBARGOED: lifecycle.RESETTING if slot.embargo_left <= 0 else None,
            lifecycle.RESETTING: lifecycle.DORMANT,
        }.get(slot.stage)
        if onward is not None:
            before = slot.stage
            slot.move(onward)
            self._emit(slot.seed_id, before, onward, "recovery")

    def _pause(self, command: AdaptationCommand) -> CommandOutcome:
        now = self._clock()
        while self._pauses and self._pauses[0] <= now - 60:
            self._pauses.popleft()
        if len(self._pauses) >= self._limits.pauses_per_minute:
            return self._over_limit(command)
        wanted = command.target_seed_id
        # Without a target all that grow: a fossil is a part of the model.
        targets = [s for s in self.seeds.values() if s.seed_id == wanted or (not wanted and s.stage in lifecycle.LIVE)]
        if wanted and not targets:
            return self._outcome(command.command_id, CommandOutcome.RESULT_FAILED, UNKNOWN_SEED, command)
        self._pauses.append(now)
        # A pause unit is one millisecond; the command's deadline says how many.
        units = min(command.execution_deadline_ms or DEFAULT_PAUSE_MS, self._limits.max_pause_ms)
        for slot in targets:
            slot.site.paused, slot.paused_until = True, now + units / 1000
        return self._outcome(command.command_id, CommandOutcome.RESULT_APPLIED, command=command)

    def _adjust_optimizer(self, command: AdaptationCommand) -> CommandOutcome:
        wanted = command.optimizer_adjustment.hyperparameters
        if set(wanted) != {"learning_rate_multiplier"}:
            return self._outcome(command.command_id, CommandOutcome.RESULT_REJECTED, reasons.UNSUPPORTED, command)
        multiplier = wanted["learning_rate_multiplier"]
        least, most = self._limits.learning_rate_multiplier
        if not least <= multiplier <= most or not self._learning_rate.scale(multiplier):
            return self._over_limit(command)
        return self._outcome(command.command_id, CommandOutcome.RESULT_APPLIED, command=command)

    def _over_limit(self, command: AdaptationCommand) -> CommandOutcome:
        self.verifier.count(reasons.LOCAL_LIMIT)
        return self._outcome(command.command_id, CommandOutcome.RESULT_REJECTED, reasons.LOCAL_LIMIT, command)

    def _check(self, state: dict[str, Any]) -> None:
        if set(state["seeds"]) != set(self.seeds):
            raise InvalidRequest(f"The checkpoint holds the seeds {sorted(state['seeds'])}, not {sorted(self.seeds)}.")
        for seed_id, saved in state["seeds"].items():
            if digest(saved["module"] or {}) != state["digests"][seed_id]:
                raise DataLoss(f"The weights of {seed_id} are not those that were saved.")
            if self.seeds[seed_id].stage == lifecycle.FOSSILIZED:
                raise FailedPrecondition(f"{seed_id} is fossilised already; restore into a session of a fresh model.")

    def _rebuild(self, slot: SeedSlot, saved: dict[str, Any]) -> nn.Module | None:
        if saved["module"] is None:
            return None
        manifest = KernelManifest.FromString(bytes.fromhex(saved["manifest"]))
        # The weights come from the checkpoint.
        manifest.weights_sha256 = b""
        try:
            module = instantiate(
                manifest, self._factories, feature_shape=tuple(saved["feature_shape"]), dtype=slot.site.dtype,
                device=slot.site.device,
            )  # fmt: skip
        except KernelRejected as rejected:
            raise FailedPrecondition(f"{slot.seed_id} cannot be built: {rejected}.") from rejected
        module.load_state_dict(saved["module"])
        return module

    def _restore(self, slot: SeedSlot, saved: dict[str, Any], module: nn.Module | None) -> None:
        slot.load_state_dict(saved, module)
        if module is not None and slot.stage == lifecycle.FOSSILIZED:
            self._learning_rate.adopt(module)

    def _packet(self, slot: SeedSlot, step_index: int) -> TelemetryPacket:
        attributes = {"seed_id": slot.seed_id}
        points = [
            MetricPoint(name="kasmina.seed.stage", value=float(slot.stage), attributes=attributes),
            MetricPoint(name="kasmina.seed.alpha", value=slot.site.alpha, attributes=attributes),
        ]
        return TelemetryPacket(
            packet_id=f"{slot.seed_id}-{step_index}", source_subsystem="kasmina",
            level=TelemetryLevel.TELEMETRY_LEVEL_INFO, metrics=points,
        )  # fmt: skip

    def _global_packet(self, step_index: int) -> TelemetryPacket:
        active = sum(slot.stage in lifecycle.LIVE for slot in self.seeds.values())
        return TelemetryPacket(
            packet_id=f"global-{step_index}", source_subsystem="kasmina",
            level=TelemetryLevel.TELEMETRY_LEVEL_INFO,
            metrics=[MetricPoint(name="kasmina.seeds.active", value=float(active))],
        )  # fmt: skip


_SUPPORTED: Sequence[CommandType.ValueType] = (
    CommandType.COMMAND_TYPE_SEED,
    CommandType.COMMAND_TYPE_PAUSE,
    CommandType.COMMAND_TYPE_OPTIMIZER,
)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes."""
    running = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        running.update(name.encode() + len(content).to_bytes(8, "little") + content)
    return running.hexdigest()


def _run(work: Callable[[], Any], done: Future[Any]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(work())
    except Exception as error:  # noqa: BLE001  # It belongs to whoever waits for the result.
        done.set_exception(error)


def _trial(module: nn.Module, site: Site) -> str:
    """Run a new module once; why it cannot serve at this site, empty when it can."""
    h = torch.zeros((2, *site.output_shape), dtype=site.dtype, device=site.device)
    module.eval()
    with torch.no_grad():
        s = module(h)
    if s.shape != h.shape:
        return SHAPE_MISMATCH
    return "" if bool(torch.isfinite(s).all()) else GATE_NOT_FINITE


def _schedule_of(command: AdaptationCommand) -> AlphaSchedule:
    """Read the schedule a command asks for; fractions outside 0 to 1 are clamped, a swapped pair is ordered."""
    parameters = command.seed_operation.parameters
    bounds = [parameters.get("blending_schedule_start", 0.0), parameters.get("blending_schedule_end", 1.0)]
    start, end = sorted(min(1.0, max(0.0, b)) for b in bounds)
    index = int(parameters.get("blending_method_index", 0))
    method = SCHEDULES[index] if 0 <= index < len(SCHEDULES) else SCHEDULES[0]
    return AlphaSchedule(method=method, start=start, end=end)
