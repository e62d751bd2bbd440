"""Retries, hedges and breakers of the clients, against a server that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import pytest

from esper_client import UrzaClient
from esper_client.hedging import Hedge, HedgeConfig
from esper_rpc import errors
from esper_rpc.breaker import BreakerConfig
from esper_rpc.proto.urza.v1 import (
    GetExtrasRequest,
    GetExtrasResponse,
    SaveBlueprintRequest,
    urza_service_pb2,
)
from esper_rpc.testing import serving

URZA = urza_service_pb2.DESCRIPTOR.services_by_name["UrzaService"]
REQUEST = GetExtrasRequest(blueprint_id="b")


class Moody:
    """An Urza that does with the n-th call what a list says."""

    def __init__(self, *moods):
        self.moods = list(moods)
        self.calls = 0

    async def GetExtras(self, request, call):
        self.calls += 1
        mood = self.moods[min(self.calls, len(self.moods)) - 1]
        if isinstance(mood, Exception):
            raise mood
        await asyncio.sleep(mood)
        return GetExtrasResponse()

    async def SaveBlueprint(self, request, call):
        self.calls += 1
        raise self.moods[0]


async def ask(mesh, urza, **options):
    async with serving(mesh.identity("urza"), (URZA, urza)) as server:
        async with UrzaClient(server.address, identity=mesh.identity("operator"), **options) as client:
            try:
                await client.get_extras(REQUEST)
            except errors.EsperError as error:
                return client, error
            return client, None


async def test_a_read_is_retried_when_the_server_pushes_back(mesh):
    urza = Moody(errors.ResourceExhausted("full", retry_after_ms=5), 0)
    assert (await ask(mesh, urza, hedge=HedgeConfig(after_seconds=10)))[1] is None
    assert urza.calls == 2


async def test_an_error_that_is_an_answer_is_not_retried(mesh):
    urza = Moody(errors.NotFound("no such blueprint"))
    _, error = await ask(mesh, urza, hedge=HedgeConfig(after_seconds=10))
    assert isinstance(error, errors.NotFound)
    assert urza.calls == 1


async def test_a_slow_read_is_asked_twice_and_the_first_answer_taken(mesh):
    urza = Moody(30, 0)
    async with asyncio.timeout(10):
        client, error = await ask(mesh, urza)
    assert (error, client.hedge.hedged, urza.calls) == (None, 1, 2)


async def test_a_write_is_neither_retried_nor_hedged(mesh):
    urza = Moody(errors.Unavailable("down"))
    async with serving(mesh.identity("urza"), (URZA, urza)) as server:
        async with UrzaClient(server.address, identity=mesh.identity("operator")) as client:
            request = SaveBlueprintRequest()
            request.blueprint.descriptor.blueprint_id = "b"
            with pytest.raises(errors.EsperError):
                await client.save_blueprint(request)
    assert urza.calls <= 1


async def test_a_server_that_is_slow_for_everyone_does_not_get_twice_the_load():
    hedge = Hedge(HedgeConfig(after_seconds=0.001, ratio=0.1))

    async def slow():
        await asyncio.sleep(0.01)

    for _ in range(50):
        await hedge.first(slow)
    assert hedge.hedged <= 7


async def test_a_hedge_whose_first_attempt_fails_waits_for_the_second():
    answers = iter([asyncio.Event(), None])

    async def attempt():
        event = next(answers)
        if event is not None:
            await asyncio.sleep(0.02)
            raise errors.Unavailable("gone")
        await asyncio.sleep(0.05)
        return "second"

    assert await Hedge(HedgeConfig(after_seconds=0.001)).first(attempt) == "second"


async def test_an_attempt_that_is_given_up_says_nothing_of_the_peer(mesh):
    urza = Moody(errors.Internal("broken"), errors.Internal("broken"), 30)
    async with serving(mesh.identity("urza"), (URZA, urza)) as server:
        async with UrzaClient(server.address, identity=mesh.identity("operator")) as client:
            ask_once = partial(client._unary, "GetExtras", REQUEST, GetExtrasResponse, 60.0)
            for _ in range(2):
                with pytest.raises(errors.Internal):
                    await ask_once()
            attempt = asyncio.create_task(ask_once())
            while urza.calls < 3:
                await asyncio.sleep(0.001)
            attempt.cancel()
            with pytest.raises(asyncio.CancelledError):
                await attempt
            assert client._breakers["GetExtras"].consecutive_failures == 2


async def test_the_breaker_of_a_method_opens_alone_and_closes_after_a_success(mesh):
    urza, never = Moody(*[errors.Internal("broken")] * 3, 0), HedgeConfig(after_seconds=60)
    breaker = BreakerConfig(failures=3, cool_down_seconds=3600, successes=1)
    async with serving(mesh.identity("urza"), (URZA, urza)) as server:
        async with UrzaClient(
            server.address, identity=mesh.identity("operator"), breaker=breaker, hedge=never
        ) as client:
            for _ in range(3):
                with pytest.raises(errors.Internal):
                    await client.get_extras(REQUEST)
            with pytest.raises(errors.Unavailable) as caught:
                await client.get_extras(REQUEST)
            assert (caught.value.reason, urza.calls) == ("BREAKER_OPEN", 3)
            client._breakers["GetExtras"]._clock = lambda: time.monotonic() + 3600
            await client.get_extras(REQUEST)
            assert client._breakers["GetExtras"].consecutive_failures == 0
