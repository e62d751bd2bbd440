from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from esper_rpc import rules
from esper_rpc.envelope import Keyring
from esper_rpc.errors import EsperError, FailedPrecondition, InvalidRequest, NotFound
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CircuitState, CommandType, SeedOperation, SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import (
    EvaluateEpochRequest,
    EvaluateStepsRequest,
    EvaluateStepsResponse,
    NoAction,
    OpenRunRequest,
    Step,
    StepDecision,
    StepStatus,
)
from esper_rpc.status import hide_unexpected, to_status
from esper_rpc.steady_clock import SteadyClock
from esper_rpc.telemetry.metrics import observe_refusals, tell_restraint
from esper_servers.policy.graph import RunGraph
from esper_servers.policy.policy import EAGER, Asked, Policy

from . import choosing
from .awaited_outcomes import OUTCOMES_MISSING
from .blend_modes import BlendModeConfig, blend_annotations
from .blueprint_cache import BlueprintCache
from .breakers import INFERENCE, Breakers
from .choosing import BREAKER_OPEN, BUDGET_EXHAUSTED, INFERENCE_FAILED, Decided
from .commands import build_command, sign_command
from .conservative_mode import ConservativeMode
from .field_reports.observations import Observations
from .giving_way import giving_way
from .policy_updates.shadow import Shadow
from .records.decisions import DecisionLog
from .records.evidence import Evidence
from .records.flight_recorder import FlightRecorder
from .records.memory import Memory
from .reporting import STEPS_PER_SAMPLE, DecisionReports, Reported
from .risk.config import RiskConfig
from .risk.engine import Verdict
from .risk.events import RiskEvents
from .run_state import Runs, RunState, build_graph
from .turns.anticipation import Anticipation, AnticipationConfig
from .turns.inference import Evaluations, Inference
from .turns.step_queue import BatchConfig, StepQueue
from .turns.stopwatch import Stopwatch

EPOCH_BUDGET_SECONDS = 2.0
Request = TypeVar("Request", EvaluateStepsRequest, EvaluateEpochRequest)
FetchRun = Callable[[str, str], Awaitable[None]]
# An enum looks its names up each time.
_COMMAND_KINDS = {number: name.removeprefix("COMMAND_TYPE_") for name, number in CommandType.items()}
_OPERATION_KINDS = {number: name.removeprefix("SEED_OPERATION_") for name, number in SeedOperation.items()}
GREETING_ANSWER = EvaluateStepsResponse(decision=StepDecision()).SerializeToString()


