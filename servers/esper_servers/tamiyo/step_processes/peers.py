from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from esper_rpc.errors import EsperError, Unavailable
from esper_rpc.identity.spiffe import SpiffeId
from esper_rpc.proto.tamiyo.v1 import GetStatusResponse, OpenRunRequest, SetConservativeModeRequest
from esper_rpc.server import Call
from esper_servers.policy.norms import Experience
from esper_servers.tamiyo.field_reports.observations import Observation, Observations, RunClosed

from .carried_run import CarriedRun
from .link import Link
from .run_directory import RunDirectory

log = structlog.get_logger(__name__)

PATIENCE_SECONDS = 1.0
"""How long one process may keep another or an operator waiting before it is left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Admin:
    """What the admin process does for the others."""

    directory: RunDirectory
    peers: StepPeers
    servicer: object
    observations: Observations
    live_policy: Callable[[], Path | None]
    on_inference_lost: Callable[[], None]
    on_run_ended: Callable[[Experience], None]


class StepPeer:
    """Another step process, as the admin process sees it: a holder of runs. It calls these methods over the link."""

    def __init__(self, admin: Admin) -> None:
        self._admin = admin
        self.link: Link
        self.is_ready = asyncio.Event()

    async def hand_over(self, run_id: str) -> CarriedRun | None:
        """Have a run let go of there; raises Unavailable when that does not happen soon."""
        try:
            carried: CarriedRun | None = await asyncio.wait_for(self.link.call("hand_over", run_id), PATIENCE_SECONDS)
        except TimeoutError:
            raise Unavailable("The process that held this run does not answer.", reason="PROCESS_SILENT") from None
        return carried

    async def answers(self, seconds: float) -> bool:
        """Whether it says anything within a time."""
        try:
            await asyncio.wait_for(self.link.call("ping"), seconds)
        except (Unavailable, TimeoutError):
            return False
        return True

    def join(self) -> SetConservativeModeRequest:
        """It is about to serve, and hears of every change from now on; returns what an operator set before."""
        self._admin.peers.add(self)
        return self._admin.peers.set_by_hand

    def ready(self) -> None:
        """It serves."""
        self.is_ready.set()

    async def claim(self, request: OpenRunRequest, owner: str) -> CarriedRun | None:
        """It opens a run."""
        return await self._admin.directory.claim(request, owner, self)

    async def fetch(self, run_id: str, owner: str) -> CarriedRun | None:
        """It is asked about a run that it does not hold."""
        return await self._admin.directory.fetch(run_id, owner, self)

    def release(self, run_id: str) -> None:
        """It forgot a run."""
        self._admin.directory.release(run_id, self)

    async def forward(self, method: str, request: Any, call: tuple[str, str]) -> Any:
        """It was asked what only the admin process can answer; `call` is the method's path and who asks."""
        path, peer = call
        return await getattr(self._admin.servicer, method)(request, Call(path, SpiffeId.parse(peer)))

    def observe(self, seen: list[Observation | RunClosed]) -> set[str]:
        """It tells what its steps told; returns the runs that are still watched."""
        self._admin.observations.take_over(seen)
        return set(self._admin.observations.watched)

    def live_policy(self) -> Path | None:
        """It asks where the live policy lies; None is the shipped one."""
        return self._admin.live_policy()

    def inference_lost(self) -> None:
        """The live policy does not work there."""
        self._admin.on_inference_lost()

    def run_ended(self, experience: Experience) -> None:
        """It forgot a run that had learned something."""
        self._admin.on_run_ended(experience)


class StepPeers:
    """The step processes beside the one that administers."""

    def __init__(self) -> None:
        self._peers: list[StepPeer] = []
        self.set_by_hand = SetConservativeModeRequest()
        """What an operator said last of conservative mode."""

    def __len__(self) -> int:
        return len(self._peers)

    def add(self, peer: StepPeer) -> None:
        """Tell a process from now on what changes."""
        self._peers.append(peer)

    def remove(self, peer: StepPeer) -> None:
        """Tell it nothing more."""
        if peer in self._peers:
            self._peers.remove(peer)

    async def statuses(self) -> list[GetStatusResponse]:
        """Return the status of each that tells it in time."""
        return list(await self._ask_all("status"))

    async def report(self) -> None:
        """Have what each answered so far in the journal."""
        await self._ask_all("report")

    def set_conservative_mode(self, request: SetConservativeModeRequest) -> None:
        """Turn conservative mode on or off everywhere."""
        self.set_by_hand = request
        self._tell_all("set_conservative_mode", request)

    def take_up_policy(self) -> None:
        """Have every process serve what is live now."""
        self._tell_all("take_up_policy")

    def take_up_plan(self) -> None:
        """Have every process serve the package that was built."""
        self._tell_all("take_up_plan")

    def begin_drain(self) -> None:
        """Have every process finish and end."""
        self._tell_all("drain")

    def _tell_all(self, name: str, *arguments: Any) -> None:
        for peer in self._peers:
            peer.link.tell(name, *arguments)

    async def _ask_all(self, name: str) -> Iterable[Any]:
        answers = await asyncio.gather(*(self._ask(peer, name) for peer in self._peers))
        return [answer for answer in answers if answer is not None]

    async def _ask(self, peer: StepPeer, name: str) -> Any:
        try:
            return await asyncio.wait_for(peer.link.call(name), PATIENCE_SECONDS)
        except (EsperError, TimeoutError) as error:
            log.warning("step_process_silent", asked=name, error=repr(error)[:200])
            return None
