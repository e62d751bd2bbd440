from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from esper_client.decision_stream import DecisionStream
from esper_rpc.errors import Unavailable
from esper_rpc.testing import TemporaryMesh

ATTEMPTS = 3


@pytest.mark.parametrize("error", [Unavailable("refused"), LookupError("a fault of ours")], ids=["mesh", "ours"])
async def test_whatever_keeps_it_from_opening_it_tries_again_and_warns_once(tmp_path, error):
    attempts, tried = [], asyncio.Event()

    def describe():
        attempts.append(1)
        if len(attempts) > ATTEMPTS:
            tried.set()
        raise error

    stream = DecisionStream(
        address="127.0.0.1:1", identity=TemporaryMesh(tmp_path).identity("trainer"), describe=describe,
        on_decision=print, on_open=print, is_awaited=bool,
    )  # fmt: skip
    with capture_logs() as logged:
        running = asyncio.create_task(stream.run())
        async with asyncio.timeout(60):
            await asyncio.wait({running, asyncio.create_task(tried.wait())}, return_when=asyncio.FIRST_COMPLETED)
    assert not running.done()
    running.cancel()
    told = [entry for entry in logged if entry["event"] == "decision_stream_not_opened"]
    assert [entry["log_level"] for entry in told[:ATTEMPTS]] == ["warning", "info", "info"]
    assert str(error) in told[0]["error"]
    assert "esper doctor" in told[0]["hint"]
    assert (told[0]["exc_info"] is error) == isinstance(error, LookupError)
    assert not stream.is_open
