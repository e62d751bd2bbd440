from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import typer
from google.protobuf.json_format import MessageToDict

from esper_client.client import TamiyoClient
from esper_rpc.proto.leyline.v1 import CommandType, SeedOperation
from esper_rpc.proto.tamiyo.v1 import (
    ExplainDecisionRequest,
    ExplainDecisionResponse,
    NumberArray,
    ReplayDecisionRequest,
    ReplayDecisionResponse,
    RiskVerdict,
)

from .console import EXIT_FAILURE, AddressOption, HomeOption, JsonOption, home_of, print_json, print_rows, run
from .home import Home

DecisionArgument = Annotated[
    str,
    typer.Argument(help="The identifier of a command, or RUN/SEQUENCE of a step without one.", show_default=False),
]
Asked = TypeVar("Asked", ExplainDecisionRequest, ReplayDecisionRequest)


def explain(
    context: typer.Context,
    decision: DecisionArgument,
    address: AddressOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show why a command was given, or none: inputs, signals, risk, policy and where the time went.

    Of a step that only a dump of the flight recorder holds: what came and what was answered.
    """
    record = run(_explain(home_of(context, home), address, decision))
    if as_json:
        print_json(_document(record))
        return
    for title, rows in _tables(record).items():
        print_rows(title, [{"name": name, "value": value} for name, value in rows.items()], as_json=False)


def replay(
    context: typer.Context,
    decision: DecisionArgument,
    address: AddressOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let Tamiyo decide again from the record of a decision; exits with 1 when anything comes out otherwise."""
    answer = run(_replay(home_of(context, home), address, decision))
    if as_json:
        print_json({"identical": answer.identical, "differences": list(answer.differences)})
    else:
        typer.echo("Identical, bit for bit." if answer.identical else "\n".join(answer.differences))
    if not answer.identical:
        raise typer.Exit(EXIT_FAILURE)


async def _explain(home: Home, address: str | None, decision: str) -> ExplainDecisionResponse:
    async with TamiyoClient(home.address("tamiyo", address), identity=home.identity()) as client:
        return await client.explain_decision(_named(ExplainDecisionRequest, decision))


async def _replay(home: Home, address: str | None, decision: str) -> ReplayDecisionResponse:
    async with TamiyoClient(home.address("tamiyo", address), identity=home.identity()) as client:
        return await client.replay_decision(_named(ReplayDecisionRequest, decision))


def _named(kind: type[Asked], decision: str) -> Asked:
    run_id, _, sequence = decision.rpartition("/")
    if run_id and sequence.isdecimal():
        return kind(run_id=run_id, sequence=int(sequence))
    return kind(command_id=decision)


def _document(record: ExplainDecisionResponse) -> dict[str, Any]:
    """The record as JSON, its arrays as nested lists."""
    document: dict[str, Any] = MessageToDict(record, preserving_proto_field_name=True)
    evidence = record.evidence
    for name, arrays in (("features", evidence.features), ("masks", evidence.masks), ("outputs", evidence.outputs)):
        if arrays:
            document["evidence"][name] = _lists(arrays)
    return document


def _lists(arrays: Mapping[str, NumberArray]) -> dict[str, Any]:
    from esper_servers.tamiyo.records.arrays import read_array

    return {name: read_array(array).tolist() for name, array in sorted(arrays.items())}


def _rounded(outputs: Mapping[str, NumberArray]) -> dict[str, Any]:
    """The outputs that are about the run as a whole; those for each seed or blueprint are in the JSON."""
    from esper_servers.policy.schema import KIND_NAMES, PARAMETER_NAMES
    from esper_servers.tamiyo.records.arrays import read_array

    names = [name for name in ("kind", "risk", "value", "parameters") if name in outputs]
    found = {name: read_array(outputs[name]).round(4).tolist() for name in names}
    kinds = zip(KIND_NAMES, found.pop("kind", ()), strict=False)
    parameters = dict(zip(PARAMETER_NAMES, found.pop("parameters", ()), strict=False))
    return {f"kind: {kind}": value for kind, value in kinds} | found | parameters


def _tables(record: ExplainDecisionResponse) -> dict[str, dict[str, Any]]:
    """What is shown, by title; a table without rows is left out."""
    evidence = record.evidence
    seeds = {state.seed_id: MessageToDict(state)["stage"] for state in record.packet.seed_states if state.stage}
    tables: dict[str, dict[str, Any]] = {
        "Decision": _summary(record),
        "Inputs": {**_sorted(record.packet.training_metrics), **seeds},
        "Signals": _sorted(evidence.signals),
        "Remembered before": _sorted(evidence.memory),
        "Risk": _risk(evidence.verdict) if record.HasField("evidence") else {},
        "Policy": _rounded(evidence.outputs),
        "Ledger": {field.name: getattr(record.ledger, field.name) for field in record.ledger.DESCRIPTOR.fields},
    }
    return {title: rows for title, rows in tables.items() if rows}


def _summary(record: ExplainDecisionResponse) -> dict[str, Any]:
    command, change = record.command, record.command.seed_operation
    operation = SeedOperation.Name(change.operation).removeprefix("SEED_OPERATION_") if change.operation else ""
    rows = {
        "command": command.command_id,
        "type": _type_of(record),
        "operation": operation,
        "seed": command.target_seed_id,
        "blueprint": change.blueprint_id,
        "reason": record.reason,
        "run": record.evidence.run_id,
        "step": record.packet.global_step,
        "issued": command.issued_at.ToJsonString() if record.HasField("command") else "",
        "policy": record.policy_version,
        "plan": record.evidence.plan,
        "policy digest": record.evidence.policy_digest.hex(),
        "conservative mode": record.evidence.conservative if record.HasField("evidence") else "",
        "dump": record.dump_id,
        "evidence": "none was kept: this is what the trainer sent and got" if record.dump_id else "",
    }
    return {name: value for name, value in rows.items() if value != ""}


def _type_of(record: ExplainDecisionResponse) -> str:
    if not record.HasField("command"):
        return "NO_ACTION"
    return CommandType.Name(record.command.command_type).removeprefix("COMMAND_TYPE_")


def _risk(verdict: RiskVerdict) -> dict[str, Any]:
    """What the risk engine said, and after it each signal that demanded something."""
    rows = {
        "allowed": list(verdict.allowed_kinds),
        "forced": verdict.forced_kind,
        "demand": verdict.demand,
        "reason": verdict.reason,
        "score": round(verdict.score, 4),
    }
    readings = sorted(verdict.readings.items())
    return rows | {name: f"{read.demand}: {read.reason}" for name, read in readings if read.reason}


def _sorted(numbers: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(numbers.items()))
