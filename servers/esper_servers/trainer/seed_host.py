from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from esper_client.event_loop import LoopThread
from esper_servers.blueprints.catalogue import load_factories
from esper_servers.kasmina.host import InProcessSeedHost
from esper_servers.kasmina.kernels.background import BackgroundWorker
from esper_servers.kasmina.kernels.library import KernelLibrary
from esper_servers.kasmina.kernels.source import KernelSource
from esper_servers.kasmina.learning_rate import LearningRateAuthority
from esper_servers.kasmina.limits import LocalLimits
from esper_servers.kasmina.memory import reader_for
from esper_servers.kasmina.ranks.leading_host import LeadingSeedHost
from esper_servers.kasmina.ranks.ranks import Ranks

from .membership import Membership
from .sites import choose_sites, wrap_sites


def make_seed_host(
    model: nn.Module,
    learning_rate: LearningRateAuthority,
    member: Membership,
    site_names: Sequence[str] | None,
    limits: LocalLimits,
    thread: LoopThread,
    *,
    has_training_thread: bool,
    ranks: Ranks | None = None,
) -> InProcessSeedHost:
    """Wrap the sites of a model, and put together the host of their seeds; the catalogue is kept in the background."""
    source = KernelSource(member.mesh.urza, member.identity)
    library = KernelLibrary(source.fetch, thread.spawn, config=member.kernels())
    sites = wrap_sites(model, site_names if site_names is not None else choose_sites(model))
    for site in sites.values():
        site.keeps_graph = ranks is not None
    kind: Callable[..., InProcessSeedHost] = (
        InProcessSeedHost if ranks is None else partial(LeadingSeedHost, ranks=ranks)
    )
    host = kind(
        model=model,
        sites=sites,
        keyring=member.keyring,
        audience=str(member.identity.spiffe_id),
        library=library,
        factories=load_factories(),
        learning_rate=learning_rate,
        config=member.seed_host_config(limits),
        read_memory=reader_for(next((p.device for p in model.parameters()), torch.device("cpu"))),
        background=BackgroundWorker("esper-prewarm"),
        has_training_thread=has_training_thread,
    )
    thread.spawn(source.keep_catalogue(library))
    return host
