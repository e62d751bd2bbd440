"""Peers that misbehave: floods, half-open connections, huge and empty messages, and a server told to stop under load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import grpc
import pytest

from esper_client import TamiyoClient
from esper_rpc import errors
from esper_rpc.channel import open_channel
from esper_rpc.proto.leyline.v1 import SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import (
    CloseRunRequest,
    EvaluateStepRequest,
    ExplainDecisionRequest,
    OpenRunRequest,
    Step,
)
from esper_rpc.quota import QuotaConfig
from esper_rpc.server import MeshServer, ServerConfig
from esper_rpc.testing import TAMIYO, FakeTamiyo
from esper_servers.cli.processes import cli_command
from esper_servers.policy import sample

SERVICE = "/esper.tamiyo.v1.TamiyoService/"
REQUEST = CloseRunRequest(run_id="r")
MIB = 1024 * 1024
OPENS = 10_000


@pytest.fixture
async def server(mesh):
    quota = QuotaConfig(calls_per_second=1e6, burst=1_000_000)
    running = MeshServer(config=ServerConfig(drain_seconds=0.1, quota=quota), identity=mesh.identity("tamiyo"))
    running.add_service(TAMIYO, FakeTamiyo(mesh.keyring("tamiyo")), raw_methods=FakeTamiyo.RAW_METHODS)
    await running.start()
    yield running
    await running.drain()


async def is_served(mesh, server, name="witness"):
    async with TamiyoClient(server.address, identity=mesh.identity("trainer", name)) as client:
        await client.close_run(REQUEST, timeout=5)
    return True


def memory_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def code_of(call):
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("size", [0, 1, 10 * MIB], ids=["empty", "one byte", "10 MiB"])
async def test_a_message_of_any_size_gets_an_answer(mesh, server, size):
    channel = open_channel(server.address, identity=mesh.identity("trainer"), role="tamiyo")
    code = await code_of(channel.unary_unary(SERVICE + "OpenRun")(b"\xff" * size, timeout=10))
    await channel.close()
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert await is_served(mesh, server)


async def test_a_message_beyond_the_limit_is_refused_before_it_is_read(mesh, server):
    channel = grpc.aio.secure_channel(
        server.address, mesh.identity("trainer").channel_credentials(),
        options=[("grpc.ssl_target_name_override", "tamiyo.esper"), ("grpc.max_send_message_length", -1)],
    )  # fmt: skip
    code = await code_of(channel.unary_unary(SERVICE + "OpenRun")(bytes(40 * MIB), timeout=20))
    await channel.close()
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await is_served(mesh, server)


async def test_a_peer_that_floods_one_stream_is_held_back_and_others_are_served(mesh, server):
    channel = open_channel(server.address, identity=mesh.identity("trainer", "flood"), role="tamiyo")
    call = channel.stream_stream(SERVICE + "EvaluateSteps")()
    before = memory_mb()

    async def flood():
        while True:
            await call.write(b"\xff" * 100_000)

    flooding = asyncio.create_task(flood())
    for number in range(20):
        assert await is_served(mesh, server, f"witness-{number}")
    flooding.cancel()
    await channel.close()
    # It never reads its answers: what is under way is bounded by flow control and the inbox.
    assert memory_mb() - before < 200


class SlowWay:
    """Connections to an address whose first bytes take long."""

    def __init__(self, address, seconds):
        self._host, _, self._port = address.rpartition(":")
        self._seconds = seconds
        self.connections = 0

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_):
        self._server.close()

    async def _serve(self, reader, writer):
        self.connections += 1
        first = await reader.read(65536)
        onward_reader, onward_writer = await asyncio.open_connection(self._host, int(self._port))
        await asyncio.sleep(self._seconds)
        onward_writer.write(first)
        await asyncio.gather(self._pass_on(reader, onward_writer), self._pass_on(onward_reader, writer))

    @staticmethod
    async def _pass_on(reader, writer):
        with contextlib.suppress(ConnectionError):
            while some := await reader.read(65536):
                writer.write(some)
        writer.close()


async def test_a_peer_whose_handshake_takes_long_is_reached_at_the_first_attempt(mesh, server):
    way = SlowWay(server.address, 1.5)  # Longer than the longest backoff.
    async with way as address, TamiyoClient(address, identity=mesh.identity("trainer")) as client:
        await client.close_run(REQUEST, timeout=20)
    assert way.connections == 1


async def test_half_open_and_silent_connections_keep_nobody_out(mesh, server):
    host, _, port = server.address.rpartition(":")
    sockets = [socket.create_connection((host, int(port))) for _ in range(200)]
    for number, connection in enumerate(sockets):
        connection.sendall(b"\x16\x03\x01" if number % 2 else b"GET / HTTP/1.1\r\n\r\n")
    assert await is_served(mesh, server)
    for connection in sockets:
        connection.close()
    assert await is_served(mesh, server)


async def test_ten_thousand_streams_opened_and_closed_leave_nothing_behind(mesh, server):
    channel = open_channel(server.address, identity=mesh.identity("trainer"), role="tamiyo")

    async def open_and_close(abruptly):
        call = channel.stream_stream(SERVICE + "EvaluateSteps")()
        await call.write(b"")
        await call.read()
        if abruptly:
            call.cancel()
        else:
            await call.done_writing()

    async def many(count):
        for number in range(count // 20):
            await asyncio.gather(*(open_and_close(number % 2 == 0) for _ in range(20)))

    await many(OPENS // 10)
    before, descriptors = memory_mb(), open_files()
    await many(OPENS)
    assert memory_mb() - before < 60
    assert open_files() <= descriptors + 5
    await channel.close()
    assert await is_served(mesh, server)


def opening():
    return OpenRunRequest(
        run_id="r", protocol_versions=[2], receiver_epoch=bytes(range(16)), features=["seed"],
        sites=sample.sample_sites(), seeds=sample.sample_seeds(),
    )  # fmt: skip


def step(sequence):
    from esper_servers.policy.masks import LEGAL_OPERATIONS

    states = sample.sample_states(list(LEGAL_OPERATIONS)[1])
    packet = SystemStatePacket(
        version=1, packet_id=str(sequence), training_metrics={"loss": 1.0}, global_step=sequence, seed_states=states
    )
    return EvaluateStepRequest(step=Step(run_id="r", sequence=sequence, budget_us=2_000_000, packet=packet))


async def test_a_server_told_to_stop_under_load_loses_nothing_that_it_accepted(mesh):
    mesh.identity("tamiyo"), mesh.identity("operator")
    command = [*cli_command(), "serve", "tamiyo", "--home", str(mesh.directory), "--urza", "127.0.0.1:1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    address = json.loads(process.stdout.readline())["address"]
    issued, broken = [], []

    async with TamiyoClient(address, identity=mesh.identity("trainer")) as client:
        await client.open_run(opening())
        for sequence in range(1, 100_000):
            if sequence == 60:
                process.send_signal(signal.SIGTERM)
            try:
                decision = (await client.evaluate_step(step(sequence))).decision
            except errors.Unavailable:
                break
            except errors.EsperError as error:
                broken.append(error)
                break
            if decision.HasField("command"):
                issued.append(decision.command.nonce)
    assert await asyncio.to_thread(process.wait, 20) == 0
    process.stdout.close()
    assert not broken
    assert issued

    restarted = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = json.loads(restarted.stdout.readline())["address"]
        async with TamiyoClient(address, identity=mesh.identity("operator")) as client:
            for command_id in issued:
                await client.explain_decision(ExplainDecisionRequest(command_id=command_id))
    finally:
        restarted.terminate()
        restarted.wait()
        restarted.stdout.close()
