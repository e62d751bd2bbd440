from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import esper_client
from esper_rpc import rules
from esper_rpc.identity import SpiffeId
from esper_rpc.identity.authorisation import TABLE
from esper_rpc.identity.service import IdentityServicer
from esper_rpc.proto.leyline.v1 import SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import StepDecision
from esper_servers.contract.case import load_cases
from esper_servers.contract.direct import DirectTransport
from esper_servers.contract.field_rules import smallest
from esper_servers.contract.methods import CLIENTS, METHODS
from esper_servers.kasmina.service import KasminaServicer
from esper_servers.tamiyo.service import TamiyoServicer
from esper_servers.tolaria.service import TolariaServicer
from esper_servers.urza.service import UrzaServicer

GAPS = yaml.safe_load((Path(__file__).parent / "known_gaps.yaml").read_text()) or {}
CASES = load_cases()
SERVICERS = {
    "esper.identity.v1.IdentityService": IdentityServicer,
    "esper.kasmina.v1.KasminaService": KasminaServicer,
    "esper.tamiyo.v1.TamiyoService": TamiyoServicer,
    "esper.tolaria.v1.TolariaService": TolariaServicer,
    "esper.urza.v1.UrzaService": UrzaServicer,
}


def cases_of(method):
    return [case for case in CASES if case.call.method is method]


def test_every_known_gap_names_an_rpc_and_what_it_waits_for():
    assert set(GAPS) <= set(METHODS)
    assert all(GAPS.values())


@pytest.mark.parametrize("name", METHODS)
def test_every_rpc_has_a_row_in_the_authorisation_table(name):
    assert TABLE[f"/{name}"]


@pytest.mark.parametrize("name", METHODS)
def test_an_rpc_has_a_servicer_method_exactly_when_it_is_no_known_gap(name):
    service, method = name.split("/")
    assert hasattr(SERVICERS[service], method) == (name not in GAPS)


@pytest.mark.parametrize("name", METHODS)
def test_the_sdk_has_a_method_for_every_rpc_with_and_without_asyncio(name):
    service, method = name.split("/")
    name_in_python = re.sub(r"(?<!^)(?=[A-Z])", "_", method).lower()
    client = CLIENTS[service]
    blocking = getattr(esper_client, f"Blocking{client.__name__}")
    assert blocking.client is client
    assert getattr(blocking, name_in_python).__wrapped__ is getattr(client, name_in_python)


@pytest.mark.parametrize("name", METHODS)
def test_an_rpc_has_a_case_that_succeeds_exactly_when_it_is_no_known_gap(name):
    assert any(case.is_success for case in cases_of(METHODS[name])) == (name not in GAPS)


@pytest.mark.parametrize("name", METHODS)
def test_every_rpc_has_a_case_that_fails(name):
    assert any(not case.is_success for case in cases_of(METHODS[name]))


@pytest.mark.parametrize("name", GAPS)
@pytest.mark.parametrize("way", ["direct", "remote"])
@pytest.mark.asyncio(loop_scope="module")
async def test_a_known_gap_answers_that_it_is_not_implemented(name, way, remote):
    method = METHODS[name]
    transport = remote if way == "remote" else DirectTransport({s: object() for s in SERVICERS})
    request = smallest(method.input_type)
    assert not rules.violations(request)
    answer = await transport.call(method, [request.SerializeToString()], SpiffeId("operator", "local"), None)
    assert answer.code == "UNIMPLEMENTED", answer


def reached_from(message):
    """The names of a message and of every message in it."""
    found, ahead = set(), [message]
    while ahead:
        each = ahead.pop()
        if each.full_name not in found:
            found.add(each.full_name)
            ahead += [field.message_type for field in each.fields if field.message_type]
    return found


def test_a_decision_is_the_answer_to_whoever_asked_with_a_state_and_reaches_nobody_otherwise():
    decision, state = StepDecision.DESCRIPTOR.full_name, SystemStatePacket.DESCRIPTOR.full_name
    service = "esper.tamiyo.v1.TamiyoService"
    asking = {f"{service}/{method}" for method in ("EvaluateStep", "EvaluateSteps", "EvaluateEpoch")}
    assert {name for name, method in METHODS.items() if decision in reached_from(method.output_type)} == asking
    assert {name for name, method in METHODS.items() if state in reached_from(method.input_type)} == asking
