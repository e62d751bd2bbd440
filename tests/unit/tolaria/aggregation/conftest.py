from __future__ import annotations

import pytest

from esper_rpc.telemetry import events


@pytest.fixture
def told():
    packets = []
    stop = events.listen(packets.append)
    yield lambda: [(event.description, dict(event.attributes)) for packet in packets for event in packet.events]
    stop()
