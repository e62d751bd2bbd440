from __future__ import annotations

import pytest

from esper_rpc.testing import TemporaryMesh


@pytest.fixture
def mesh(tmp_path):
    return TemporaryMesh(tmp_path / "home")
