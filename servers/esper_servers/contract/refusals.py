"""Sends requests with a broken rule, and judges how they are refused."""

from __future__ import annotations

import re

from google.protobuf.descriptor import MethodDescriptor

from esper_rpc.identity import SpiffeId
from esper_rpc.identity.authorisation import TABLE
from esper_rpc.identity.peer import STRANGER

from .answer import Answer, Transport
from .case import NotApplicable
from .field_rules import RuleCase
from .methods import name_of
from .runner import Result

INVALID_ARGUMENT = 3


def permitted_caller(method: MethodDescriptor) -> SpiffeId:
    """Choose somebody who may call a method: an operator where there is a choice."""
    roles = TABLE[f"/{name_of(method)}"]
    if STRANGER.role in roles:
        return STRANGER
    return SpiffeId("operator" if "operator" in roles else min(roles), "local")


async def run_rule_case(transport: Transport, case: RuleCase) -> Result:
    """Send the request of a rule case."""
    try:
        raw = case.request.SerializeToString()
        answer = await transport.call(case.method, [raw], permitted_caller(case.method), None)
    except NotApplicable as reason:
        return Result(name=case.name, rpc=case.method.name, skipped=str(reason))
    if answer.code == "UNIMPLEMENTED":
        return Result(name=case.name, rpc=case.method.name, skipped="the server does not offer this RPC")
    return Result(name=case.name, rpc=case.method.name, problems=tuple(judge_refusal(case, answer)))


def judge_refusal(case: RuleCase, answer: Answer) -> list[str]:
    """Say in what an answer does not name the field and the rule, and no other field."""
    told = _refusal_of(answer)
    if told is None:
        return [f"the status is {answer.code}, expected INVALID_ARGUMENT"]
    if not any(field == case.field and re.search(case.told, text) for field, text in told):
        return [f"BadRequest names {told}, expected {case.field} to match {case.told}"]
    others = sorted({field for field, _ in told} - {case.field})
    return [f"BadRequest names {', '.join(others)}, which are well"] if others else []


def _refusal_of(answer: Answer) -> list[tuple[str, str]] | None:
    """The fields that an INVALID_ARGUMENT names; None for any other answer."""
    if answer.code == "INVALID_ARGUMENT":
        return list(answer.violations)
    in_band = answer.responses[0].get("decision", {}).get("error", {}) if answer.responses else {}
    if in_band.get("code") != INVALID_ARGUMENT:
        return None
    found = [v for detail in in_band["details"] for v in detail.get("field_violations", ())]
    return [(violation["field"], violation["description"]) for violation in found]
