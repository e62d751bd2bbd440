from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import structlog
import typer

from esper_client import HaltSwitch, LoopThread, TolariaClient
from esper_rpc.envelope import Keyring
from esper_rpc.envelope.emergency import SCHEMA_VERSION, seal
from esper_rpc.identity import Identity
from esper_rpc.proto.leyline.v1 import EmergencyLevel, EmergencySignal
from esper_rpc.proto.tolaria.v1 import SignalEmergencyRequest, tolaria_service_pb2
from esper_rpc.server import MeshServer, ServerConfig
from esper_servers.cli.console import JsonOption
from esper_servers.cli.home import Home

from .measure import machine, percentiles, scratch_home, show

if TYPE_CHECKING:
    from esper_servers.tolaria.emergency.emergencies import Emergencies
    from esper_servers.tolaria.emergency.shared_signal import SharedSignal

TOLARIA = tolaria_service_pb2.DESCRIPTOR.services_by_name["TolariaService"]
RUN = "bench-emergency"
HALT, NOTICE = EmergencyLevel.EMERGENCY_LEVEL_HALT, EmergencyLevel.EMERGENCY_LEVEL_NOTICE
TARGET_MS = 100.0
PATIENCE_SECONDS = 60.0
LOOK_SECONDS = 0.001

ProcessesOption = Annotated[int, typer.Option("--processes", min=1, max=64, help="How many processes train.")]
RoundsOption = Annotated[int, typer.Option("--rounds", min=1, max=3_000, help="How often each way is measured.")]
StepOption = Annotated[float, typer.Option("--step-ms", min=0, help="How long a step of theirs takes.")]


