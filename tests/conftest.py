from __future__ import annotations

import os

import pytest

from esper_rpc.testing import TemporaryMesh

# Building takes half a minute of a core for each mesh; tests/integration/test_compiled_plan.py does it once.
os.environ["ESPER_PLAN_COMPILE"] = "false"


@pytest.fixture
def mesh(tmp_path):
    return TemporaryMesh(tmp_path / "home")
