"""A further step process of Tamiyo: it answers steps at the address of the first, and asks that for all the rest."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from esper_client.client import UrzaClient
from esper_client.renewal import CHECK_SECONDS, CertificateRenewer
from esper_rpc.errors import EsperError
from esper_rpc.identity import Identity
from esper_rpc.logging import log_json_lines
from esper_rpc.proto.tamiyo.v1 import GetStatusResponse, OpenRunRequest, SetConservativeModeRequest, tamiyo_service_pb2
from esper_rpc.server import MeshServer
from esper_rpc.telemetry.tracing import configure_tracing
from esper_servers.policy.norms import Experience
from esper_servers.policy.norms_store import NormsStore
from esper_servers.tamiyo.breakers import Breakers
from esper_servers.tamiyo.conservative_mode import ConservativeMode
from esper_servers.tamiyo.live_policy import LivePolicy
from esper_servers.tamiyo.run_state import Runs
from esper_servers.tamiyo.server_config import TamiyoServerConfig
from esper_servers.tamiyo.status import status_of
from esper_servers.tamiyo.step_parts import StepParts
from esper_servers.tamiyo.step_service import RAW_METHODS
from esper_servers.tamiyo.warm_up import prepare

from .carried_run import CarriedRun
from .forwarding import ForwardingServicer
from .held_runs import HeldRuns
from .link import Link

log = structlog.get_logger(__name__)

SERVICE = tamiyo_service_pb2.DESCRIPTOR.services_by_name["TamiyoService"]
TELL_SECONDS = 0.25
MOST_TOLD = 1024
RETRY_SECONDS = 1.0


def serve_steps(config: TamiyoServerConfig, end: socket.socket) -> None:
    """Serve until the process that holds the other end says so, or is gone. The main function of a process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # When to drain is for the first process to say.
    log_json_lines()
    flush_spans = configure_tracing("tamiyo", config.environ)
    asyncio.run(_serve(config, end))
    flush_spans()


async def _serve(config: TamiyoServerConfig, end: socket.socket) -> None:
    identity = Identity.load(config.identity_dir)
    process = StepProcess(config)
    async with contextlib.AsyncExitStack() as stack:
        link = process.link_to(end)
        stack.push_async_callback(link.close)
        stack.push_async_callback(process.close)
        if config.urza_address:
            urza = await stack.enter_async_context(UrzaClient(config.urza_address, identity=identity))
            await process.parts.blueprints.refresh(urza)
            refresher = asyncio.create_task(process.parts.blueprints.keep_fresh(urza))
            stack.callback(refresher.cancel)
        await process.resume()
        server = MeshServer(config=config.server, identity=identity)
        servicer = ForwardingServicer(process.parts.pipeline, process.runs, SERVICE, link)
        server.add_service(SERVICE, servicer, raw_methods=RAW_METHODS)
        await server.start()
        server.every(CHECK_SECONDS, CertificateRenewer(identity, address=None).check)
        server.every(CHECK_SECONDS, config.keyring.refresh)
        server.every(TELL_SECONDS, process.tell_observations)
        process.parts.work_beside(server)
        await link.call("ready")
        await process.until_told_to_drain()
        await server.drain()


