from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import typer

from esper_client import LoopThread
from esper_rpc.channel import KEEPALIVE_OPTIONS, MESSAGE_OPTIONS, open_channel
from esper_rpc.guard import StepGuard
from esper_rpc.server import announce
from esper_servers.cli.console import HomeOption, JsonOption, environ_of, home_of, run
from esper_servers.cli.home import Home
from esper_servers.cli.processes import child_environ, cli_command, end, lines_until, parse_event

from .measure import CountOption, Pace, machine, percentiles, scratch_home, show, timed_ms

UNARY = "/esper.bench.Echo/Unary"
STREAM = "/esper.bench.Echo/Stream"
# About what a step of a run with four seeds weighs.
PAYLOAD_BYTES = 1200
_GUARD_SECONDS = 1.0
_START_SECONDS = 20.0


def echo(context: typer.Context, steps: CountOption = 1000, as_json: JsonOption = False) -> None:
    """Measure bare gRPC under the mesh's mutual TLS: the floor of every step."""
    with scratch_home() as home, serving(home, environ_of(context)) as running:
        document = {"echo": measure(home, running.address, steps), "payload_bytes": PAYLOAD_BYTES, "machine": machine()}
    show("echo", document, as_json=as_json)


def echo_server(context: typer.Context, home: HomeOption = None) -> None:
    """Serve bare echoes until SIGTERM."""
    run(_serve(home_of(context, home)))


@dataclass(frozen=True, slots=True)
class Running:
    """A server of the benchmarks, in a process of its own."""

    address: str
    pid: int


@contextlib.contextmanager
def serving(home: Home, environ: Any, server: str = "echo-server", *options: str) -> Iterator[Running]:
    """Run a server of the benchmarks as a process of its own."""
    command = [*cli_command(), "bench", server, "--home", str(home.directory), *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, env=child_environ(home, environ), start_new_session=True
    )
    assert process.stdout is not None
    try:
        address = next(
            str(event["address"])
            for event in map(parse_event, lines_until(process.stdout, _START_SECONDS))
            if event.get("event") == "serving"
        )
        yield Running(address, process.pid)
    finally:
        end(process)


def measure(home: Home, address: str, steps: int) -> dict[str, Any]:
    """Time exchanges back to back and paced, on a stream and as unary calls."""
    with EchoCaller(home, address) as caller:
        paced = max(20, steps // 4)
        return {
            "stream": percentiles(timed_ms(caller.stream, steps)),
            "unary": percentiles(timed_ms(caller.unary, steps)),
            "paced": {
                "stream": percentiles(_paced(caller.stream, paced)),
                "unary": percentiles(_paced(caller.unary, paced)),
            },
        }


def _paced(work: Callable[[], object], count: int) -> list[float]:
    pace, times = Pace(), []
    for _ in range(count):
        pace()
        times += timed_ms(work, 1, warm_up=0)
    return times


class EchoCaller:
    """Asks as a session does: a loop thread, a single writer, a guard on the calling thread."""

    def __init__(self, home: Home, address: str) -> None:
        self._thread = LoopThread("echo-loop")
        self._guard: StepGuard[bytes] = StepGuard()
        self._sequence = 0
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._open = self._thread.run(self._connect(home, address))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.run(self._open.close())
        self._thread.stop()

    def stream(self) -> None:
        """Exchange one message on the stream."""
        self._sequence += 1
        payload = self._sequence.to_bytes(8, "little").ljust(PAYLOAD_BYTES, b"\1")
        started = self._guard.arm(self._sequence)
        self._thread.loop.call_soon_threadsafe(self._outgoing.put_nowait, payload)
        self._guard.wait(started, _GUARD_SECONDS)

    def unary(self) -> None:
        """Exchange one message in a call of its own."""
        self._thread.run(self._call(bytes(PAYLOAD_BYTES)))

    async def _connect(self, home: Home, address: str) -> Any:
        channel = open_channel(address, identity=home.identity("trainer"), role="tamiyo")
        self._unary: Any = channel.unary_unary(UNARY)
        call: Any = channel.stream_stream(STREAM)()
        self._tasks = [asyncio.ensure_future(self._write(call)), asyncio.ensure_future(self._read(call))]
        return channel

    async def _call(self, payload: bytes) -> None:
        await self._unary(payload)

    async def _write(self, call: Any) -> None:
        while True:
            await call.write(await self._outgoing.get())

    async def _read(self, call: Any) -> None:
        async for answer in call:
            self._guard.resolve(int.from_bytes(answer[:8], "little"), answer)


async def _serve(home: Home) -> None:
    import grpc

    options = [("grpc.so_reuseport", 0), *KEEPALIVE_OPTIONS, *MESSAGE_OPTIONS]
    server = grpc.aio.server(options=options)
    handlers: dict[str, Any] = {
        "Unary": grpc.unary_unary_rpc_method_handler(_echo),
        "Stream": grpc.stream_stream_rpc_method_handler(_echo_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("esper.bench.Echo", handlers),))
    port = server.add_secure_port("127.0.0.1:0", home.identity("tamiyo").server_credentials())
    await server.start()
    announce("echo", f"127.0.0.1:{port}")
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await server.stop(0.5)


async def _echo(request: bytes, _context: Any) -> bytes:
    return request


async def _echo_stream(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request