def emergency(
    processes: ProcessesOption = 4,
    rounds: RoundsOption = 200,
    step_ms: StepOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Measure from the signal of a HALT until every process of a run on this host stands still."""
    _be_quiet()
    with scratch_home() as home:
        document = measure(home, processes=processes, rounds=rounds, step_ms=step_ms)
    show("emergency", document | {"machine": machine()}, as_json=as_json)


def measure(home: Home, *, processes: int, rounds: int, step_ms: float) -> dict[str, Any]:
    """Halt and release processes that train, by an alarm beside them and by a signal of an operator."""
    bench = EmergencyBench(home)
    ranks = [
        multiprocessing.get_context("spawn").Process(
            target=_rank, args=(bench.shared.path, home.keyring("trainer").to_json(), step_ms), daemon=True
        )
        for _ in range(processes)
    ]
    for rank in ranks:
        rank.start()
    try:
        bench.settle(processes, bench.calm)
        return {
            "alarm": bench.rounds(rounds, processes, bench.alarm),
            "signal": bench.rounds(rounds, processes, bench.signal),
            "processes": processes,
            "step_ms": step_ms,
            "target_ms": TARGET_MS,
        }
    finally:
        for rank in ranks:
            rank.terminate()
            rank.join()
        bench.close()


class EmergencyBench:
    """The trainer that serves the run, and an operator."""

    def __init__(self, home: Home) -> None:
        from esper_servers.tolaria.conservative_mode import ConservativeMode
        from esper_servers.tolaria.emergency.shared_signal import SharedSignal, place_for
        from esper_servers.tolaria.metrics.feed import MetricsFeed
        from esper_servers.tolaria.service import TolariaServicer

        self._home = home
        identity, mode = home.identity("trainer"), ConservativeMode()
        self.shared = SharedSignal(place_for(RUN, home=home.directory), run_id=RUN, keyring=home.keyring("trainer"))
        self._operator = home.keyring("operator")
        self._audience = str(identity.spiffe_id)
        self._emergencies = _emergencies(home.keyring("trainer"), self._audience, self.shared, HaltSwitch())
        servicer = TolariaServicer(_Run(), self._emergencies, at_safe_point=_none, mode=mode, feed=MetricsFeed())
        self._thread = LoopThread("emergency-bench")
        self._server = self._thread.run(_serve(identity, servicer))
        self._client = self._thread.run(self._connect())

    def rounds(self, count: int, processes: int, halt: Callable[[], None]) -> dict[str, Any]:
        """Halt and release so often; returns how long each process took, and the last one."""
        each, last = [], []
        for _ in range(count):
            begun = time.monotonic_ns()
            seen = self.settle(processes, halt)
            took = [(at - begun) / 1e6 for at in seen]
            each += took
            last.append(max(took))
            self.settle(processes, self.calm)
        return {
            "frozen": percentiles(each),
            "all_frozen": percentiles(last) | {"max_ms": round(max(last), 4)},
            "over_target_share": sum(took > TARGET_MS for took in last) / count,
        }

    def settle(self, processes: int, work: Callable[[], None]) -> list[int]:
        """Change the level and wait until every process has seen it; returns when each did."""
        work()
        generation, ends_at = self.shared.current.generation, time.monotonic() + PATIENCE_SECONDS
        while len(found := self.shared.acks(generation)) < processes:
            if time.monotonic() > ends_at:
                raise RuntimeError(f"{len(found)} of {processes} processes have seen the signal")
            time.sleep(LOOK_SECONDS)
        return [ack.seen_at_ns for ack in found]

    def alarm(self) -> None:
        """Halt from within the trainer."""
        self._emergencies.alarm(HALT, "bench")

    def calm(self) -> None:
        """Let all go on."""
        self._emergencies.lower(NOTICE, "bench")

    def signal(self) -> None:
        """Halt as an operator does, from signing on."""
        answer = self._thread.run(self._client.signal_emergency(SignalEmergencyRequest(signal=self._sealed())))
        if not answer.accepted:
            raise RuntimeError(answer.reason)

    def close(self) -> None:
        """End the server and the client."""
        self._thread.run(self._client.close())
        self._thread.run(self._server.drain())
        self._emergencies.close()
        self._thread.stop()

    def _sealed(self) -> Any:
        signal = EmergencySignal(version=SCHEMA_VERSION, level=HALT, reason="bench", origin="operator")
        return seal(
            signal,
            keyring=self._operator,
            audience=self._audience,
            run_id=RUN,
            issued_at_ns=time.time_ns(),
        )

    async def _connect(self) -> TolariaClient:
        return TolariaClient(self._server.address, identity=self._home.identity())


async def _serve(identity: Identity, servicer: object) -> MeshServer:
    server = MeshServer(config=ServerConfig(drain_seconds=0.2), identity=identity)
    server.add_service(TOLARIA, servicer)
    await server.start()
    return server


class _Run:
    run_id = RUN
    global_step = 0
    epoch = 0


def _none(_work: Any) -> Any:
    raise NotImplementedError


def _rank(path: Path, keyring: bytes, step_ms: float) -> None:
    """Train, as far as an emergency can tell."""
    from esper_servers.tolaria.emergency.shared_signal import SharedSignal

    _be_quiet()
    ring, halt = Keyring.parse(keyring), HaltSwitch()
    _emergencies(ring, RUN, SharedSignal(path, run_id=RUN, keyring=ring), halt)
    while True:
        time.sleep(step_ms / 1e3)
        halt.hold()


def _emergencies(keyring: Keyring, audience: str, shared: SharedSignal, halt: HaltSwitch) -> Emergencies:
    from esper_servers.tolaria.conservative_mode import ConservativeMode
    from esper_servers.tolaria.emergency.emergencies import Emergencies

    return Emergencies(
        run_id=RUN, keyring=keyring, audience=audience, halt=halt, mode=ConservativeMode(), shared=shared
    )


def _be_quiet() -> None:
    """Every round is an emergency, and told as one."""
    structlog.configure(processors=[_drop])


def _drop(*_: object) -> NoReturn:
    raise structlog.DropEvent
