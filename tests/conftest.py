from __future__ import annotations

import gc
import os

import pytest
import structlog

from esper_rpc.testing import TemporaryMesh

# Building takes a minute or two of a core for each mesh; tests/integration/test_compiled_plan.py does it once.
os.environ["ESPER_PLAN_COMPILE"] = "false"
# Tests run side by side: threads of torch that wait for each other's cores are a hundred times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    # What is imported and collected lives as long as the run: looking through it again and again frees nothing.
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Run what takes long first, lest one worker be left with it at the end."""
    items.sort(key=lambda item: "integration" not in item.path.parts)


@pytest.fixture(autouse=True)
def _logging_as_it_starts():
    # Attaching to a model keeps the log of its process quiet, and with it that of the tests that follow.
    structlog.reset_defaults()


@pytest.fixture
def mesh(tmp_path):
    return TemporaryMesh(tmp_path / "home")
