from __future__ import annotations

import pytest

from esper_servers.contract.case import load_cases
from esper_servers.contract.direct import DirectTransport
from esper_servers.contract.runner import Runner
from esper_servers.tamiyo.step_service import RAW_METHODS


@pytest.mark.parametrize("case", load_cases(), ids=lambda case: case.name)
async def test_the_servicer_answers_as_the_case_says(case, servicers, surroundings, unique):
    transport = DirectTransport(servicers, raw_methods=RAW_METHODS)
    result = await Runner(transport, surroundings, unique=unique).run(case)
    assert result.verdict == "passed", result
