from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import structlog
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage
from esper_servers.blueprints.out_of_memory import describe

from . import lifecycle
from .blending.channels import channel_count, channel_dim
from .blending.config import BlendConfig
from .blending.finite import finite_mask
from .blending.mixing import Blend, Mixing, mixing_of, shadow
from .blending.steadiness import strength
from .blending.zero_gradient import tie
from .guarded_branch import anchored, guard, leaves

log = structlog.get_logger(__name__)

LOOK_EACH = 64
"""Branches from one look at what they would write to the next; the first ones of a seed are looked at each."""
FIRST_LOOKS = 3
_SHARED_WITH_HOST = (
    "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_OWN = frozenset({
    "training", "stage", "alpha", "is_fine_tuning", "paused", "failure", "is_classifier", "input_shape",
    "output_shape", "dtype", "device", "_version", "_alpha", "_saw_non_finite", "_strength", "hook_ms", "_branches",
    "_foreign", "_own", "around_backward", "keeps_graph",
})  # fmt: skip


class Site(nn.Module):
    """Takes the place of a submodule: the host, and the seed that grows on its output.

    It shows the host's parameters, buffers, children and attributes as its own, so checkpoints, parameter names and
    optimizers do not change. The seed is none of its children: the user's optimizer, checkpoint and DDP wrapper do not
    see it. A seed that raises or changes the shape is left out, and `failure` says so.
    """

    _host: nn.Module
    _seed: nn.Module | None
    _blend: Blend

    def __init__(self, host: nn.Module, *, is_head: bool = False) -> None:
        """Stand for `host`; the head of a model is its last layer."""
        super().__init__()
        # Around nn.Module.__setattr__, which would register host and seed as children and prefix every key.
        for name in _SHARED_WITH_HOST:
            object.__setattr__(self, name, getattr(host, name))
        object.__setattr__(self, "_host", host)
        object.__setattr__(self, "_seed", None)
        object.__setattr__(self, "_blend", Blend())
        self._version = getattr(host, "_version", 1)
        self.training = host.training
        self.stage: SeedLifecycleStage.ValueType = lifecycle.DORMANT
        self.alpha = 0.0
        self.is_fine_tuning = False
        self.is_classifier = is_head and isinstance(host, nn.Linear) and host.out_features > 1
        self.paused = False
        self.failure = ""
        self.input_shape: tuple[int, ...] = ()
        self.output_shape: tuple[int, ...] = ()
        own = next((p for p in host.parameters() if p.is_floating_point()), torch.empty(0))
        self.dtype, self.device = own.dtype, own.device
        self._saw_non_finite: Tensor | None = None
        self._strength: Tensor | None = None
        self.hook_ms = 0.0
        """What the last forward pass took beside the host, in milliseconds; on a device what it takes to launch."""
        self._branches = 0
        self._foreign: list[Tensor] = []
        self._own: list[Tensor] = []
        self.around_backward: Callable[[], AbstractContextManager[object]] = nullcontext
        """What the backward pass of the seed, and nothing else, runs within; it must not raise."""
        self.keeps_graph = False
        """The host gets gradients of zero where it would get none: DistributedDataParallel waits for one of each."""

    @property
    def host(self) -> nn.Module:
        """The submodule that stood here."""
        return self._host

    @property
    def seed(self) -> nn.Module | None:
        """The module that grows here."""
        return self._seed

    @property
    def own_parameters(self) -> list[Tensor]:
        """The parameters of the seed that learned when it was planted: no others get gradients of it."""
        return self._own

    @property
    def alpha(self) -> float:
        """How far the seed is blended in, from 0 to 1."""
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        # The number beside the buffer: to read that of a device would wait for it.
        self._alpha = alpha
        self._blend.alpha.fill_(alpha)

    @property
    def seed_mixing(self) -> Mixing:
        """The mode in which the seed is mixed in."""
        return self._blend.mixing

    @property
    def seed_channels(self) -> int:
        """How many channels the host puts out, 0 while that is not known."""
        return channel_count(self.output_shape, self._channel_dim())

    def mix_as(self, config: BlendConfig) -> None:
        """Mix in another mode from here on; the configuration fits `seed_channels`."""
        self._blend.mixing = mixing_of(
            config, channels=self.seed_channels, dim=self._channel_dim(), dims=len(self.output_shape) + 1,
            is_classifier=self.is_classifier,
        )  # fmt: skip
        self._blend.to(self.device)

    def _channel_dim(self) -> int:
        return channel_dim(self._host, len(self.output_shape) + 1)

    def hold(self, seed: nn.Module | None) -> None:
        """Let a module grow here, or nothing, with alpha 0 and CONVEX."""
        object.__setattr__(self, "_seed", seed)
        self.mix_as(BlendConfig())
        self.alpha, self.paused, self.failure, self._saw_non_finite, self._strength = 0.0, False, "", None, None
        self._branches, self._foreign, self.around_backward = 0, [], nullcontext
        self._own = [p for p in seed.parameters() if p.requires_grad] if seed is not None else []
        if seed is not None:
            seed.train(self.training)

    def gave_non_finite(self) -> bool:
        """Whether the seed has given a value that is not finite since it was planted and blended in."""
        return self._saw_non_finite is not None and bool(self._saw_non_finite)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the host, then the seed as its stage says."""
        h = self._host(*args, **kwargs)
        return self._grow_on(h, args)

    # Outside the compiled region, so that germination never recompiles the host.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped.
    def _grow_on(self, h: Any, args: tuple[Any, ...]) -> Any:
        if not isinstance(h, Tensor):
            return h
        if self.training or not self.output_shape:
            self._learn_shapes(args, h)
        if self._seed is None or self.paused or self.failure:
            return h
        begun = time.perf_counter()
        try:
            return self._mixed(self._seed, h)
        except Exception as error:  # noqa: BLE001  # The seed is foreign code inside the user's forward pass.
            self._fail(error)
            return h
        finally:
            self.hook_ms = (time.perf_counter() - begun) * 1e3

    def _mixed(self, seed: nn.Module, h: Tensor) -> Tensor:
        if self.stage == lifecycle.FOSSILIZED:
            return self._blend.mixing(h, self._through(seed, h))  # type: ignore[no-any-return]  # As torch types a call.
        if self.stage == lifecycle.TRAINING and self.training and torch.is_grad_enabled():
            return shadow(h, self._beside(seed, h))
        if self.stage in lifecycle.BLENDED and self.alpha > 0.0:
            return self._tied(self._blended(seed, h) if self._learns else self._probed(seed, h), h)
        return h

    @property
    def _learns(self) -> bool:
        return self.stage == lifecycle.BLENDING or self.is_fine_tuning

    def _blended(self, seed: nn.Module, h: Tensor) -> Tensor:
        s = self._beside(seed, h)
        is_finite = finite_mask(s.detach())
        if is_finite is not None:
            self._note(is_finite)
        if self.stage == lifecycle.BLENDING and h.numel():
            self._strength = strength(s, h)
        return self._blend(h, s, is_finite)  # type: ignore[no-any-return]  # As torch types a call.

    def _probed(self, seed: nn.Module, h: Tensor) -> Tensor:
        """Blend a seed that is judged and does not learn: nothing is kept for a backward pass."""
        with torch.no_grad():
            return self._blended(seed, h)

    def _tied(self, mixed: Tensor, h: Tensor) -> Tensor:
        """Have the mixture in a graph where h is: the user's backward pass may begin right behind the site."""
        if not h.requires_grad:
            return mixed
        if self.keeps_graph:
            return tie(mixed, h)
        return mixed if mixed.requires_grad else anchored(mixed)

    def _note(self, is_finite: Tensor) -> None:
        # A flag on the device, read at the safe point, so that no forward pass waits for it.
        broken = ~is_finite.all()
        self._saw_non_finite = broken if self._saw_non_finite is None else self._saw_non_finite | broken

    def _beside(self, seed: nn.Module, h: Tensor) -> Tensor:
        """Run the seed where its backward pass can neither raise nor reach anything but the seed."""
        s = self._through(seed, h.detach())
        if s.requires_grad:
            if self._branches < FIRST_LOOKS or self._branches % LOOK_EACH == 0:
                known = {id(p) for p in self._own}
                self._foreign += [leaf for leaf in leaves(s) if id(leaf) not in known]
            self._branches += 1
        return guard(s, self._own, self._fail, self.around_backward)

    def take_strength(self) -> Tensor | None:
        """Return how strong the seed's output was beside the host's in the last blended pass since the last call."""
        found, self._strength = self._strength, None
        return found

    def can_be_held(self) -> bool:
        """Whether the host stands alone while the seed is paused, and the seed takes part again after it."""
        if self._seed is None:
            return False
        h, was = (
            torch.zeros((2, *self.output_shape), dtype=self.dtype, device=self.device),
            (self.training, self.paused),
        )
        # A seed that drops units would take random numbers from the training.
        self._seed.eval()
        try:
            with torch.no_grad():
                self.paused = True
                is_held = self._grow_on(h, ()) is h
                self.paused = False
                takes_part = self._grow_on(h, ()) is not h
        finally:
            self._seed.train(was[0])
            self.paused = was[1]
        return is_held and takes_part and not self.failure

    def take_foreign(self) -> list[Tensor]:
        """Return what the seed would have written to, and is none of its own, since the last call."""
        found, self._foreign = self._foreign, []
        return found

    @staticmethod
    def _through(seed: nn.Module, h: Tensor) -> Tensor:
        s: Tensor = seed(h).to(h.dtype)
        if s.shape != h.shape:
            raise ValueError(f"the seed turned {tuple(h.shape)} into {tuple(s.shape)}")
        return s

    def _fail(self, error: Exception) -> None:
        self.failure = describe(error)
        log.error("seed_failed", failure=self.failure, stage=SeedLifecycleStage.Name(self.stage))

    def _learn_shapes(self, args: tuple[Any, ...], h: Tensor) -> None:
        # Of training: an evaluation may use another size of image or sequence.
        if args and isinstance(args[0], Tensor):
            self.input_shape = tuple(args[0].shape[1:])
        self.output_shape, self.device = tuple(h.shape[1:]), h.device

    def train(self, mode: bool = True) -> Self:
        """Switch host and seed."""
        self._host.train(mode)
        self.training = mode
        if self._seed is not None:
            self._seed.train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._host._apply(fn, recurse)  # type: ignore[no-untyped-call]  # Untyped in torch.
        self._blend._apply(fn)
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.dtype, self.device = moved.dtype, moved.device
        if self._seed is not None:
            self._seed._apply(fn)  # type: ignore[no-untyped-call]  # Untyped in torch.
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._host._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._host._load_from_state_dict(*args)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> _IncompatibleKeys:
        """Restore the host."""
        keys: _IncompatibleKeys = self._host.load_state_dict(*args, **kwargs)
        return keys

    def __getstate__(self) -> dict[str, Any]:
        # Of a copy, which is the user's, nobody watches the gradients; what watches them here cannot be copied.
        return {**self.__dict__, "around_backward": nullcontext, "_foreign": []}

    def extra_repr(self) -> str:
        """Name what stands here."""
        return f"host={type(self._host).__name__}, stage={SeedLifecycleStage.Name(self.stage)}"

    def __setattr__(self, name: str, value: Any) -> None:
        # A host may have parameters of these names, which nn.Module would refuse to see overwritten; and to change what
        # changes in each step costs less here.
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if "_host" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._host, name)
