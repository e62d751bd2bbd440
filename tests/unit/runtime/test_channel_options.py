from __future__ import annotations

from pathlib import Path

import pytest
from grpc._cython import cygrpc

from esper_rpc import channel

OPTIONS = [name for name, _ in (*channel.KEEPALIVE_OPTIONS, *channel.MESSAGE_OPTIONS, *channel.RECONNECT_OPTIONS)]


@pytest.fixture(scope="module")
def library():
    return Path(cygrpc.__file__).read_bytes()


@pytest.mark.parametrize("name", OPTIONS)
def test_grpc_knows_every_option(library, name):
    # It ignores a name that it does not know, and keeps its default.
    assert name.encode() + b"\0" in library
