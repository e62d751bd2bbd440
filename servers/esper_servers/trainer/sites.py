from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from esper_client.event_loop import LoopThread
from esper_rpc.errors import ConfigError
from esper_servers.kasmina.site import Site

WRAPPABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)
OPAQUE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def choose_sites(model: nn.Module) -> list[str]:
    """Name every layer that can be a site, except the last one."""
    return _layers(model)[:-1]


def _layers(model: nn.Module) -> list[str]:
    # These read the weights of their children past any forward, so that a site inside would do nothing.
    opaque = [name for name, module in model.named_modules() if isinstance(module, OPAQUE)]
    names = [name for name, module in model.named_modules() if name and isinstance(module, WRAPPABLE)]
    return [name for name in names if not name.startswith(tuple(f"{each}." for each in opaque))]


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
    if _sites_in(model):
        raise ConfigError(
            "This model has been attached already: attach what `export()` of its session returns, or a new model."
        )
    sites, head = {}, _layers(model)[-1:]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        sites[name] = Site(known[name], is_head=name in head)
        setattr(known[parent], leaf, sites[name])
    return sites


@contextlib.contextmanager
def undone_if_it_fails(model: nn.Module, thread: LoopThread) -> Iterator[None]:
    """Leave the model and the process as they were where attaching fails: whoever mends the cause attaches again."""
    before = _sites_in(model)
    try:
        yield
    except BaseException:
        _unwrap(model, keep=before)
        thread.stop()
        raise


def _unwrap(model: nn.Module, *, keep: Sequence[Site]) -> None:
    for module in list(model.modules()):
        parent = module.host if isinstance(module, Site) else module
        for name, child in list(parent.named_children()):
            if isinstance(child, Site) and not any(child is each for each in keep):
                setattr(parent, name, child.host)


def _sites_in(model: nn.Module) -> list[Site]:
    return [module for module in model.modules() if isinstance(module, Site)]