class StepPipeline:
    """Answers one step: budget, limits, validate, admit, decide, sign, ledger. Bytes in, bytes out."""

    def __init__(
        self,
        *,
        policy: Policy,
        runs: Runs,
        blueprints: BlueprintCache,
        keyring: Keyring,
        decisions: DecisionLog,
        mode: ConservativeMode,
        breakers: Breakers | None = None,
        risk_config: RiskConfig | None = None,
        batch: BatchConfig | None = None,
        anticipation: AnticipationConfig | None = None,
        blending: BlendModeConfig | None = None,
        clock: Callable[[], float] = time.perf_counter,
        clock_ns: Callable[[], int] | None = None,
    ) -> None:
        self.policy = policy
        self.runs = runs
        self.queue = StepQueue(batch=batch, clock=clock)
        self._inference = Inference(self.queue)
        self._anticipation = Anticipation(anticipation, clock=clock)
        self.breakers = breakers or Breakers(mode)
        self.breakers.watch(INFERENCE, self._on_breaker)
        self.breaker = self.breakers[INFERENCE]
        self._blueprints = blueprints
        self._keyring = keyring
        self._decisions = decisions
        self.mode = mode
        self._risk = risk_config or RiskConfig()
        self._risk_events = RiskEvents(self._risk.cool_down_steps)
        self._blending = blending or BlendModeConfig()
        self._clock = clock
        self.clock_ns = clock_ns or SteadyClock()
        """The time that commands carry, and that OpenRun tells the run."""
        self.kinds: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.shadow: Shadow | None = None
        """Another policy that follows some steps, without effect."""
        self.on_inference_lost: Callable[[], None] = lambda: None
        """Called when the breaker around inference opens."""
        self.fetch_run: FetchRun = _stay
        """Called with the name and owner of a run that is not here, to open it here if another process holds it."""
        self.observations = Observations()
        """For the field reports on what commands did."""
        self.recorder = FlightRecorder()
        """Of every step that was answered; what the journal does not keep of them is there for a while."""
        self._reports = DecisionReports(self._observe, quiet_steps=self._risk.cool_down_steps)
        self._refused: Counter[str] = Counter()
        """Steps on streams by the reason of their error, since the last report."""
        self._unrecorded: deque[Evidence] = deque()
        """Of answers that have not left: the journal's thread would hold them up."""

        self._samples: list[tuple[RunState, Callable[[], Evidence]]] = []
        """Steps without a command that are to be recorded; to gather what they were decided on takes too long here."""

    async def evaluate_in_band(self, raw: bytes, owner: str) -> bytes:
        """Answer a message of the stream; a refusal is an answer too, and the stream goes on."""
        if not raw:
            return GREETING_ANSWER
        arrived = self._clock()
        try:
            return await self.evaluate(raw, owner, arrived)
        except EsperError as error:
            return self._refuse(raw, error)
        except Exception as error:  # noqa: BLE001  # One bad step must not end the stream.
            return self._refuse(raw, hide_unexpected(error))

    def _refuse(self, raw: bytes, error: EsperError) -> bytes:
        self._refused[error.reason] += 1
        return _refusal(raw, error)

    async def evaluate(self, raw: bytes, owner: str, arrived: float, time_remaining: float = math.inf) -> bytes:
        """Answer one serialised EvaluateStep(s)Request; raises EsperError.

        `time_remaining` is what the call's own deadline leaves: it tells of time that passed before the call came here.
        """
        watch = Stopwatch(arrived)
        request = _parse(raw, EvaluateStepsRequest)
        budget = min(request.step.budget_us / 1e6, time_remaining)
        may_share = self.policy.plan == EAGER
        # Under load most are refused, and need no check.
        self.queue.check_room(arrived, budget, request.step.run_id if may_share else None)
        rules.check(request)
        return await self._take_turn(request.step, raw, owner, watch, budget)

    async def evaluate_epoch(self, raw: bytes, owner: str, arrived: float) -> bytes:
        """Answer one serialised EvaluateEpochRequest, bound to these very bytes; raises EsperError."""
        watch = Stopwatch(arrived)
        asked = _parse(raw, EvaluateEpochRequest)
        rules.check(asked)
        step = Step(run_id=asked.run_id, sequence=asked.sequence, packet=asked.packet)
        return await self._take_turn(step, raw, owner, watch, EPOCH_BUDGET_SECONDS)

    async def _take_turn(self, step: Step, raw: bytes, owner: str, watch: Stopwatch, budget: float) -> bytes:
        try:
            run = self.runs.get(step.run_id, owner)
        except NotFound:
            run = await self._fetched(step.run_id, owner)
        digest = hashlib.sha256(raw).digest()
        watch.lap("validate_us")
        sharer = run.request.run_id if self.policy.can_share(run.graph.inputs) else None
        company = await self.queue.take_turn(watch.arrived, budget, sharer)
        try:
            if run.has_left:  # While it waited.
                run = await self._fetched(step.run_id, owner)
            run.begin_step()
            watch.lap("queue_us")
            return await self._answer(step, raw, run, digest, watch, budget, company)
        finally:
            run.end_step()
            self.queue.end_turn(company)
            if step.budget_us:
                self._anticipation.expect(run.rhythm, watch.arrived, partial(self.rehearse, run, raw))

    def rehearse(self, run: RunState, raw: bytes) -> None:
        """Do once more what a step takes long for, as far as it leaves no trace: then the next one finds it at hand."""
        if self.breaker.state != CircuitState.CIRCUIT_STATE_CLOSED or self.queue.has_long_turns:
            return
        request = _parse(raw, EvaluateStepsRequest)
        rules.check(request)
        hashlib.sha256(raw)
        self.policy.evaluate(run.graph.inputs, run.ordered_seeds(request.step.packet), run.signals())

    async def _fetched(self, run_id: str, owner: str) -> RunState:
        """A run that another process held until now; raises NotFound."""
        await self.fetch_run(run_id, owner)
        return self.runs.get(run_id, owner)

    async def _answer(
        self,
        step: Step,
        raw: bytes,
        run: RunState,
        digest: bytes,
        watch: Stopwatch,
        budget: float,
        company: Evaluations | None,
    ) -> bytes:
        if step.sequence <= run.last_sequence:
            return _answer_again(run, step.sequence, digest)
        policy = self.policy  # Another one may be taken up while this one works.
        decision, evidence = await self._decide(step, run, digest, watch, budget, policy, company)
        decision.sequence = step.sequence
        decision.ledger.CopyFrom(watch.close())
        reply = EvaluateStepsResponse(decision=decision).SerializeToString()
        run.last_sequence, run.last_digest, run.last_reply = step.sequence, digest, reply
        # Only the state at the end of an epoch is asked about without a budget.
        self.recorder.note(
            step.run_id, step.sequence, raw, reply, policy.version, self.clock_ns(), is_epoch=not step.budget_us
        )
        if evidence is not None:
            self._unrecorded.append(evidence)
        return reply

    def take_up(self, policy: Policy) -> None:
        """Decide by this policy from the next step on; its breaker is closed, whatever the one before did."""
        self.policy = policy
        self.breaker = self.breakers.renew(INFERENCE)

    def report(self) -> None:
        """Record commands, metrics, events and spans of what was answered; call it when the answer is on its way."""
        self._take_samples()
        while self._unrecorded:
            self._decisions.record(self._unrecorded.popleft())
        self._risk_events.report()
        self._reports.report()
        while self._refused:
            observe_refusals(*self._refused.popitem())
        if self.shadow is not None:
            self.shadow.follow()

    async def renew_graphs(self) -> None:
        """Give runs a graph with the present catalogue and with what grows in their seeds now, beside the steps."""
        for run in self.runs.all():
            if not run.has_graph_of(self._blueprints.version):
                await self._renew_graph(run)

    async def _renew_graph(self, run: RunState) -> None:
        request, version = run.request, self._blueprints.version
        candidates = self._blueprints.candidates(request.sites)
        with giving_way():
            graph = await asyncio.to_thread(self.lay_out, request, candidates, run.graph.norms, run.attached.copy())
        if run.request is request:  # Else it was opened again meanwhile, with a graph of its own.
            self.report()  # What is not recorded yet was decided with the graph before.
            run.take_graph(graph, version)

    def lay_out(self, request: OpenRunRequest, *others: Any) -> RunGraph:
        """Build a graph as `build_graph`, and prepare the policy for it; on any thread, to spare the first step."""
        graph = build_graph(request, *others)
        self.policy.prepare(graph.inputs)
        return graph

    def _observe(self, reported: Reported) -> None:
        self.observations.note(reported)
        run = reported.run
        if run.awaited.note((outcome.command_id for outcome in reported.step.outcomes), reported.command_id):
            run.mode.enter(OUTCOMES_MISSING)

    @property
    def conservative_reason(self) -> str:
        """Why the service holds back, else why one of the runs is held back; empty when none is."""
        held = (f"run {run.request.run_id}: {run.mode.reason}" for run in self.runs.all() if run.mode.enabled)
        return self.mode.reason if self.mode.enabled else next(held, "")

    def set_conservative_mode(self, *, enabled: bool, reason: str) -> None:
        """Turn conservative mode on by hand, or off, also for the runs that are held back on their own."""
        if enabled:
            self.mode.enter(f"operator: {reason}", by_hand=True)
            return
        self.mode.leave()
        for run in self.runs.all():
            run.mode.leave()

    async def tell_restraint(self) -> None:
        """Show what holds the policy back; to be called again and again, since it changes without a step too."""
        held = sum(run.mode.enabled for run in self.runs.all())
        breakers = {name: breaker.state for name, breaker in self.breakers.all().items()}
        tell_restraint(service_is_held=self.mode.enabled, held_runs=held, breakers=breakers)

    async def _decide(
        self,
        step: Step,
        run: RunState,
        digest: bytes,
        watch: Stopwatch,
        budget: float,
        policy: Policy,
        company: Evaluations | None,
    ) -> tuple[StepDecision, Evidence | None]:
        if self._samples:
            self._take_samples(of=run)
        self._note(run, step)
        memory, conservative = Memory.of(run), self.mode.enabled or run.mode.enabled
        verdict = self._judge(step.packet, run, conservative=conservative)
        watch.lap("risk_us")
        decided = await self._choose(step.packet, run, watch, budget, verdict, policy, company)
        if self.shadow is not None and self.shadow.is_free:
            self.shadow.note(run, decided, run.ordered_seeds(step.packet))
        report = partial(
            Reported, step, watch.ledger, budget_seconds=budget, policy_version=policy.version, plan=policy.plan
        )
        if decided.choice is None:
            self._count(report("NO_ACTION", decided, run, verdict))
            if step.sequence % STEPS_PER_SAMPLE == 0:
                gather = partial(
                    Evidence.of, None, step.packet, watch.ledger, decided, verdict, run=run, memory=memory,
                    policy=policy, prior=policy.prior, risk=self._risk, conservative=conservative,
                    sequence=step.sequence,
                )  # fmt: skip
                self._samples.append((run, gather))
            return StepDecision(no_action=NoAction(reason=decided.reason)), None
        command = build_command(
            run,
            decided.choice,
            reason=decided.reason,
            policy_version=policy.version,
            verdict=verdict,
            blending=blend_annotations(run, decided.choice, self._blending),
        )
        envelope = sign_command(
            command,
            keyring=self._keyring,
            run=run,
            sequence=step.sequence,
            request_digest=digest,
            now_ns=self.clock_ns(),
        )
        evidence = Evidence.of(
            command, step.packet, watch.ledger, decided, verdict, run=run, memory=memory, policy=policy,
            prior=policy.prior, risk=self._risk, conservative=conservative, sequence=step.sequence,
        )  # fmt: skip
        watch.lap("signing_us")
        self._count(report(self._issued(run, command), decided, run, verdict, command.command_id))
        return StepDecision(command=envelope), evidence

    def _take_samples(self, of: RunState | None = None) -> None:
        """Gather the evidence of steps without a command: of one run before its next step, else of all."""
        for run, gather in self._samples:
            if of is None or of is run:
                self._unrecorded.append(gather())
        self._samples = [] if of is None else [sample for sample in self._samples if sample[0] is not of]

    def _note(self, run: RunState, step: Step) -> None:
        run.steps += 1
        run.global_step = step.packet.global_step
        run.hear(step.outcomes, self._risk)

    def _judge(self, packet: SystemStatePacket, run: RunState, *, conservative: bool) -> Verdict:
        verdict = choosing.judge(run, packet, conservative=conservative, config=self._risk)
        if verdict.holds:
            run.mode.enter(verdict.reason)
        self._risk_events.note(
            run.risk.told, run_id=run.request.run_id, step=run.steps, step_index=run.global_step, verdict=verdict
        )
        return verdict

    async def _choose(
        self,
        packet: SystemStatePacket,
        run: RunState,
        watch: Stopwatch,
        budget: float,
        verdict: Verdict,
        policy: Policy,
        company: Evaluations | None,
    ) -> Decided:
        inputs = run.graph.fill(packet)
        watch.lap("features_us")
        if watch.spent() >= budget:
            return Decided(None, BUDGET_EXHAUSTED)
        seeds = run.ordered_seeds(packet)
        if verdict.forced is not None:
            return choosing.obey(verdict.forced, verdict, run, self._risk)
        breaker = self.breaker
        if not breaker.allow():
            return Decided(None, BREAKER_OPEN)
        try:
            asked = Asked(inputs, seeds, run.signals())
            output = await self._inference.run(policy, asked, watch, company)
            if not output.is_finite:
                raise ArithmeticError("the policy's output is not finite")
        except Exception as error:  # noqa: BLE001  # Whatever a policy does, the step gets a safe answer.
            if company is None or company.is_first_to_blame(breaker):
                breaker.record_failure()
            return Decided(None, INFERENCE_FAILED, error=repr(error)[:200])
        breaker.record_success()
        self.mode.record_success()
        run.mode.record_success()
        watch.lap("inference_us")
        decided = choosing.select(output, run, seeds, verdict, self._risk)
        watch.lap("risk_us")
        if watch.spent() >= budget:
            return Decided(None, BUDGET_EXHAUSTED)
        return decided

    def _issued(self, run: RunState, command: AdaptationCommand) -> str:
        """Note a command; returns what kind it is."""
        run.commands += 1
        run.note_issued(command.command_id)
        kind = _COMMAND_KINDS[command.command_type]
        if command.command_type == CommandType.COMMAND_TYPE_SEED:
            operation = command.seed_operation.operation
            kind = _OPERATION_KINDS[operation]
            if operation == SeedOperation.SEED_OPERATION_GERMINATE:
                run.germinated_at = run.steps
                run.planted[command.target_seed_id] = command.seed_operation.blueprint_id
        elif command.command_type == CommandType.COMMAND_TYPE_OPTIMIZER:
            run.optimizer_at, run.risk.adjusted = run.steps, True
        else:
            run.paused_at = run.steps
        return kind

    def _count(self, reported: Reported) -> None:
        self.kinds[reported.kind] += 1
        self.reasons[reported.reason] += 1
        self._reports.note(reported)

    def _on_breaker(self, after: CircuitState.ValueType) -> None:
        self.observations.note_breaker()
        if after == CircuitState.CIRCUIT_STATE_OPEN:
            self.on_inference_lost()


async def _stay(_run_id: str, _owner: str) -> None:
    """Where there is one process only."""


def _parse(raw: bytes, kind: type[Request]) -> Request:
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InvalidRequest(f"The message is not an {kind.DESCRIPTOR.name}.") from error


def _answer_again(run: RunState, sequence: int, digest: bytes) -> bytes:
    if sequence == run.last_sequence and digest == run.last_digest:
        return run.last_reply
    raise FailedPrecondition(
        f"Sequence {sequence} was answered already; the last one is {run.last_sequence}.", reason="SEQUENCE_REPLAYED"
    )


def _refusal(raw: bytes, error: EsperError) -> bytes:
    try:
        sequence = EvaluateStepsRequest.FromString(raw).step.sequence
    except DecodeError:
        sequence = 0
    status = to_status(error)
    in_band = StepStatus(code=status.code, message=status.message, details=status.details)
    return EvaluateStepsResponse(decision=StepDecision(sequence=sequence, error=in_band)).SerializeToString()
