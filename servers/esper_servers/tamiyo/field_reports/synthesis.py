from __future__ import annotations

from collections.abc import Iterator

from esper_rpc.proto.leyline.v1 import FieldReport, FieldReportOutcome, MitigationAction
from esper_servers.tamiyo.risk.reading import DEMAND_NAMES

from .run_trace import COUNT, DEMAND, REASON, Sums
from .window import EndedWindow, JudgedCommand, Window

VERSION = 1
MOST_REASONS = 24
ABORTED, NEUTRAL, REGRESSION, SUCCESS = (
    FieldReportOutcome.FIELD_REPORT_OUTCOME_ABORTED, FieldReportOutcome.FIELD_REPORT_OUTCOME_NEUTRAL,
    FieldReportOutcome.FIELD_REPORT_OUTCOME_REGRESSION, FieldReportOutcome.FIELD_REPORT_OUTCOME_SUCCESS,
)  # fmt: skip
_PREFIX = "fr-synth-"


def report_id_of(command_id: str) -> str:
    """Return the id of the one report on a command."""
    return _PREFIX + command_id


def synthesise(ended: EndedWindow, now_ns: int) -> FieldReport:
    """Write the report on a command whose record was found."""
    window, sums = ended.window, ended.trace.since(ended.window.sums)
    command = window.command or JudgedCommand(command_id=window.command_id, run_id=window.run_id)
    report = FieldReport(
        version=VERSION,
        report_id=report_id_of(window.command_id),
        command_id=window.command_id,
        training_run_id=window.run_id,
        seed_id=command.seed_id,
        blueprint_id=command.blueprint_id,
        outcome=_outcome(ended, sums),
        metrics=dict(_metrics(ended, sums)),
        observation_window_epochs=max(0, ended.trace.epoch - window.epoch),
        tamiyo_policy_version=command.policy_version,
        follow_up_actions=list(_follow_up(sums)),
        notes=_notes(ended, sums),
    )
    report.issued_at.FromNanoseconds(now_ns)
    return report


def loss_delta(ended: EndedWindow) -> float | None:
    """Return the sum of the changes of the loss from step to step; None when it was not told twice.

    It is the last less the first: adding up would lose the small after one that was huge.
    """
    before, after = ended.window.loss, ended.trace.loss
    return None if before is None or after is None else after - before


def _outcome(ended: EndedWindow, sums: Sums) -> FieldReportOutcome.ValueType:
    if not ended.window.is_applied or ended.cut_short:
        return ABORTED
    delta = loss_delta(ended) or 0.0
    # A loss that is no number cannot be added up, and nothing worse can happen to one.
    if delta > 0 or sums["criticals"] or sums["loss_not_finite"]:
        return REGRESSION
    return SUCCESS if delta < 0 else NEUTRAL


def _metrics(ended: EndedWindow, sums: Sums) -> Iterator[tuple[str, float]]:
    window, steps = ended.window, sums["steps"]
    for name in ("steps", "criticals", "loss_not_finite", "breaker_transitions"):
        yield name, sums[name]
    losses = (("at_application", window.loss), ("at_end", ended.trace.loss), ("delta", loss_delta(ended)))
    yield from ((f"loss_{name}", value) for name, value in losses if value is not None)
    yield "worst_demand", max((rank for rank, name in enumerate(DEMAND_NAMES) if sums[DEMAND + name]), default=0)
    if steps:
        yield "risk_score", sums["risk_score"] / steps
        yield "decision_ms", sums["decision_ms"] / steps
    yield from _latencies(window, sums)
    yield from ((REASON + name, count) for name, count in _reasons(sums))


def _latencies(window: Window, sums: Sums) -> Iterator[tuple[str, float]]:
    """The mean of each, and by how much it is above what it was at application."""
    for name in (key.removesuffix(COUNT) for key in sums if key.endswith(COUNT) and sums[key]):
        mean = sums[name] / sums[name + COUNT]
        yield name, mean
        if name in window.latencies:
            yield name + "_delta", mean - window.latencies[name]


def _reasons(sums: Sums) -> list[tuple[str, float]]:
    found = [(name.removeprefix(REASON), n) for name, n in sums.items() if name.startswith(REASON) and n > 0]
    return sorted(found, key=lambda each: -each[1])[:MOST_REASONS]


def _follow_up(sums: Sums) -> Iterator[MitigationAction]:
    if sums["held_back"]:
        rationale = f"the risk called for it in {sums['held_back']:.0f} steps"
        yield MitigationAction(action_type="CONSERVATIVE_MODE", rationale=rationale)


def _notes(ended: EndedWindow, sums: Sums) -> str:
    found = []
    if not ended.window.is_applied:
        found.append(f"not carried out: {ended.window.failure or 'no reason was given'}")
    if ended.cut_short:
        found.append(f"ended before its time: {ended.cut_short}")
    found += [f"{name} in {count:.0f} steps" for name, count in _reasons(sums)]
    return "; ".join(found)
