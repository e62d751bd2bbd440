from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import orjson
from torch import Tensor, nn

from esper_client.seed_host import RunDescription
from esper_rpc.breaker import CircuitBreaker
from esper_rpc.envelope import Keyring, Verifier
from esper_rpc.errors import FailedPrecondition, NotFound
from esper_rpc.proto.kasmina.v1 import RollbackPayload
from esper_rpc.proto.leyline.v1 import (
    CommandOutcome,
    CommandType,
    SeedLifecycleStage,
    SeedState,
    SignedEnvelope,
    SystemHealth,
    TelemetryPacket,
)
from esper_servers.blueprints.catalogue import BlueprintFactory
from esper_servers.blueprints.extras import describe_module

from . import lifecycle
from .boundary import Boundary
from .checkpoint import Checkpoint
from .commands import Commands, Route
from .export import without_sites
from .gatekeeper import Gatekeeper
from .host_config import SeedHostConfig
from .inbox import CommandInbox
from .isolation.isolation import Isolation
from .kernels.background import Work
from .kernels.germination import Nursery
from .kernels.library import KernelLibrary
from .kernels.prewarm import Prewarmer
from .learning_rate import LearningRateAuthority
from .live_seeds import LiveSeeds
from .memory import MemoryGovernor, MemoryReader
from .ownership import Ownership
from .parameter_names import foreign_parameters
from .pausing import Pauses
from .progress import Progress
from .safe_point import SafePoint
from .seed_slot import SeedSlot
from .site import Site
from .surgery import Surgeon
from .telemetry import step_packets
from .telemetry.events import Listener, SeedEvents
from .telemetry.health import HostHealth
from .telemetry.notices import Notices
from .upkeep import Upkeep


