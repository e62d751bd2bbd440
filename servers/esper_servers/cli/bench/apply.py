from __future__ import annotations

import threading
import time
import uuid
from typing import TYPE_CHECKING, Annotated, Any

import typer

from esper_client import KasminaClient, LoopThread
from esper_rpc.envelope import Keyring, Verifier, sign
from esper_rpc.envelope.verification import COMMAND_TYPE
from esper_rpc.errors import NotFound
from esper_rpc.proto.kasmina.v1 import ApplyCommandRequest, kasmina_service_pb2
from esper_rpc.proto.leyline.v1 import (
    AdaptationCommand,
    CommandOutcome,
    CommandSeedOperation,
    CommandType,
    SeedOperation,
    SignedEnvelope,
)
from esper_rpc.server import MeshServer, ServerConfig
from esper_servers.cli.console import JsonOption
from esper_servers.cli.home import Home

from .measure import CountOption, machine, percentiles, scratch_home, show, timed_ms

if TYPE_CHECKING:
    from esper_servers.kasmina.kernels.library import KernelLibrary

KASMINA = kasmina_service_pb2.DESCRIPTOR.services_by_name["KasminaService"]
EPOCH = bytes(range(16))
ENVELOPE_BYTES = 4096
_LIFE = ("GERMINATE", "START_TRAINING", "START_GRAFTING", "CULL")
_LIFE_TO_PROBATION = ("GERMINATE", "START_TRAINING", "START_GRAFTING", "STABILIZE", "EVALUATE")
_BLUEPRINT = "residual_mlp"
_BLENDING_STEPS = 32
_BUILD_SECONDS = 30.0
# After a cull the slot is embargoed for no time at all, reset and dormant again.
_REST_STEPS = 4


NoncesOption = Annotated[
    int, typer.Option("--nonces", min=1, max=90_000, help="Commands that the host still remembers in `among_nonces`.")
]


def apply(steps: CountOption = 400, nonces: NoncesOption = 50_000, as_json: JsonOption = False) -> None:
    """Measure verifying and applying a command, in process, among live nonces and by RPC, and the envelope itself."""
    with scratch_home() as home:
        document = {
            "apply": {
                "in_process": _in_process(HostBench(home), steps),
                "among_nonces": _among_nonces(home, steps, nonces),
                "by_rpc": _by_rpc(home, steps),
            },
            "envelope_4kib": _envelope(home, steps * 5),
            "machine": machine(),
        }
    show("apply", document, as_json=as_json)


def _among_nonces(home: Home, count: int, nonces: int) -> dict[str, Any]:
    bench = HostBench(home)
    bench.remember(nonces)
    return {"nonces": bench.host.verifier.remembered_nonces()} | _in_process(bench, count)


