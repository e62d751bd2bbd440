from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from esper_rpc import rules
from esper_servers.contract.field_rules import rule_cases, sample, smallest
from esper_servers.contract.methods import METHODS
from esper_servers.contract.refusals import run_rule_case

GAPS = yaml.safe_load((Path(__file__).parent / "known_gaps.yaml").read_text()) or {}
RULED = {name: method for name, method in METHODS.items() if any(rule_cases(method))}
SERVED = {name: method for name, method in RULED.items() if name not in GAPS}


def problem(case):
    found = rules.violations(case.request)
    if {violation.field for violation in found} != {case.field} or not any(
        re.search(case.told, violation.description) for violation in found
    ):
        return f"{case.name}: {found}"
    return None


@pytest.mark.parametrize("name", METHODS)
def test_the_smallest_request_breaks_no_rule(name):
    assert rules.violations(smallest(METHODS[name].input_type)) == []


@pytest.mark.parametrize("name", RULED)
def test_a_rule_that_is_broken_is_told_with_its_field_and_nothing_else(name):
    assert [found for case in rule_cases(RULED[name]) if (found := problem(case))] == []


def test_every_rule_of_the_contract_is_broken_somewhere():
    broken = {case.rule for method in METHODS.values() for case in rule_cases(method)}
    assert broken >= {"required", "gte", "lte", "gt", "max_len", "len", "max_items", "finite", "uuid", "enum_defined"}


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_server_refuses_what_breaks_a_rule(name, remote):
    results = [await run_rule_case(remote, case) for case in sample(SERVED[name])]
    assert results
    assert [result for result in results if result.verdict != "passed"] == []
