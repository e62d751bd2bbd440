"""What a server does with a peer whose certificate ends, whose name is denied, or who asks too much."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from esper_client import TamiyoClient
from esper_rpc import errors
from esper_rpc.channel import open_channel
from esper_rpc.identity.deny_list import write_denied
from esper_rpc.proto.tamiyo.v1 import CloseRunRequest, EvaluateStepsResponse
from esper_rpc.quota import QuotaConfig
from esper_rpc.server import MeshServer, ServerConfig
from esper_rpc.testing import TAMIYO, FakeTamiyo

STREAM = "/esper.tamiyo.v1.TamiyoService/EvaluateSteps"
REQUEST = CloseRunRequest(run_id="r")


@pytest.fixture
async def serve(mesh):
    servers = []

    async def start(**settings):
        server = MeshServer(
            config=ServerConfig(drain_seconds=0.1, audit_log=mesh.directory / "audit.jsonl", **settings),
            identity=mesh.identity("tamiyo"),
        )
        server.add_service(TAMIYO, FakeTamiyo(mesh.keyring("tamiyo")), raw_methods=FakeTamiyo.RAW_METHODS)
        servers.append(server)
        return await server.start()

    yield start
    for server in servers:
        await server.drain()


async def end_of(call):
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return await call.code()


async def test_a_denied_member_is_refused_and_its_open_stream_ends(mesh, serve):
    denied = mesh.directory / "denied.json"
    address = await serve(deny_list=denied)
    channel = open_channel(address, identity=mesh.identity("trainer"), role="tamiyo")
    call = channel.stream_stream(STREAM)()
    await call.write(b"")
    await call.read()
    write_denied(denied, {"spiffe://esper/trainer/local": "laptop lost"})
    async with asyncio.timeout(10):
        assert await end_of(call) == grpc.StatusCode.PERMISSION_DENIED
    async with TamiyoClient(address, identity=mesh.identity("trainer")) as client:
        with pytest.raises(errors.PermissionDenied, match="laptop lost"):
            await client.close_run(REQUEST)
    async with TamiyoClient(address, identity=mesh.identity("trainer", "other")) as client:
        await client.close_run(REQUEST)
    await channel.close()


async def test_a_stream_is_asked_to_move_before_its_certificate_ends_and_ended_with_it(mesh, serve):
    address = await serve()
    short = mesh.identity("trainer", "short", lifetime=timedelta(seconds=4))
    channel = open_channel(address, identity=short, role="tamiyo")
    call = channel.stream_stream(STREAM)()
    await call.write(b"")
    assert not EvaluateStepsResponse.FromString(await call.read()).decision.going_away
    async with asyncio.timeout(10):
        assert EvaluateStepsResponse.FromString(await call.read()).decision.going_away
        assert datetime.now(UTC) < short.not_after
        await end_of(call)
    await channel.close()


async def test_a_connection_that_outlives_its_certificate_is_refused_call_by_call(mesh, serve):
    address = await serve()
    short = mesh.identity("trainer", "short", lifetime=timedelta(seconds=3))
    async with TamiyoClient(address, identity=short) as client, asyncio.timeout(15):
        await client.close_run(REQUEST)
        with pytest.raises(errors.Unauthenticated, match="renew it"):
            while True:
                await client.close_run(REQUEST)
                await asyncio.sleep(0.05)


async def test_who_asks_too_often_is_pushed_back_alone(mesh, serve):
    address = await serve(quota=QuotaConfig(calls_per_second=1, burst=3))
    async with TamiyoClient(address, identity=mesh.identity("trainer", "greedy")) as client:
        with pytest.raises(errors.ResourceExhausted) as caught:
            for _ in range(10):
                await client.close_run(REQUEST)
    assert caught.value.retry_after_ms > 0
    async with TamiyoClient(address, identity=mesh.identity("trainer", "modest")) as client:
        await client.close_run(REQUEST)


async def test_who_opens_too_many_streams_is_refused(mesh, serve):
    address = await serve(quota=QuotaConfig(streams=2))
    channel = open_channel(address, identity=mesh.identity("trainer"), role="tamiyo")
    held = []
    for _ in range(2):
        held.append(channel.stream_stream(STREAM)())
        await held[-1].write(b"")
        await held[-1].read()
    assert await channel.stream_stream(STREAM)().code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    await channel.close()


async def test_refusals_reach_the_audit_log(mesh, serve):
    address = await serve()
    async with TamiyoClient(address, identity=mesh.identity("urza")) as client:
        with pytest.raises(errors.PermissionDenied):
            await client.close_run(REQUEST)
    path = mesh.directory / "audit.jsonl"
    async with asyncio.timeout(5):
        while not path.exists() or "spiffe://esper/urza/local" not in path.read_text():
            await asyncio.sleep(0.01)
