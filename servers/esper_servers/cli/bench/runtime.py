from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from esper_client import LoopThread, TamiyoClient
from esper_rpc.channel import open_channel
from esper_rpc.identity import Identity
from esper_rpc.proto.tamiyo.v1 import EvaluateStepRequest, EvaluateStepResponse, OpenRunRequest
from esper_rpc.server import MeshServer, ServerConfig, announce
from esper_servers.cli.console import HomeOption, JsonOption, environ_of, home_of, run
from esper_servers.cli.home import Home

from . import echo
from .measure import WARM_UP, CountOption, machine, percentiles, scratch_home, show, timed_ms
from .scene import BenchHost
from .step import unary_step

METHOD = "/esper.tamiyo.v1.TamiyoService/EvaluateStep"
_RUN = "bench-runtime"
_ROUNDS = 5


def runtime(context: typer.Context, steps: CountOption = 1000, as_json: JsonOption = False) -> None:
    """Measure what the runtime costs: EvaluateStep with a policy that computes nothing, over a bare echo.

    Identity, authorisation, quota, metrics, field rules, the graph's features and the ledger are all in it.
    """
    environ = environ_of(context)
    with scratch_home() as home:
        constant = echo.serving(home, environ, "constant-server")
        with echo.serving(home, environ) as floor, constant as ours:
            document = measure(home, floor.address, ours.address, steps)
    show("runtime", document | {"machine": machine()}, as_json=as_json)


def constant_server(
    context: typer.Context,
    work_ms: Annotated[float, typer.Option(min=0, help="How long the policy works at each step.")] = 0.0,
    home: HomeOption = None,
) -> None:
    """Serve Tamiyo with a policy that computes nothing, until SIGTERM."""
    run(_serve(home_of(context, home), work_ms / 1e3))


