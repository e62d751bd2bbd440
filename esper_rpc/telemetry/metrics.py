"""The metrics of a process, in the default registry of prometheus_client.

Call metrics have the names, labels and buckets of gRPC proposal A66 in their Prometheus form. With
PROMETHEUS_MULTIPROC_DIR set before this is imported they live in files there, so that another process renders them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from esper_rpc.ledger import StepTiming
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_rpc.proto.tamiyo.v1 import StepLedger

LATENCY_BUCKETS = (
    0, 0.00001, 0.00005, 0.0001, 0.0003, 0.0006, 0.0008, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.013,
    0.016, 0.02, 0.025, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1, 2, 5,
    10, 20, 50, 100,
)  # fmt: skip
SIZE_BUCKETS = (0, *(4**exponent * 1024 for exponent in range(12)))
LATEST: Final = "livemostrecent"
"""A gauge shows what the process that lives said last."""
SHARE_BUCKETS = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1)

SERVER_STARTED = Counter("grpc_server_call_started", "Calls that arrived.", ["grpc_method"])
SERVER_DURATION = Histogram(
    "grpc_server_call_duration_seconds",
    "From the arrival of a call to its end.",
    ["grpc_method", "grpc_status"],
    buckets=LATENCY_BUCKETS,
)
SERVER_RECEIVED = Histogram(
    "grpc_server_call_rcvd_total_compressed_message_size_bytes",
    "What a call received.",
    ["grpc_method", "grpc_status"],
    buckets=SIZE_BUCKETS,
)
SERVER_SENT = Histogram(
    "grpc_server_call_sent_total_compressed_message_size_bytes",
    "What a call sent.",
    ["grpc_method", "grpc_status"],
    buckets=SIZE_BUCKETS,
)

DECISION_PART = Histogram(
    "esper_decision_part_seconds",
    "Where the time of a decision went at the controller.",
    ["part"],
    buckets=LATENCY_BUCKETS,
)
BATCH_SIZE = Histogram(
    "esper_decision_batch_size",
    "How many steps the policy computed in the same pass as the one decided, itself included.",
    buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64),
)
DECISIONS = Counter("esper_decisions", "Answers to steps.", ["kind", "reason"])
REHEARSALS = Counter("esper_rehearsals", "Steps that were rehearsed just before they were expected.")
STEPS_REFUSED = Counter("esper_steps_refused", "Steps on streams that got an error.", ["reason"])
BLENDING_METHODS = Counter("esper_blending_methods", "Commands that graft a seed, by how it is blended in.", ["method"])
PAUSE_REQUESTS = Counter("esper_pause_requests", "Requests for a pause, by what was granted of them.", ["result"])

POLICY_UPDATES = Counter("esper_policy_updates", "Policies that came, by what became of them.", ["result", "reason"])
CONSERVATIVE_ENTRIES = Counter(
    "esper_conservative_entries", "Times that the service or a run came to be held back.", ["scope", "cause"]
)
BREAKER_MOVES = Counter("esper_breaker_moves", "Times that a breaker changed its state.", ["breaker", "state"])
SHADOW_DECISIONS = Counter(
    "esper_shadow_decisions", "Steps that the shadow policy followed, by whether it agreed.", ["agreed"]
)
REPORTS_PUBLISHED = Counter("esper_field_reports_published", "Field reports that the publisher took.")
REPORT_RETRIES = Counter("esper_field_reports_retries", "Times that a field report was handed over once more.")
REPORTS_DROPPED = Counter("esper_field_reports_dropped", "Field reports that are not handed over any more.", ["reason"])
URZA_TIMEOUTS = Counter("esper_urza_timeouts", "Times that the library did not answer in its budget.", ["wanted"])
RISK_SCORE = Histogram("esper_risk_score", "Combined risk of a step, from 0 to 1.", buckets=SHARE_BUCKETS)
BLUEPRINT_RISK = Histogram(
    "esper_blueprint_risk", "Risk of the worst blueprint that lives in the run of a step.", buckets=SHARE_BUCKETS
)
RISK_DEMANDS = Counter("esper_risk_demands", "Steps that were judged, by what their risk demanded.", ["demand"])
BSDS_HAZARDS = Counter("esper_bsds_hazards", "Steps beside a blueprint that its sheet warns of.", ["band"])

PLAN_COMPILED = Gauge("esper_plan_compiled", "Whether the compiled plan is served.", multiprocess_mode=LATEST)
PLAN_FALLBACKS = Counter("esper_plan_fallbacks", "Times that a plan was wanted and another had to serve.")

STEP_PART = Histogram(
    "esper_step_part_seconds", "Where the time of a step went at the trainer.", ["part"], buckets=LATENCY_BUCKETS
)
STEP_ANSWERS = Counter("esper_step_answers", "Steps of a trainer, by what came of asking.", ["reason"])
LEARNING_RATE_VIOLATIONS = Counter(
    "esper_learning_rate_violations", "Learning rates that somebody else changed, and that were put back.", ["reason"]
)
GRADIENT_CONFLICTS = Counter("esper_gradient_conflicts", "Gradients that pulled against another.", ["source"])
GRADIENTS_DROPPED = Counter("esper_gradients_dropped", "Gradients left out because they were not finite.", ["source"])
OUTCOMES = Counter("esper_command_outcomes", "Commands at a seed host.", ["result", "reason"])
CHECKPOINT_SECONDS = Histogram(
    "esper_checkpoint_seconds", "How long a checkpoint took.", ["tier"], buckets=LATENCY_BUCKETS
)
CHECKPOINT_FAILURES = Counter("esper_checkpoint_failures", "Checkpoints that were not made.", ["tier", "reason"])
ROLLBACK_SECONDS = Histogram(
    "esper_rollback_seconds", "How long a rollback took that succeeded.", ["tier"], buckets=LATENCY_BUCKETS
)
ROLLBACKS = Counter("esper_rollbacks", "Rollbacks of a trainer, by what came of them.", ["result"])

EMERGENCIES = Counter("esper_emergencies", "Emergency signals of a run that were acted on or told.", ["level"])

EPOCH_HOOK = Histogram(
    "esper_epoch_hook_seconds", "What the end of an epoch took at the trainer.", buckets=LATENCY_BUCKETS
)

EPOCH_DURATION = Histogram(
    "esper_epoch_duration_seconds",
    "What a whole epoch took, from the end of the one before.",
    buckets=(1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0),
)

_AUDIT_LOST = Counter("esper_audit_records_lost", "What the audit log could not keep.", ["cause"])
# Made now: on a disk that is full already there may be no room for a new one.
AUDIT_LOST = {cause: _AUDIT_LOST.labels(cause) for cause in ("queue", "disk")}
_JOURNAL_LOST = Counter("esper_journal_records_lost", "What the journal could not keep.", ["cause"])
JOURNAL_LOST = {cause: _JOURNAL_LOST.labels(cause) for cause in ("queue", "disk", "defect")}

_LEDGER_PARTS = tuple(field.name for field in StepLedger.DESCRIPTOR.fields)
_DECISION_PARTS = {name: DECISION_PART.labels(name.removesuffix("_us")) for name in _LEDGER_PARTS}
_STEP_PARTS = {name: STEP_PART.labels(name) for name in ("build", "exchange", "server", "verify", "apply", "total")}


def observe_decision(ledger: StepLedger, kind: str, reason: str, batch_size: int = 0) -> None:
    """Record one decision of the controller; 0 is the size of the batch where the policy was not asked."""
    DECISIONS.labels(kind, reason).inc()
    if batch_size:
        BATCH_SIZE.observe(batch_size)
    for name, histogram in _DECISION_PARTS.items():
        histogram.observe(getattr(ledger, name) / 1e6)


def observe_refusals(reason: str, count: int) -> None:
    """Record steps on streams that got an error of this reason."""
    STEPS_REFUSED.labels(reason).inc(count)


def observe_blending(method: str) -> None:
    """Record a command that grafts a seed."""
    BLENDING_METHODS.labels(method).inc()


def observe_risk(score: float, demand: str, blueprint_risk: float | None, hazard_band: str) -> None:
    """Record the risk of a step: of the worst blueprint that lives in its run, and the band that its sheet warns of."""
    RISK_SCORE.observe(score)
    RISK_DEMANDS.labels(demand).inc()
    if blueprint_risk is not None:
        BLUEPRINT_RISK.observe(blueprint_risk)
    if hazard_band:
        BSDS_HAZARDS.labels(hazard_band).inc()


def tell_coverage(overall: float, types: Mapping[str, float]) -> None:
    """Show how much the policy knew in a step that was looked at."""
    _coverage_gauges().tell(overall, types)


class _CoverageGauges:
    """Most of what they show stays the same from step to step, and is not written again."""

    def __init__(self) -> None:
        whole = "Share of the features of the graph that were known in the step last looked at."
        by_type = "The same by type of node, and by relation the share of edges that were told."
        self._whole = Gauge("esper_feature_coverage", whole, multiprocess_mode=LATEST)
        self._by_type = Gauge("esper_feature_coverage_by_type", by_type, ["type"], multiprocess_mode=LATEST)
        self._told: dict[str, float] = {}

    def tell(self, overall: float, types: Mapping[str, float]) -> None:
        self._whole.set(overall)
        for name, share in types.items():
            if self._told.get(name) != share:
                self._by_type.labels(name).set(share)
                self._told[name] = share


@cache
def _coverage_gauges() -> _CoverageGauges:
    """Made where a policy decides: any other process would show 0."""
    return _CoverageGauges()


def tell_losses(validation: float | None, delta: float) -> None:
    """Show the losses of the step told last: on held-out data, where the trainer tells it, and the rise in the step."""
    held_out, rise = _loss_gauges()
    rise.set(delta)
    if validation is not None:
        held_out.set(validation)


@cache
def _loss_gauges() -> tuple[Gauge, Gauge]:
    """Made where a policy decides, as above."""
    return (
        Gauge("esper_validation_loss", "Loss on held-out data that a trainer told last.", multiprocess_mode=LATEST),
        Gauge("esper_loss_delta", "Change of the loss in the step decided last.", multiprocess_mode=LATEST),
    )


def tell_restraint(*, service_is_held: bool, held_runs: int, breakers: Mapping[str, int]) -> None:
    """Show what holds the policy back: conservative mode, and the CircuitState of each breaker by its name."""
    conservative, states = _restraint_gauges()
    conservative.labels("service").set(service_is_held)
    conservative.labels("runs").set(held_runs)
    for name, state in breakers.items():
        states.labels(name).set(state)


@cache
def _restraint_gauges() -> tuple[Gauge, Gauge]:
    """Made where a policy decides, as above."""
    held = "Whether the service is in conservative mode, and how many runs are by themselves."
    state = "The state of a breaker by its number in Leyline: 1 closed, 2 open, 3 half open."
    return (
        Gauge("esper_conservative_mode", held, ["scope"], multiprocess_mode=LATEST),
        Gauge("esper_breaker_state", state, ["breaker"], multiprocess_mode=LATEST),
    )


def tell_queues(lengths: Mapping[str, int]) -> None:
    """Show how many wait in each queue."""
    for name, length in lengths.items():
        _queue_length().labels(name).set(length)


@cache
def _queue_length() -> Gauge:
    """Made where the queues are, as above."""
    purpose = "Steps that wait for their turn, and records that wait for the disk."
    return Gauge("esper_queue_length", purpose, ["queue"], multiprocess_mode=LATEST)


def tell_missing_sheets(missing: int) -> None:
    """Show how many blueprints of the catalogue have no safety data sheet."""
    _missing_sheets().set(missing)


@cache
def _missing_sheets() -> Gauge:
    """Made where the catalogue is known, as above."""
    purpose = "Blueprints of the catalogue without a safety data sheet."
    return Gauge("esper_bsds_missing", purpose, multiprocess_mode=LATEST)


def tell_warm_up(seconds: float) -> None:
    """Show how long the plan that serves at the start was warmed up."""
    _warm_up_seconds().set(seconds)


@cache
def _warm_up_seconds() -> Gauge:
    """Made where a plan serves, as above."""
    purpose = "How long the plan that serves at the start was warmed up."
    return Gauge("esper_plan_warm_up_seconds", purpose, multiprocess_mode=LATEST)


def tell_device(peak_bytes: int, budget_bytes: int, parts_us: Mapping[str, float]) -> None:
    """Show what the plan takes of its device: memory, and the time of the parts of the step computed last."""
    memory, seconds = _device_gauges()
    memory.labels("peak").set(peak_bytes)
    memory.labels("budget").set(budget_bytes)
    for part, microseconds in parts_us.items():
        seconds.labels(part).set(microseconds / 1e6)


@cache
def _device_gauges() -> tuple[Gauge, Gauge]:
    """Made where a device serves, as above."""
    memory = "The most memory of its device that the plan took, and may take."
    seconds = "Where the time of the last step went on the device."
    return (
        Gauge("esper_plan_device_memory_bytes", memory, ["kind"], multiprocess_mode=LATEST),
        Gauge("esper_plan_device_part_seconds", seconds, ["part"], multiprocess_mode=LATEST),
    )


def observe_conservative(scope: str, cause: str) -> None:
    """Record that the service or a run is held back from now on, and for what."""
    CONSERVATIVE_ENTRIES.labels(scope, cause).inc()


def observe_breaker_move(breaker: str, state: str) -> None:
    """Record that a breaker is closed, open or half_open now."""
    BREAKER_MOVES.labels(breaker, state).inc()


def observe_urza_timeout(wanted: str) -> None:
    """Record that the library did not answer in its budget: catalogue or extras."""
    URZA_TIMEOUTS.labels(wanted).inc()


def observe_pause(result: str) -> None:
    """Record one request for a pause: full, partial or denied."""
    PAUSE_REQUESTS.labels(result).inc()


def observe_policy_update(result: str, reason: str) -> None:
    """Record a policy that came: applied, shadow, rejected, failed or rolled_back."""
    POLICY_UPDATES.labels(result, reason).inc()


def observe_shadow(*, agrees: bool) -> None:
    """Record a step that the shadow policy followed."""
    SHADOW_DECISIONS.labels(str(agrees).lower()).inc()


def tell_pause_quota(least_remaining: int) -> None:
    """Show the units that are left to the identity that has the fewest."""
    _pause_quota_remaining().set(least_remaining)


@cache
def _pause_quota_remaining() -> Gauge:
    """Made where a quota is kept: any other process would show 0."""
    purpose = "Pause units left in the window of the identity that has the fewest."
    return Gauge("esper_pause_quota_remaining", purpose, multiprocess_mode=LATEST)


def observe_report_published() -> None:
    """Record a field report that the publisher took."""
    REPORTS_PUBLISHED.inc()


def observe_report_retry() -> None:
    """Record that a field report is handed over once more."""
    REPORT_RETRIES.inc()


def observe_report_dropped(reason: str) -> None:
    """Record a field report that is not handed over any more: attempts, outbox, disk, unknown, journal or retention."""
    REPORTS_DROPPED.labels(reason).inc()


def tell_pending_reports(pending: int) -> None:
    """Show how many field reports nobody acknowledged."""
    _reports_pending().set(pending)


@cache
def _reports_pending() -> Gauge:
    """Made where reports are kept: any other process would show 0."""
    purpose = "Field reports that nobody acknowledged."
    return Gauge("esper_field_reports_pending", purpose, multiprocess_mode="livemostrecent")


def observe_step(timing: StepTiming) -> None:
    """Record one step of a trainer."""
    for name, histogram in _STEP_PARTS.items():
        histogram.observe(getattr(timing, name) / 1e6)


def observe_outcome(outcome: CommandOutcome) -> None:
    """Record what became of a command."""
    result = CommandOutcome.Result.Name(outcome.result).removeprefix("RESULT_")
    OUTCOMES.labels(result, outcome.reason).inc()


def observe_checkpoint(tier: str, seconds: float) -> None:
    """Record a checkpoint: memory or disk."""
    CHECKPOINT_SECONDS.labels(tier).observe(seconds)


def observe_checkpoint_failure(tier: str, reason: str) -> None:
    """Record a checkpoint that was not made."""
    CHECKPOINT_FAILURES.labels(tier, reason).inc()


def observe_rollback(tier: str, seconds: float) -> None:
    """Record a rollback: fast or full, empty for one that failed."""
    ROLLBACKS.labels(tier or "failed").inc()
    if tier:
        ROLLBACK_SECONDS.labels(tier).observe(seconds)
