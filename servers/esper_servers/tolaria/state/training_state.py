from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper_rpc.errors import FailedPrecondition, InvalidRequest

SESSION, MODEL, OPTIMIZER, RANDOM = "session", "model", "optimizer", "random"
RANKS = "ranks"
"""In a checkpoint: of each other rank what is its own. No part of this process."""
_OF_PARAMETERS = frozenset({"exp_avg", "momentum_buffer", "square_avg", "sum"})
"""What optimizers remember in the shape of the parameter."""


class Stateful(Protocol):
    """Anything that a checkpoint can hold: an optimizer, a scheduler, a gradient scaler, a data loader."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Restore what `state_dict` returned."""
        ...


class RandomNumbers:
    """The random number generators of torch, of every CUDA device, of Python and, where it is in use, of numpy."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each."""
        version, words, gauss = random.getstate()
        python = {"version": version, "words": torch.tensor(words), "gauss": gauss}
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": python}
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            state["cuda"] = torch.cuda.get_rng_state_all()
        if "numpy" in sys.modules:
            kind, words, *rest = sys.modules["numpy"].random.get_state()
            state["numpy"] = {"kind": kind, "words": torch.tensor(words.astype("int64")), "rest": rest}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore those that are here."""
        torch.set_rng_state(state_dict["torch"])
        python = state_dict["python"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
        if "cuda" in state_dict and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state_dict["cuda"])
        if "numpy" in state_dict and "numpy" in sys.modules:
            saved = state_dict["numpy"]
            sys.modules["numpy"].random.set_state((saved["kind"], saved["words"].numpy(), *saved["rest"]))


class TrainingState:
    """All that a training must have again to go on from an earlier step, part by part under a name."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model = model
        self._parts: dict[str, Stateful] = {MODEL: model, OPTIMIZER: optimizer, RANDOM: RandomNumbers()}

    def register(self, name: str, part: Stateful) -> None:
        """Have another part saved and restored with the rest; raises InvalidRequest when the name is taken."""
        if name in self._parts or name == RANKS:
            raise InvalidRequest(f"There is a part {name!r} already.")
        self._parts[name] = part

    def capture(self) -> dict[str, Any]:
        """Return the state of each part as it is; the tensors in it may be those that are trained."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def own(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of a state is the own of each of several ranks: random numbers, and what was registered."""
        return {name: part for name, part in state.items() if name not in (SESSION, MODEL, OPTIMIZER)}

    def trained_tensors(self) -> Iterator[Tensor]:
        """What learns, and what the optimizer remembers of it; no buffers, which each rank has its own of."""
        yield from self._model.parameters()
        optimizer = self._parts[OPTIMIZER]
        assert isinstance(optimizer, Optimizer)
        for remembered in optimizer.state.values():
            yield from tensors_in(remembered)
        yield torch.tensor([float(group["lr"]) for group in optimizer.param_groups], dtype=torch.float64)

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise FailedPrecondition when a state is not of these parts and this model."""
        expected, found = set(self._parts), set(state) - {RANKS}
        if expected != found:
            different = ", ".join(sorted(expected ^ found))
            raise FailedPrecondition(f"The checkpoint and this training do not have the same parts: {different}.")
        own, saved = _shapes(self._model.state_dict()), _shapes(state[MODEL])
        if own != saved:
            name = next(name for name in sorted({*own, *saved}) if own.get(name) != saved.get(name))
            raise FailedPrecondition(f"The checkpoint is of another model: {name} differs.")

    def restore(self, state: Mapping[str, Any], *, without: frozenset[str] = frozenset()) -> None:
        """Restore every part but those named; the state stays as it is, and may be restored again."""
        # Seeds give the optimizer its groups, and restoring anything may draw random numbers.
        for name in sorted(self._parts, key=lambda name: (name != SESSION, name == RANDOM)):
            if name not in without:
                _restore(self._parts[name], state[name])
        # What was summed up since is of the weights before.
        self._model.zero_grad(set_to_none=True)


def first_not_finite(state: Mapping[str, Any]) -> str:
    """Name a weight of the model that holds NaN or infinity, empty when none does."""
    floating = ((name, t) for name, t in state[MODEL].items() if isinstance(t, Tensor) and t.is_floating_point())
    return next((name for name, t in floating if t.numel() and not _is_finite(t)), "")


def tensors_in(state: Any) -> Iterator[Tensor]:
    """Every tensor in a nested state."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from tensors_in(value)


def copied(state: Any, spare: Any = None) -> Any:
    """Return a copy in the memory of this machine, in the tensors of `spare` where they have the same shape."""
    if isinstance(state, Tensor):
        return _filled(spare, state) if _fits(spare, state, "cpu") else _fresh(state, "cpu")
    return _mapped(copied, state, spare)


def placed(state: Any, live: Any) -> Any:
    """Return a copy where it is in use: in the tensors of `live` where they have the same shape and are here."""
    if isinstance(state, Tensor):
        return _filled(live, state) if _fits(live, state, None) else _fresh(state, None)
    return _mapped(placed, state, live)


def _mapped(copy_of: Any, state: Any, other: Any) -> Any:
    if isinstance(state, dict):
        held = other if isinstance(other, Mapping) else {}
        items = {key: copy_of(value, held.get(key)) for key, value in state.items()}
        return items if type(state).__module__ == "builtins" else _like(state, items)
    if isinstance(state, list | tuple):
        of_same_length = isinstance(other, list | tuple) and len(other) == len(state)
        values = [copy_of(value, other[index] if of_same_length else None) for index, value in enumerate(state)]
        return values if isinstance(state, list) else tuple(values)
    return copy.deepcopy(state)


def _like(state: dict[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """Keep the class, as of a Counter, and what torch notes about a state_dict."""
    like = copy.copy(state)
    dict.update(like, items)  # That of a Counter adds.
    return like


def _restore(part: Stateful, state: Any) -> None:
    if isinstance(part, nn.Module):
        part.load_state_dict(state)
        return
    # Others may keep the tensors that they are given, so they get their own ones back.
    part.load_state_dict(placed(state, part.state_dict()))
    if isinstance(part, Optimizer):
        _check_places(part)


def _check_places(optimizer: Optimizer) -> None:
    """Raise FailedPrecondition when the groups stood in another order: the moments would be another weight's."""
    for parameter, state in optimizer.state.items():
        if any(isinstance(state.get(key), Tensor) and state[key].shape != parameter.shape for key in _OF_PARAMETERS):
            raise FailedPrecondition("The parameters of the optimizer are in another order than in the checkpoint.")


def _fits(place: Any, tensor: Tensor, device: str | None) -> bool:
    if not isinstance(place, Tensor) or (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
        return False
    return device is None or place.device.type == device


@torch.no_grad()
def _filled(place: Tensor, tensor: Tensor) -> Tensor:
    return place.copy_(tensor)


def _fresh(tensor: Tensor, device: str | None) -> Tensor:
    copy_of: Tensor = tensor.detach().to(device=device or tensor.device, copy=True)
    return copy_of


def _is_finite(tensor: Tensor) -> bool:
    # Both are NaN where one element is. It reads the tensor once: isfinite of all of it takes twenty times as long.
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(_wide(tensor)))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() == 1 else tensor


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in state.items()}
