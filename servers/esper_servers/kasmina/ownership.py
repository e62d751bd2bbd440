from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from esper_rpc.errors import InvalidRequest

from .telemetry.notices import INFO, WARNING, Tell, tell_nobody

HOST: Final = "host"
PARAMETER_VIOLATION = "parameter_violation"
VIOLATIONS = 3
"""Of one seed, until it is culled."""


class _Owned(NamedTuple):
    owner: str
    tensor: weakref.ref[Tensor]


class Ownership:
    """Knows whose each tensor is, the host's, a seed's or a teacher's, by the memory in which it lies.

    Asking costs what the tensors in question cost, however many are registered. For use at the safe point.
    """

    def __init__(self, model: nn.Module, *, tell: Tell = tell_nobody) -> None:
        self._model = model
        self._tell = tell
        self._owned: dict[int, _Owned] = {}
        self._keys: dict[str, list[int]] = {}
        self._parameters: dict[str, int] = {}
        self._modules: dict[str, nn.Module] = {}
        self._violations: dict[str, int] = {}
        self._sentinel: Callable[[], int] = lambda: 0
        self._seen = 0
        self.added_parameters = 0
        """Of all seeds together."""
        self.refresh()

    def register_seed(self, seed_id: str, module: nn.Module) -> str:
        """Enter the module of a seed; returns whose memory it shares, and enters nothing then."""
        self._follow_the_model()
        other = self._other_than(seed_id, _tensors_of(module))
        if other:
            self._tell_of_violation(seed_id, other)
            return other
        self._enter(seed_id, module)
        self._parameters[seed_id] = sum(p.numel() for p in module.parameters())
        self.added_parameters += self._parameters[seed_id]
        self._tell("parameter.registration", INFO, reason="seed", seed_id=seed_id, count=self._parameters[seed_id])
        return ""

    def register_teacher(self, name: str, module: nn.Module) -> None:
        """Enter a teacher, whose weights no seed may share or write; raises InvalidRequest unless they are its own."""
        self._follow_the_model()
        if name == HOST or name in self._parameters:
            raise InvalidRequest(f"{name!r} names the host or a seed; choose another name.")
        other = self._other_than(name, _tensors_of(module))
        if other:
            raise InvalidRequest(f"The teacher {name!r} shares memory with {other!r}; pass a copy of it.")
        self._leave(name)
        self._enter(name, module)
        self._tell("parameter.registration", INFO, reason="teacher", teacher=name, count=len(self._keys[name]))

    def release(self, seed_id: str) -> None:
        """Strike out a seed that was taken out."""
        self._leave(seed_id)
        self._violations.pop(seed_id, None)
        self.added_parameters -= self._parameters.pop(seed_id, 0)

    def validate(self, seed_id: str, tensors: Iterable[Tensor]) -> str:
        """Return whose the first of these tensors is that is not the seed's own; empty when there is none.

        What belongs to nobody is no violation. A violation is counted and told.
        """
        other = self._other_than(seed_id, tensors)
        if other:
            self._violations[seed_id] = self._violations.get(seed_id, 0) + 1
            self._tell_of_violation(seed_id, other)
        return other

    def violations_of(self, seed_id: str) -> int:
        """Return how often a seed has violated since it was planted."""
        return self._violations.get(seed_id, 0)

    def recall(self, seed_id: str, violations: int) -> None:
        """Go on counting from so many violations, those of a seed that was restored."""
        self._violations[seed_id] = violations

    def parameters_of(self, seed_id: str) -> int:
        """Return how many parameters a seed has here."""
        return self._parameters.get(seed_id, 0)

    def owner_of(self, tensor: Tensor) -> str:
        """Return whose a tensor is; empty when it is nobody's."""
        self._follow_the_model()
        return self._owner_of(tensor)

    def is_repeated(self, seed_id: str) -> bool:
        """Whether a seed has violated so often that it is to be culled."""
        return self.violations_of(seed_id) >= VIOLATIONS

    def refresh(self, seeds: Iterable[tuple[str, nn.Module]] | None = None) -> None:
        """Look anew where everything lies, after the model was moved or seeds were restored."""
        if seeds is not None:
            for seed_id in list(self._parameters):
                self.release(seed_id)
            for seed_id, module in seeds:
                self._modules[seed_id] = module
                self._parameters[seed_id] = sum(p.numel() for p in module.parameters())
            self.added_parameters = sum(self._parameters.values())
        modules, self._owned, self._keys = self._modules, {}, {}
        self._modules = {}
        for owner, module in {**modules, HOST: self._model}.items():
            self._enter(owner, module)
        first = next(iter(_tensors_of(self._model)), None)
        self._sentinel = lambda: _key(first) if first is not None else 0
        self._seen = self._sentinel()

    def _follow_the_model(self) -> None:
        # A cast or a move gives every tensor of the model other memory; one of them tells.
        if self._sentinel() != self._seen:
            self.refresh()

    def _other_than(self, owner: str, tensors: Iterable[Tensor]) -> str:
        return next((other for t in tensors if (other := self._owner_of(t)) not in ("", owner)), "")

    def _owner_of(self, tensor: Tensor) -> str:
        key = _key(tensor)
        owned = self._owned.get(key)
        if owned is None:
            return ""
        known = owned.tensor()
        # Memory that was given back may have been taken by anybody.
        return owned.owner if known is not None and _key(known) == key else ""

    def _enter(self, owner: str, module: nn.Module) -> None:
        self._modules[owner] = module
        keys = self._keys.setdefault(owner, [])
        for tensor in _tensors_of(module):
            if key := _key(tensor):
                self._owned[key] = _Owned(owner, weakref.ref(tensor))
                keys.append(key)

    def _leave(self, owner: str) -> None:
        self._modules.pop(owner, None)
        for key in self._keys.pop(owner, ()):
            if key in self._owned and self._owned[key].owner == owner:
                del self._owned[key]

    def _tell_of_violation(self, seed_id: str, owner: str) -> None:
        self._tell("parameter.violation", WARNING, reason=PARAMETER_VIOLATION, seed_id=seed_id, owner=owner)


def _tensors_of(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _key(tensor: Tensor) -> int:
    """Return where a tensor lies, 0 when it takes no memory, or none that another could share, as a sparse one."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
