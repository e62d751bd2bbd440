"""The trainer side put together: what `esper_client.attach` finds."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import structlog
import torch
from torch import nn

from esper_client.client import UrzaClient
from esper_client.discovery import MeshAddress, find_mesh
from esper_client.event_loop import LoopThread
from esper_client.session import SessionConfig, TrainingSession
from esper_rpc.envelope import Keyring
from esper_rpc.errors import ConfigError, DataLoss, EsperError
from esper_rpc.identity import Identity
from esper_rpc.proto.kasmina.v1 import kasmina_service_pb2
from esper_rpc.proto.urza.v1 import FetchKernelRequest, GetBlueprintRequest, ListBlueprintsRequest
from esper_rpc.server import MeshServer, ServerConfig
from esper_servers.blueprints.catalogue import load_factories
from esper_servers.kasmina.host import InProcessSeedHost
from esper_servers.kasmina.kernel_library import Kernel, KernelLibrary
from esper_servers.kasmina.learning_rate import OptimizerAuthority
from esper_servers.kasmina.limits import LocalLimits
from esper_servers.kasmina.service import KasminaServicer
from esper_servers.kasmina.site import Site

log = structlog.get_logger(__name__)

KASMINA = kasmina_service_pb2.DESCRIPTOR.services_by_name["KasminaService"]
WRAPPABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)
OPAQUE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
URZA_TIMEOUT_SECONDS = 2.0
KASMINA_DRAIN_SECONDS = 0.5


class DetachedSession:
    """What a loop gets when there is no mesh: the same calls, and nothing happens."""

    is_connected = False

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def step(self, *_: Any, **__: Any) -> list[Any]:
        """Do nothing."""
        return []

    def start_epoch(self, epoch: int) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing to restore."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""

    def export(self) -> nn.Module:
        """Return a copy of the model."""
        return copy.deepcopy(self._model)

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    environ: Mapping[str, str] = os.environ,
    mesh: MeshAddress | None = None,
    sites: Sequence[str] | None = None,
    run_id: str = "",
    step_budget_ms: float = 5.0,
    limits: LocalLimits | None = None,
    kasmina_address: str = "127.0.0.1:0",
) -> TrainingSession | DetachedSession:
    """Wrap sites of the model, open the run and serve Kasmina. See esper_client.attach.

    Without `sites` every hidden Linear or convolution becomes one; the last layer does not.
    """
    found = mesh or find_mesh(environ)
    if found is None:
        warnings.warn("No mesh found: training runs on without it. `esper up` starts one.", stacklevel=3)
        return DetachedSession(model)
    return _attach(model, optimizer, found, sites, run_id, step_budget_ms, limits, kasmina_address)


def _attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mesh: MeshAddress,
    site_names: Sequence[str] | None,
    run_id: str,
    step_budget_ms: float,
    limits: LocalLimits | None,
    kasmina_address: str,
) -> TrainingSession:
    identity = Identity.load(mesh.identity_dir)
    keyring = Keyring.load(mesh.identity_dir / "keyring.json")
    thread = LoopThread()
    library = KernelLibrary(_fetcher(mesh.urza, identity), thread.spawn)
    host = InProcessSeedHost(
        model=model,
        sites=wrap_sites(model, site_names if site_names is not None else choose_sites(model)),
        keyring=keyring,
        audience=str(identity.spiffe_id),
        library=library,
        factories=load_factories(),
        learning_rate=OptimizerAuthority(optimizer),
        limits=limits,
        has_training_thread=True,
    )
    session = TrainingSession(
        host=host,
        identity=identity,
        tamiyo_address=mesh.tamiyo,
        run_id=run_id,
        config=SessionConfig(step_budget_ms=step_budget_ms, optimizer_family=type(optimizer).__name__.lower()),
        thread=thread,
    )
    session.spawn(_prefetch(mesh.urza, identity, library))
    server = thread.run(_serve_kasmina(host, identity, kasmina_address, session.run_id), timeout=10)
    # Held until the session ends: gRPC ends a server that nothing refers to.
    thread.before_stop(server.drain)
    session.kasmina_address = server.address
    return session


def choose_sites(model: nn.Module) -> list[str]:
    """Name every layer that can be a site, except the last one."""
    # These read the weights of their children past any forward, so that a site inside would do nothing.
    opaque = [name for name, module in model.named_modules() if isinstance(module, OPAQUE)]
    names = [name for name, module in model.named_modules() if name and isinstance(module, WRAPPABLE)]
    return [name for name in names if not name.startswith(tuple(f"{each}." for each in opaque))][:-1]


def wrap_sites(model: nn.Module, names: Sequence[str]) -> dict[str, Site]:
    """Replace submodules by sites; raises ConfigError when the model is wrapped already or a name is unknown."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.jit.ScriptModule)
    is_compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    if is_compiled or isinstance(model, wrappers):
        raise ConfigError("Attach before torch.compile and before DistributedDataParallel: sites go inside.")
    known = dict(model.named_modules())
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"The model has no submodule {unknown[0]!r}.")
    if any(isinstance(module, Site) for module in known.values()):
        raise ConfigError("This model has been attached already.")
    sites = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        sites[name] = Site(known[name])
        setattr(known[parent], leaf, sites[name])
    return sites


def _fetcher(address: str, identity: Identity) -> Any:
    async def fetch(blueprint_id: str) -> Kernel:
        async with UrzaClient(address, identity=identity) as urza:
            response = await urza.get_blueprint(
                GetBlueprintRequest(blueprint_id=blueprint_id), timeout=URZA_TIMEOUT_SECONDS
            )
            blueprint = response.blueprint
            weights = await _download(urza, blueprint_id) if blueprint.manifest.weights_sha256 else None
            return Kernel(blueprint, weights)

    return fetch


async def _download(urza: UrzaClient, blueprint_id: str) -> bytes:
    content, size = bytearray(), 0
    async for part in urza.fetch_kernel(FetchKernelRequest(blueprint_id=blueprint_id), timeout=60):
        size = part.header.size_bytes or size
        content += part.chunk
    if len(content) != size:
        raise DataLoss("The kernel ended before its size.")
    return bytes(content)


async def _prefetch(address: str, identity: Identity, library: KernelLibrary) -> None:
    """Take the manifests of the whole catalogue ahead, so that a germination needs no wait."""
    try:
        async with UrzaClient(address, identity=identity) as urza:
            page = await urza.list_blueprints(ListBlueprintsRequest(page_size=1000), timeout=URZA_TIMEOUT_SECONDS)
    except EsperError as error:
        log.warning("catalogue_prefetch_failed", error=str(error))
        return
    for blueprint in page.blueprints:
        if not blueprint.manifest.weights_sha256:
            library.add(Kernel(blueprint))


async def _serve_kasmina(host: InProcessSeedHost, identity: Identity, address: str, run_id: str) -> MeshServer:
    server = MeshServer(config=ServerConfig(address=address, drain_seconds=KASMINA_DRAIN_SECONDS), identity=identity)
    server.add_service(KASMINA, KasminaServicer(host, run_id))
    await server.start()
    return server