class StepProcess:
    """What the first process may ask of this one, and what this one has to tell."""

    def __init__(self, config: TamiyoServerConfig) -> None:
        mode = ConservativeMode()
        self._norms = _ToldNorms.load(config.state_dir)
        self.parts = StepParts(config, mode, Breakers(mode), Runs(norms=self._norms))
        self._live = LivePolicy(self.parts.pipeline, self.parts.plans, config.prior)
        self.runs = HeldRuns(self.parts.pipeline, self.parts.blueprints, lambda _holder: _RemotePlaces(self))
        self._live_file: Path | None = None
        self._one_policy_at_a_time = asyncio.Lock()
        self._drained = asyncio.Event()
        self.link: Link

    def link_to(self, end: socket.socket) -> Link:
        """Answer the first process from now on."""
        self.link = Link(self, end)
        self._norms.tell = lambda experience: self.link.tell("run_ended", experience)
        self.parts.pipeline.on_inference_lost = lambda: self.link.tell("inference_lost")
        return self.link

    async def resume(self) -> None:
        """Take up mode, plan and policy as the first process has them, before the first step."""
        by_hand: SetConservativeModeRequest = await self.link.call("join")
        if by_hand.enabled:
            self.set_conservative_mode(by_hand)
        self.parts.plans.prepare()
        await self.take_up_policy()
        prepare(self.parts.pipeline.policy)

    async def hand_over(self, run_id: str) -> CarriedRun | None:
        """Let go of a run."""
        return await self.runs.hand_over(run_id)

    def ping(self) -> None:
        """Show that the loop turns."""

    def status(self) -> GetStatusResponse:
        """Return a snapshot."""
        return status_of(self.parts.pipeline, self.parts.blueprints)

    async def report(self) -> None:
        """Have everything that was answered in the journal, and told."""
        self.parts.pipeline.report()
        await self.tell_observations()
        await asyncio.to_thread(self.parts.decisions.flush)

    def set_conservative_mode(self, request: SetConservativeModeRequest) -> None:
        """Turn conservative mode on or off by hand."""
        self.parts.pipeline.set_conservative_mode(enabled=request.enabled, reason=request.reason)

    async def take_up_policy(self) -> None:
        """Serve the policy that is live now; one that cannot be loaded is asked for again, for it may be another."""
        async with self._one_policy_at_a_time:
            while (path := await self.link.call("live_policy")) != self._live_file:
                try:
                    self._live.take_up(await asyncio.to_thread(self._live.load, path))
                except Exception as error:  # noqa: BLE001  # Whatever it is, steps go on with the policy before.
                    log.error("policy_not_taken_up", error=repr(error)[:200], priority="HIGH")
                    await asyncio.sleep(RETRY_SECONDS)
                else:
                    self._live_file = path

    async def take_up_plan(self) -> None:
        """Serve the package that the first process has built."""
        if self.parts.plans.served is None:
            await asyncio.to_thread(self.parts.plans.prepare)

    def drain(self) -> None:
        """Finish, and end."""
        self._drained.set()

    async def until_told_to_drain(self) -> None:
        """Wait for `drain`, or for the end of the first process."""
        told, gone = asyncio.create_task(self._drained.wait()), asyncio.create_task(self.link.until_closed())
        await asyncio.wait((told, gone), return_when=asyncio.FIRST_COMPLETED)
        told.cancel(), gone.cancel()

    async def tell_observations(self) -> None:
        """Tell the first process, which writes the field reports, what steps told of their runs."""
        observations = self.parts.pipeline.observations
        await self.parts.decisions.hand_over()  # The first process looks up the commands that they are about.
        while len(observations):
            watched = await self.link.call("observe", list(observations.take(MOST_TOLD)))
            observations.watch_only(watched)

    async def close(self) -> None:
        """Tell and write what is left."""
        self.parts.pipeline.report()
        with contextlib.suppress(EsperError):
            await self.tell_observations()
        await self.parts.close()


class _RemotePlaces:
    """The directory of runs, asked over the link."""

    def __init__(self, process: StepProcess) -> None:
        self._process = process

    async def claim(self, request: OpenRunRequest, owner: str) -> CarriedRun | None:
        return await self._ask("claim", request, owner)

    async def fetch(self, run_id: str, owner: str) -> CarriedRun | None:
        return await self._ask("fetch", run_id, owner)

    def release(self, run_id: str) -> None:
        self._process.link.tell("release", run_id)

    async def _ask(self, name: str, *arguments: Any) -> CarriedRun | None:
        carried: CarriedRun | None = await self._process.link.call(name, *arguments)
        return carried


class _ToldNorms(NormsStore):
    """What a new run starts from; what ended runs have learned is kept by the first process."""

    tell: Callable[[Experience], None] = staticmethod(lambda _experience: None)

    def end(self, run: Experience) -> None:
        super().end(run)
        self.tell(run)
