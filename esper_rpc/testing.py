"""Tools for testing a training loop or a service: certificates and keys in one call, a server, a fake Tamiyo."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from google.protobuf.descriptor import ServiceDescriptor

from .envelope import Keyring, RootKeys, sign
from .envelope.trust import keyring_for
from .envelope.verification import COMMAND_TYPE
from .errors import EsperError
from .identity import Authority, Identity, SpiffeId
from .identity.authority import LEAF_LIFETIME
from .inbox import Inbox
from .proto.leyline.v1 import AdaptationCommand, SignedEnvelope
from .proto.tamiyo.v1 import (
    CloseRunRequest,
    CloseRunResponse,
    EvaluateEpochRequest,
    EvaluateEpochResponse,
    EvaluateStepsRequest,
    EvaluateStepsResponse,
    NoAction,
    OpenRunRequest,
    OpenRunResponse,
    Step,
    StepDecision,
    StepStatus,
    tamiyo_service_pb2,
)
from .server import Call, MeshServer, ServerConfig
from .status import to_status

TAMIYO = tamiyo_service_pb2.DESCRIPTOR.services_by_name["TamiyoService"]


class FakeClock:
    """A monotonic clock that moves when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Move on."""
        self.now += seconds


class TemporaryMesh:
    """An authority and signing roots in a directory, with members on demand."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._authority = Authority.create(directory / "pki")
        self._root_keys = RootKeys.create(directory / "keys" / "root.json")

    def identity(self, role: str, instance: str = "local", *, lifetime: timedelta = LEAF_LIFETIME) -> Identity:
        """Issue, or return, the identity of a member; its keyring lies beside it."""
        directory = self.identity_dir(role, instance)
        if not (directory / "cert.pem").exists():
            spiffe_id = SpiffeId(role, instance)
            Identity.of(self._authority.issue(spiffe_id, lifetime=lifetime)).save(directory)
            keyring_for(self._root_keys, spiffe_id).save(directory / "keyring.json")
        return Identity.load(directory)

    def reissue(self, role: str, instance: str = "local", *, lifetime: timedelta = LEAF_LIFETIME) -> Identity:
        """Issue the leaf of a member again, as a renewal does."""
        leaf = self._authority.issue(SpiffeId(role, instance), lifetime=lifetime)
        return Identity.of(leaf).save(self.identity_dir(role, instance))

    def identity_dir(self, role: str, instance: str = "local") -> Path:
        """Where a member's files lie."""
        return self.directory / "identities" / f"{role}-{instance}"

    def keyring(self, role: str, instance: str = "local") -> Keyring:
        """Return the keyring of a member."""
        self.identity(role, instance)
        return Keyring.load(self.identity_dir(role, instance) / "keyring.json")


@contextlib.asynccontextmanager
async def serving(
    identity: Identity,
    *services: tuple[ServiceDescriptor, object],
    raw_methods: frozenset[str] = frozenset(),
    address: str = "127.0.0.1:0",
) -> AsyncIterator[MeshServer]:
    """Run services on a real server under mutual TLS for the length of a block."""
    server = MeshServer(config=ServerConfig(address=address, drain_seconds=0.2), identity=identity)
    for descriptor, servicer in services:
        server.add_service(descriptor, servicer, raw_methods=raw_methods)
    await server.start()
    try:
        yield server
    finally:
        await server.drain()


Decide = Callable[[Step], AdaptationCommand | None]


