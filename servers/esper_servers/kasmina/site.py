from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage

from . import lifecycle


class _Isolate(torch.autograd.Function):
    """Forward is the host's output, bit for bit; backward gives the seed the same gradient as the host.

    Nothing is added to the output, so that a seed that yields NaN cannot reach it.
    """

    @staticmethod
    def forward(ctx: Any, host: Tensor, seed: Tensor) -> Tensor:
        return host.view_as(host)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient


class Site(nn.Module):
    """Takes the place of a submodule: the host, and the seed that grows on its output.

    The host's parameters keep their names in state_dict; the seed is not part of it.
    """

    alpha: Tensor

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host
        self.register_buffer("alpha", torch.zeros(()), persistent=False)
        # Held outside the module tree: the user's optimizer, checkpoint and DDP wrapper do not see a growing seed.
        self._outside: dict[str, Any] = {"seed": None}
        self.stage: SeedLifecycleStage.ValueType = lifecycle.DORMANT
        self.paused = False
        self.input_shape: tuple[int, ...] = ()
        self.output_shape: tuple[int, ...] = ()
        self.dtype = torch.float32
        self.device: torch.device = torch.device("cpu")
        self._register_state_dict_hook(_drop_host_prefix)  # type: ignore[no-untyped-call]  # As torch has it.
        self._register_load_state_dict_pre_hook(self._add_host_prefix)  # type: ignore[no-untyped-call]  # Likewise.

    @property
    def seed(self) -> nn.Module | None:
        """The module that grows here."""
        seed: nn.Module | None = self._outside["seed"]
        return seed

    def hold(self, module: nn.Module | None) -> None:
        """Put a seed here, or take it away. An assignment would make it a child of this module."""
        self._outside["seed"] = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the host, then the seed as its stage says."""
        h = self.host(*args, **kwargs)
        if not self.output_shape and isinstance(h, Tensor):
            self._learn_shapes(args, h)
        seed = self.seed
        if seed is None or self.paused:
            return h
        return self._blend(seed, h)

    def _blend(self, seed: nn.Module, h: Tensor) -> Tensor:
        if self.stage == lifecycle.FOSSILIZED:
            out: Tensor = seed(h)
            return out
        if self.stage == lifecycle.TRAINING:
            if not (self.training and torch.is_grad_enabled()):
                return h
            isolated: Tensor = _Isolate.apply(h, seed(h.detach()))  # type: ignore[no-untyped-call]  # As torch has it.
            return isolated
        if self.stage in lifecycle.BLENDED:
            return blend_convex(h, seed(h.detach()), self.alpha)
        return h

    def _learn_shapes(self, args: tuple[Any, ...], h: Tensor) -> None:
        if args and isinstance(args[0], Tensor):
            self.input_shape = tuple(args[0].shape[1:])
        self.output_shape, self.dtype, self.device = tuple(h.shape[1:]), h.dtype, h.device

    def _add_host_prefix(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in [k for k in state if k.startswith(prefix) and not k.startswith(f"{prefix}host.")]:
            state[f"{prefix}host.{key[len(prefix) :]}"] = state.pop(key)


def blend_convex(host: Tensor, seed: Tensor, alpha: Tensor) -> Tensor:
    """Alpha * seed + (1 - alpha) * host, the host always detached (requirements 4.5)."""
    return alpha * seed + (1 - alpha) * host.detach()


def _drop_host_prefix(module: nn.Module, state: dict[str, Any], prefix: str, _local: Any) -> None:
    marked = f"{prefix}host."
    for key in [k for k in state if k.startswith(marked)]:
        state[prefix + key[len(marked) :]] = state.pop(key)