class InProcessSeedHost:
    """Seeds in a model of this process. `submit` may be called from any thread, the rest from the training thread.

    It holds the lock and the order of a step. What arrives goes by inbox, commands and surgeon; what the end of a step
    does to seeds is the upkeep's.
    """

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
        config: SeedHostConfig | None = None,
        read_memory: MemoryReader = lambda: None,
        background: Callable[[Work], None] | None = None,
        has_training_thread: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Host these sites. With `background` modules are built there, and a germination waits for its module."""
        config = config or SeedHostConfig()
        self._model, self._sites, self._learning_rate = model, dict(sites), learning_rate
        self._topology = orjson.dumps(describe_module(model))
        self._lock = threading.RLock()
        self.seeds = {
            f"seed-{site_id}": SeedSlot(seed_id=f"seed-{site_id}", site_id=site_id, site=site, depth=depth)
            for depth, (site_id, site) in enumerate(sites.items())
        }
        self._progress, self._notices = Progress(), Notices()
        tell = self._notices.tell
        self._events = SeedEvents(self.seeds, self._progress, tell)
        self.verifier = Verifier(keyring=keyring, audience=audience, receiver_epoch=os.urandom(16))
        self._inbox = CommandInbox(
            verifier=self.verifier, library=library, events=self._events, progress=self._progress, tell=tell
        )
        self._library, self._live = library, LiveSeeds()
        library.report_to(tell)
        self._ownership = Ownership(model, tell=tell)
        self._isolation = Isolation(self._trained, clock=clock, tell=tell, on_shared=self._ownership.validate)
        boundary = Boundary(self._ownership, self._isolation)
        self._prewarmer = Prewarmer(factories=factories, background=background)
        self._nursery = Nursery(
            library=library,
            prewarmer=self._prewarmer,
            ownership=self._ownership,
            max_parameters=config.limits.added_parameters,
        )
        self._governor = MemoryGovernor(
            config=config.memory, read=read_memory, clean_up=self._let_go, expire=self._expire, clock=clock, tell=tell
        )
        self._pauses = Pauses(limits=config.limits, clock=clock, quota=config.pause, tell=tell)
        gatekeeper = Gatekeeper(config=config.gates, boundary=boundary, progress=self._progress, events=self._events)
        self._surgeon = Surgeon(
            seeds=self.seeds,
            gatekeeper=gatekeeper,
            nursery=self._nursery,
            boundary=boundary,
            governor=self._governor,
            live=self._live,
            learning_rate=learning_rate,
            limits=config.limits,
            events=self._events,
            progress=self._progress,
            tell=tell,
        )
        self._upkeep = Upkeep(
            surgeon=self._surgeon, gatekeeper=gatekeeper, boundary=boundary, pauses=self._pauses, clock=clock, tell=tell
        )
        self._commands = Commands(
            inbox=self._inbox, seeds=self.seeds, surgeon=self._surgeon, nursery=self._nursery, pauses=self._pauses,
            learning_rate=learning_rate, limits=config.limits, events=self._events, progress=self._progress, tell=tell,
        )  # fmt: skip
        self._checkpoint = Checkpoint(
            seeds=self.seeds, factories=factories, learning_rate=learning_rate, progress=self._progress,
            on_restored=self._recount,
        )  # fmt: skip
        self._health = HostHealth(
            breakers=self.breakers, violations_of=boundary.violations_of, slow_ms=config.gates.hook_ms
        )
        self._safe_point = SafePoint(has_training_thread=has_training_thread)

    @property
    def receiver_epoch(self) -> bytes:
        """The challenge of this start."""
        return self.verifier.receiver_epoch

    @property
    def last_sequence(self) -> int:
        """The last sequence accepted from Tamiyo."""
        return self.verifier.fences().get("tamiyo", 0)

    @property
    def global_step(self) -> int:
        """The last step that was observed or finalised."""
        return self._progress.global_step

    @property
    def queued_commands(self) -> int:
        """Commands that wait for a safe point."""
        return len(self._inbox)

    @property
    def waiting_work(self) -> int:
        """Calls of `at_safe_point` that wait for one."""
        return len(self._safe_point)

    @property
    def breakers(self) -> Mapping[str, CircuitBreaker]:
        """The breakers here, by name."""
        return {each.name: each for each in (self._library.breaker, self._governor.breaker, self._isolation.breaker)}

    @property
    def recent_outcomes(self) -> list[CommandOutcome]:
        """The last outcomes, newest last."""
        return list(self._events.outcomes)

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
        return self._inbox.receive(envelope, expected_sequence=expected_sequence, request_digest=request_digest)

    def outcomes_of(self, command_ids: Iterable[str]) -> list[CommandOutcome]:
        """Return what is known of accepted commands; those of more than five minutes ago are forgotten."""
        return [found for each in command_ids if (found := self.verifier.outcome_of(each)) is not None]

    def observe(self, loss: float, global_step: int) -> None:
        """Note the loss of the step that just ended."""
        self._progress.observe(loss, global_step)

    def apply_pending(self) -> list[CommandOutcome]:
        """Carry out what is queued, at the safe point."""
        with self._lock:
            outcomes = self._commands.carry_out_waiting()
        self._safe_point.reach()
        return outcomes

    def at_safe_point(self, work: Callable[[], Any]) -> Future[Any]:
        """Do work that changes the model: by the training thread at its next safe point, or at once without one."""
        return self._safe_point.submit(work)

    def reach_safe_point(self) -> None:
        """Do what `at_safe_point` left, and no command: for a training that stands still."""
        self._safe_point.reach()

    def advance_alphas(self) -> None:
        """Move every blending seed one step on."""
        with self._lock:
            for slot in self.seeds.values():
                if slot.stage == lifecycle.BLENDING and not slot.site.paused:
                    slot.advance_alpha()

    def advance_alpha(self, seed_id: str) -> float:
        """Move one seed on; raises NotFound or FailedPrecondition."""
        with self._lock:
            slot = self._slot(seed_id)
            if slot.stage != lifecycle.BLENDING:
                raise FailedPrecondition(f"Seed {seed_id!r} is not blending.")
            return slot.advance_alpha()

    def finalize_step(self, step_index: int) -> list[TelemetryPacket]:
        """Step the seeds' optimizers, let time pass for them, and return their packets with what happened."""
        with self._lock:
            self._progress.global_step = max(self._progress.global_step, step_index)
            self._learning_rate.step()
            self._isolation.measure(self.seeds[seed_id] for seed_id in self._live)
            self._upkeep.finalize(self.seeds.values())
            self._pauses.tick()
            has_looked = self._governor.look()
            events = [*self._events.rejections.take(step_index), *self._notices.take(step_index)]
            slots = self.seeds.values()
            packets = step_packets.flush(slots, step_index, events, self._health.of(slots), self._isolation.metrics_of)
            packets[-1].metrics.extend(self._isolation.metrics())
            if has_looked:
                packets[-1].metrics.extend([*self._nursery.metrics(), *self._governor.metrics()])
            return packets

    def health(self) -> SystemHealth:
        """Return how well this host does, and what speaks against it."""
        with self._lock:
            return self._health.of(self.seeds.values())

    def export_seed_states(self) -> list[SeedState]:
        """Return the state of every seed."""
        with self._lock:
            return [slot.state(self._progress.loss) for slot in self.seeds.values()]

    def update_epoch(self, epoch: int) -> None:
        """Let live seeds age, and let go of what is out of date."""
        with self._lock:
            self._governor.end_epoch(epoch)
            for slot in self.seeds.values():
                if slot.stage in lifecycle.LIVE:
                    slot.age_epochs += 1

    def rollback_payload(self, seed_id: str) -> RollbackPayload:
        """Return what is known of the last seed that was taken out of a place; raises NotFound."""
        with self._lock:
            found = self._surgeon.rollback_payloads.of(self._slot(seed_id).seed_id)
        if found is None:
            raise NotFound(
                f"Nothing was taken out as {seed_id!r} since the host was started or the training went back."
            )
        return found

    def terminate(self, seed_id: str) -> SeedLifecycleStage.ValueType:
        """Take a seed out for good, at a safe point; returns the stage that it left, and raises NotFound."""
        with self._lock:
            slot = self._slot(seed_id)
            before = slot.stage
            self._surgeon.terminate(slot)
            return before

    def register_teacher(self, name: str, teacher: nn.Module) -> None:
        """Keep seeds away from the weights of a teacher; raises InvalidRequest when those are not the teacher's own."""
        with self._lock:
            self._ownership.register_teacher(name, teacher)

    def validate_parameters(self, seed_id: str, tensors: Iterable[Tensor]) -> str:
        """Return whose the first of these tensors is that is not the seed's; a violation is counted. Empty: none."""
        with self._lock:
            return self._ownership.validate(seed_id, tensors)

    def foreign_parameters(self, seed_id: str, names: Sequence[str]) -> list[tuple[str, str]]:
        """Return which of these parameters, by name, a seed must not write to, and whose each is; raises NotFound."""
        with self._lock:
            return foreign_parameters(
                seed_id, names, model=self._model, seeds=self.seeds, ownership=self._ownership
            )  # fmt: skip

    def emergency_cleanup(self) -> int:
        """Let go of all that can be had again, kernels and modules that wait; returns how many that were."""
        with self._lock:
            return self._governor.clean_up("operator")

    def set_clock_offset(self, offset_ns: int) -> None:
        """Set the issuer's wall clock minus our monotonic clock."""
        self.verifier.set_clock_offset(offset_ns)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call a function at every event, from whatever thread it happens in; returns how to stop."""
        return self._events.listen(listener)

    def state_dict(self) -> dict[str, Any]:
        """Return seeds, stages, alphas and optimizers, and how often each seed has violated what is not its own."""
        with self._lock:
            counts = {i: self._violations_of(i) for i in self.seeds}
            violations = {i: list(each) for i, each in counts.items() if any(each)}
            return self._checkpoint.save() | ({"violations": violations} if violations else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, before the user restores the optimizer. All or nothing.

        Raises:
            InvalidRequest: When the checkpoint is of other seeds.
            DataLoss: When the weights of a seed are not those that were saved.
            FailedPrecondition: When a blueprint is not installed.
        """
        with self._lock:
            self._restore(state)

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise what `load_state_dict` would raise, and change nothing."""
        with self._lock:
            self._checkpoint.check(state)

    def roll_back(self, state: dict[str, Any]) -> None:
        """Restore like `load_state_dict`, and refuse from here on what was decided on the seeds of until now.

        The challenge changes, so that the controller has to open the run again. Commands for seeds that wait fail.
        """
        with self._lock:
            self._restore(state)
            self.verifier.receiver_epoch = os.urandom(16)

    def route(self, command_type: CommandType.ValueType, carry_out: Route) -> None:
        """Have commands of a type carried out by somebody else, at the safe point; call it before the first step."""
        self._commands.route(command_type, carry_out)

    def export(self) -> nn.Module:
        """Return a plain copy: each site is its host, followed by its seed if that is fossilised."""
        with self._lock:
            return without_sites(self._model, self._sites.values())

    def close(self) -> None:
        """End those who listen, and those who wait for a safe point that will not come."""
        self._events.close()
        self._safe_point.close()

    def _slot(self, seed_id: str) -> SeedSlot:
        slot = self.seeds.get(seed_id)
        if slot is None:
            raise NotFound(f"There is no seed {seed_id!r}.")
        return slot

    def _let_go(self) -> int:
        """Empty the caches, and take out what a seed left that grows no more."""
        freed = self._library.clear() + self._prewarmer.clear()
        for slot in self.seeds.values():
            if slot.site.seed is not None and slot.stage not in (*lifecycle.LIVE, lifecycle.FOSSILIZED):
                freed += 1
                slot.uproot()
        return freed

    def _expire(self) -> int:
        self._ownership.refresh()
        return self._library.purge()

    def _trained(self) -> Iterator[Tensor]:
        """The parameters that the user's optimizer trains: the model's, and those of fossils."""
        yield from self._model.parameters()
        for slot in self.seeds.values():
            if slot.stage == lifecycle.FOSSILIZED and slot.site.seed is not None:
                yield from slot.site.seed.parameters()

    def _violations_of(self, seed_id: str) -> tuple[int, int]:
        return self._ownership.violations_of(seed_id), self._isolation.violations_of(seed_id)

    def _restore(self, state: dict[str, Any]) -> None:
        self._checkpoint.restore(state)
        if "seeds" not in state:
            return
        for seed_id, slot in self.seeds.items():
            written, overlapping = state.get("violations", {}).get(seed_id, (0, 0))
            self._ownership.recall(seed_id, written)
            self._isolation.recall(slot, overlapping)

    def _recount(self) -> None:
        self._upkeep.resume()
        self._surgeon.patience.clear()
        self._surgeon.rollback_payloads.clear()
        self._live.recount(self.seeds.values())
        planted = [(slot.seed_id, slot.site.seed) for slot in self.seeds.values()]
        self._ownership.refresh([(seed_id, module) for seed_id, module in planted if module is not None])