def _in_process(bench: HostBench, count: int) -> dict[str, Any]:
    times: list[float] = []
    by_operation: dict[str, list[float]] = {}
    for turn in range(count // len(_LIFE) + 2):
        for operation in _LIFE:
            elapsed = bench.apply(operation)
            if turn >= 2:
                times.append(elapsed)
                by_operation.setdefault(operation.lower(), []).append(elapsed)
        bench.rest()
    return percentiles(times) | {name: percentiles(values) for name, values in by_operation.items()}


def _by_rpc(home: Home, count: int) -> dict[str, float]:
    bench, trainer, caller = HostBench(home), LoopThread("kasmina"), LoopThread("operator")
    server = trainer.run(_serve(bench, home))
    client = caller.run(_client(server.address, home))
    for operation in _LIFE_TO_PROBATION:
        bench.apply(operation)
    try:
        return percentiles(timed_ms(lambda: bench.apply_by_rpc(caller, client), count))
    finally:
        caller.run(client.close())
        caller.stop()
        trainer.run(server.drain())
        trainer.stop()


async def _serve(bench: HostBench, home: Home) -> MeshServer:
    from esper_servers.kasmina.service import KasminaServicer

    server = MeshServer(config=ServerConfig(), identity=home.identity("trainer"))
    server.add_service(KASMINA, KasminaServicer(bench.host, "bench"))
    await server.start()
    return server


async def _client(address: str, home: Home) -> KasminaClient:
    return KasminaClient(address, identity=home.identity())


def _envelope(home: Home, count: int) -> dict[str, float]:
    keyring, payload = home.keyring("tamiyo"), bytes(ENVELOPE_BYTES)
    audience = str(home.identity("trainer").spiffe_id)
    verifier = Verifier(keyring=home.keyring("trainer"), audience=audience, receiver_epoch=EPOCH)
    sequence = iter(range(1, 10**9))

    def once() -> None:
        envelope = _seal(keyring, payload, audience, EPOCH, next(sequence), str(uuid.uuid4()))
        verifier.verify(SignedEnvelope.FromString(envelope.SerializeToString()))

    return percentiles([value * 1e3 for value in timed_ms(once, count)], unit="us")


class HostBench:
    """A seed host on a small model, and the commands for it."""

    def __init__(self, home: Home, *, sites: int = 1) -> None:
        import torch

        from esper_servers.blueprints.catalogue import load_factories
        from esper_servers.kasmina.gates.config import GateConfig
        from esper_servers.kasmina.host import InProcessSeedHost
        from esper_servers.kasmina.host_config import SeedHostConfig
        from esper_servers.kasmina.kernels.background import BackgroundWorker
        from esper_servers.kasmina.learning_rate import OptimizerAuthority
        from esper_servers.kasmina.limits import LocalLimits
        from esper_servers.trainer import wrap_sites

        torch.set_num_threads(1)
        hidden = [torch.nn.Linear(64, 64) for _ in range(sites)]
        self._model = torch.nn.Sequential(*hidden, torch.nn.ReLU(), torch.nn.Linear(64, 10))
        optimizer = torch.optim.SGD(self._model.parameters(), lr=0.1)
        self._worker = BackgroundWorker("bench")
        self._keyring, self._audience = home.keyring("tamiyo"), str(home.identity("trainer").spiffe_id)
        self.host = InProcessSeedHost(
            model=self._model,
            sites=wrap_sites(self._model, [str(number) for number in range(sites)]),
            keyring=home.keyring("trainer"),
            audience=self._audience,
            library=_kernels(),
            factories=load_factories(),
            learning_rate=OptimizerAuthority(optimizer),
            config=SeedHostConfig(
                limits=LocalLimits(live_seeds=10_000, added_parameters=10**12), gates=GateConfig(embargo_seconds=0.0)
            ),
            background=self._worker,
        )
        self._model(torch.zeros(8, 64)).sum().backward()
        self.seed_ids = list(self.host.seeds)
        self._sequence = 0

    def apply(self, operation: str, *, seed_id: str = "") -> float:
        """Submit and carry out one command; returns the milliseconds that the training waited.

        Raises RuntimeError unless it was applied.
        """
        envelope = self.seal(operation, seed_id=seed_id)
        begun = time.perf_counter()
        self.host.submit(envelope)
        outcomes = self.host.apply_pending()
        elapsed = time.perf_counter() - begun
        if not outcomes:
            self._wait_for_the_module()
            begun = time.perf_counter()
            outcomes = self.host.apply_pending()
            elapsed += time.perf_counter() - begun
        for _ in range(_BLENDING_STEPS if operation == "START_GRAFTING" else 0):
            self.host.advance_alphas()
            self._train_once()
        if operation == "START_TRAINING":
            self._train_once()
        results = [outcome.result for outcome in outcomes]
        if results != [CommandOutcome.RESULT_APPLIED]:
            raise RuntimeError(f"{operation} was not applied: {outcomes}")
        return elapsed * 1e3

    def _wait_for_the_module(self) -> None:
        built = threading.Event()
        self._worker(built.set)
        if not built.wait(_BUILD_SECONDS):
            raise RuntimeError("The module was not built.")

    def _train_once(self) -> None:
        """Give the seed one update: its gates ask whether it has learned at all, and what its outputs are like."""
        import torch

        loss = self._model(torch.ones(8, 64)).square().mean()
        loss.backward()
        self.host.observe(float(loss.detach()), self._sequence)
        self.host.finalize_step(self._sequence)

    def remember(self, nonces: int) -> None:
        """Have the host remember so many commands: each is verified, carried out as far as it can be, and settled."""
        for _ in range(nonces):
            self.host.submit(self.seal("FINE_TUNE", seed_id="seed-nowhere"))
            self.host.apply_pending()

    def apply_by_rpc(self, caller: LoopThread, client: KasminaClient) -> None:
        """Send one command, which is verified and queued there, and carry it out."""
        request = ApplyCommandRequest(command=self.seal("FINE_TUNE"))
        caller.run(client.apply_command(request))
        self.host.apply_pending()

    def rest(self) -> None:
        """Let the slot become dormant again."""
        for step in range(_REST_STEPS):
            self.host.finalize_step(step)

    def seal(self, operation: str, *, seed_id: str = "") -> SignedEnvelope:
        """Sign the next command, for the first seed unless another is named."""
        self._sequence += 1
        command = AdaptationCommand(
            version=1,
            command_id=str(uuid.uuid4()),
            command_type=CommandType.COMMAND_TYPE_SEED,
            target_seed_id=seed_id or self.seed_ids[0],
            issued_by="tamiyo",
            seed_operation=CommandSeedOperation(
                operation=SeedOperation.Value(f"SEED_OPERATION_{operation}"), blueprint_id=_BLUEPRINT
            ),
        )
        payload, epoch = command.SerializeToString(), self.host.receiver_epoch
        return _seal(self._keyring, payload, self._audience, epoch, self._sequence, command.command_id)


def _kernels() -> KernelLibrary:
    from esper_servers.kasmina.kernels.library import Kernel, KernelLibrary
    from esper_servers.urza.seeding import installed_blueprints

    async def fetch(blueprint_id: str) -> Kernel:
        raise NotFound(blueprint_id)

    library = KernelLibrary(fetch, lambda work: work.close())
    for entry in installed_blueprints():
        library.add(Kernel(entry.blueprint))
    return library


def _seal(keyring: Keyring, payload: bytes, audience: str, epoch: bytes, sequence: int, nonce: str) -> SignedEnvelope:
    return sign(
        payload,
        payload_type=COMMAND_TYPE,
        keyring=keyring,
        audience=audience,
        issued_at_ns=time.time_ns(),
        nonce=nonce,
        receiver_epoch=epoch,
        sequence=sequence,
    )