@dataclass
class FakeTamiyo:
    """A controller whose decisions you write: return a command, or None for no action.

    Serve it with `raw_methods=FakeTamiyo.RAW_METHODS`. `before_answer` may await to make it slow.
    """

    RAW_METHODS = frozenset({"EvaluateEpoch", "EvaluateStep", "EvaluateSteps"})

    keyring: Keyring
    decide: Decide = lambda _step: None
    before_answer: Callable[[Step], object] | None = None
    protocol_version: int = 2
    """The version it answers OpenRun with; 1 knows neither the greeting nor `going_away`."""
    refuse: Callable[[Step], EsperError] | None = None
    """When set, every step is answered with this error."""
    clock_ns: Callable[[], int] = time.time_ns
    """The time that it tells runs, and stamps commands with."""
    steps: list[Step] = field(default_factory=list)
    runs: dict[str, OpenRunRequest] = field(default_factory=dict)
    _inboxes: list[Inbox[bytes]] = field(default_factory=list)

    async def OpenRun(self, request: OpenRunRequest, call: Call) -> OpenRunResponse:
        """Remember the run."""
        created = request.run_id not in self.runs
        self.runs[request.run_id] = request
        return OpenRunResponse(
            protocol_version=self.protocol_version,
            policy_version="fake",
            server_time_ns=self.clock_ns(),
            created=created,
        )

    async def CloseRun(self, request: CloseRunRequest, call: Call) -> CloseRunResponse:
        """Forget the run."""
        return CloseRunResponse(closed=self.runs.pop(request.run_id, None) is not None)

    async def EvaluateSteps(self, requests: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
        """Answer every step as `decide` says."""
        async with Inbox(requests, leave_after_seconds=call.seconds_until_leaving) as inbox:
            self._inboxes.append(inbox)
            async for raw in inbox:
                if not raw and self.protocol_version < 2:
                    continue
                yield (await self._answer(raw, str(call.peer))).SerializeToString()

    def begin_drain(self) -> None:
        """Ask every stream to go elsewhere."""
        while self._inboxes:
            self._inboxes.pop().leave()

    async def _answer(self, raw: bytes | None, peer: str) -> EvaluateStepsResponse:
        if not raw:
            return EvaluateStepsResponse(decision=StepDecision(going_away=raw is None))
        decision = await self._consider(EvaluateStepsRequest.FromString(raw).step, raw, peer)
        return EvaluateStepsResponse(decision=decision)

    async def EvaluateEpoch(self, raw: bytes, call: Call) -> bytes:
        """Answer the end of an epoch as `decide` says of its packet."""
        asked = EvaluateEpochRequest.FromString(raw)
        step = Step(run_id=asked.run_id, sequence=asked.sequence, packet=asked.packet)
        decision = await self._consider(step, raw, str(call.peer))
        return EvaluateEpochResponse(decision=decision).SerializeToString()

    async def _consider(self, step: Step, raw: bytes, peer: str) -> StepDecision:
        self.steps.append(step)
        if self.before_answer is not None:
            waiting = self.before_answer(step)
            if hasattr(waiting, "__await__"):
                await waiting
        if self.refuse is not None:
            status = to_status(self.refuse(step))
            error = StepStatus(code=status.code, message=status.message, details=status.details)
            return StepDecision(sequence=step.sequence, error=error)
        return self._decision(step, hashlib.sha256(raw).digest(), peer)

    def _decision(self, step: Step, digest: bytes, audience: str) -> StepDecision:
        command = self.decide(step)
        if command is None:
            return StepDecision(sequence=step.sequence, no_action=NoAction(reason="nominal"))
        command.command_id = command.command_id or str(uuid.uuid4())
        epoch = self.runs[step.run_id].receiver_epoch
        return StepDecision(
            sequence=step.sequence, command=self.sign(command, audience, step.sequence, epoch, digest, step.run_id)
        )

    def sign(
        self, command: AdaptationCommand, audience: str, sequence: int, epoch: bytes, digest: bytes, run_id: str
    ) -> SignedEnvelope:
        """Sign a command as Tamiyo does."""
        return sign(
            command.SerializeToString(),
            payload_type=COMMAND_TYPE,
            keyring=self.keyring,
            audience=audience,
            issued_at_ns=self.clock_ns(),
            nonce=command.command_id,
            run_id=run_id,
            receiver_epoch=epoch,
            sequence=sequence,
            request_digest=digest,
        )


@dataclass(frozen=True, slots=True)
class FakeMesh:
    """A running fake Tamiyo, and the environment in which a trainer finds it."""

    tamiyo: FakeTamiyo
    environ: dict[str, str]


@contextlib.contextmanager
def fake_mesh(directory: Path) -> Iterator[FakeMesh]:
    """Run a FakeTamiyo on a thread of its own for the length of a block: `attach(mesh=find_mesh(fake.environ))`."""
    mesh = TemporaryMesh(directory)
    mesh.identity("trainer")
    tamiyo = FakeTamiyo(mesh.keyring("tamiyo"))
    started: queue.SimpleQueue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = queue.SimpleQueue()

    async def serve() -> None:
        stop = asyncio.Event()
        service = (TAMIYO, tamiyo)
        async with serving(mesh.identity("tamiyo"), service, raw_methods=FakeTamiyo.RAW_METHODS) as server:
            started.put((server.address, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="fake-tamiyo", daemon=True)
    thread.start()
    address, loop, stop = started.get(timeout=30)
    try:
        # Nothing listens on port 1: a loop under test does without a library.
        identity_dir = str(mesh.identity_dir("trainer"))
        yield FakeMesh(tamiyo, {"ESPER_TAMIYO": address, "ESPER_URZA": "127.0.0.1:1", "ESPER_IDENTITY": identity_dir})
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
