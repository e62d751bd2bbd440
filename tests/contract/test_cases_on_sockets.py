from __future__ import annotations

import pytest

from esper_servers.contract.case import load_cases
from esper_servers.contract.runner import Runner

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("case", load_cases(), ids=lambda case: case.name)
async def test_a_server_under_mutual_tls_answers_as_the_case_says(case, remote, surroundings, unique):
    result = await Runner(remote, surroundings, unique=unique).run(case)
    assert result.verdict == "passed", result