def measure(home: Home, floor: str, address: str, steps: int) -> dict[str, Any]:
    """Measure both in turns, so that a noisy moment hits both."""
    asked, echoed = [], []
    with _constant_caller(home, address, steps) as ask, echo.EchoCaller(home, floor) as caller:
        for _ in range(_ROUNDS):
            asked += timed_ms(ask, steps // _ROUNDS)
            echoed += timed_ms(caller.unary, steps // _ROUNDS)
    figures = {"evaluate_step": percentiles(asked), "echo": percentiles(echoed)}
    ratio = {
        key.removesuffix("_ms"): round(figures["evaluate_step"][key] / figures["echo"][key], 3)
        for key in figures["echo"]
    }
    return figures | {"ratio": ratio, "payload_bytes": len(_request(BenchHost(home), 1))}


@contextlib.contextmanager
def _constant_caller(home: Home, address: str, steps: int) -> Iterator[Any]:
    """A call that asks one step, as the echo asks one message: bytes in, bytes out."""
    thread, host = LoopThread("constant"), BenchHost(home)
    channel, call = thread.run(_connect(home, address, host))
    # Building a question is the trainer's cost, not the runtime's.
    requests = iter([_request(host, sequence) for sequence in range(1, steps + _ROUNDS * WARM_UP + 1)])

    async def exchange(raw: bytes) -> bytes:
        return await call(raw)  # type: ignore[no-any-return]  # Bytes.

    yield lambda: thread.run(exchange(next(requests)))
    answer = EvaluateStepResponse.FromString(thread.run(exchange(_request(host, 1 << 30))))
    assert answer.decision.no_action.reason == "nominal"
    thread.run(channel.close())
    thread.stop()


async def _connect(home: Home, address: str, host: BenchHost) -> Any:
    identity = home.identity("trainer")
    await opening(identity, address, host)
    channel = open_channel(address, identity=identity, role="tamiyo")
    return channel, channel.unary_unary(METHOD)


async def opening(identity: Identity, address: str, host: BenchHost, run_id: str = _RUN) -> None:
    """Open a run of these benchmarks."""
    described = host.describe()
    request = OpenRunRequest(
        run_id=run_id, protocol_versions=[2], features=["seed"], receiver_epoch=host.receiver_epoch,
        host_topology=described.host_topology, sites=described.sites, seeds=described.seeds,
    )  # fmt: skip
    async with TamiyoClient(address, identity=identity) as client:
        await client.open_run(request)


def _request(host: BenchHost, sequence: int) -> bytes:
    return EvaluateStepRequest(step=unary_step(host, sequence, [], run_id=_RUN)).SerializeToString()


async def _serve(home: Home, work_seconds: float) -> None:
    from esper_rpc.journal import Journal
    from esper_rpc.pause_quota import PauseConfig
    from esper_servers.policy.prior import PriorConfig
    from esper_servers.tamiyo.aside import Aside
    from esper_servers.tamiyo.blueprint_cache import BlueprintCache
    from esper_servers.tamiyo.conservative_mode import ConservativeMode
    from esper_servers.tamiyo.field_reports.config import ReportConfig
    from esper_servers.tamiyo.field_reports.reports import FieldReports
    from esper_servers.tamiyo.pauses.pauses import Pauses
    from esper_servers.tamiyo.pipeline import StepPipeline
    from esper_servers.tamiyo.plans.plan_switch import PlanConfig, PlanSwitch
    from esper_servers.tamiyo.policy_updates.assembly import updates_of
    from esper_servers.tamiyo.records.decisions import DecisionLog
    from esper_servers.tamiyo.records.step_dumps import StepDumps
    from esper_servers.tamiyo.run_state import Runs
    from esper_servers.tamiyo.server import SERVICE
    from esper_servers.tamiyo.service import TamiyoServicer
    from esper_servers.tamiyo.step_service import RAW_METHODS

    blueprints, mode = BlueprintCache(), ConservativeMode()
    journal = Journal(home.state_dir("bench") / "journal.sqlite")
    decisions, pauses = DecisionLog(journal), Pauses.of(journal, PauseConfig())
    pipeline = StepPipeline(
        policy=_ConstantPolicy(work_seconds),  # type: ignore[arg-type]  # Like a Policy, without a network.
        runs=Runs(), blueprints=blueprints, keyring=home.keyring("tamiyo"), decisions=decisions, mode=mode,
    )  # fmt: skip
    plans = PlanSwitch(pipeline.policy, home.state_dir("bench"), PlanConfig(compile=False))
    updates = updates_of(
        pipeline, directory=home.state_dir("bench"), journal=home.state_dir("bench") / "journal.sqlite",
        keyring=home.keyring("tamiyo"), prior=PriorConfig(), plans=plans, aside=Aside(),
    )  # fmt: skip
    reports = FieldReports.of(pipeline.observations, journal, ReportConfig(), clock_ns=pipeline.clock_ns)
    servicer = TamiyoServicer(
        pipeline=pipeline, blueprints=blueprints, decisions=decisions, pauses=pauses, updates=updates,
        replay=_nothing_to_replay, reports=reports,
        dumps=StepDumps.of(pipeline.recorder, journal, clock_ns=pipeline.clock_ns),
    )  # fmt: skip
    server = MeshServer(config=ServerConfig(), identity=home.identity("tamiyo"))
    server.add_service(SERVICE, servicer, raw_methods=RAW_METHODS)
    gc.collect()
    gc.freeze()  # As Tamiyo does before it serves.
    announce("constant", await server.start())
    await server.run_until_signal()


async def _nothing_to_replay(_command_id: str) -> list[str]:
    return []


class _ConstantPolicy:
    """Always in favour of doing nothing."""

    version, digest, plan = "constant", b"", "compiled"
    norms: Mapping[str, tuple[float, float]] = {}

    def __init__(self, work_seconds: float) -> None:
        import hashlib

        import numpy as np

        from esper_servers.policy import prior, schema
        from esper_servers.policy.policy import PolicyOutput
        from esper_servers.policy.prior import PriorConfig

        kind = np.full(schema.KIND_COUNT, -1.0, dtype=np.float32)
        kind[schema.KIND_NONE] = 1.0
        none = np.zeros((0, 0), dtype=np.float32)
        parameters = np.array(prior.PARAMETERS, dtype=np.float32)
        self._output = PolicyOutput(kind, none, none, none, 0.0, none, parameters)
        self.prior = PriorConfig()
        self._hash = hashlib.sha256
        self._work = bytes(self._bytes_in(work_seconds))

    plan_problem, device_use = "", None

    def prepare(self, *_: object) -> None:
        """No device computes this."""

    def can_share(self, *_: object) -> bool:
        """As a compiled plan does not."""
        return False

    def can_run_beside(self, *_: object) -> bool:
        """Like a compiled plan: hashing leaves the interpreter to others."""
        return True

    def evaluate(self, *_: object, **__: object) -> Any:
        """Compute nothing of use, for as long as it was told to."""
        if self._work:
            self._hash(self._work)
        return self._output

    def _bytes_in(self, seconds: float) -> int:
        """How many bytes are hashed in a time; the best of some tries tells how fast an idle core is."""
        sample, times = bytes(1 << 20), []
        for _ in range(20 if seconds else 0):
            begun = time.perf_counter()
            self._hash(sample)
            times.append(time.perf_counter() - begun)
        return int(len(sample) * seconds / min(times)) if times else 0
