from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class SeededDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]  # Untyped in torch.
    """Within it, what this thread draws on the CPU comes from a generator of its own, and from that alone.

    The default generator belongs to the training, which may draw from it on another thread at the same moment. The
    numbers are those of a default generator that was seeded alike.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Untyped in torch.
        self._generator = torch.Generator(device="cpu").manual_seed(seed % 2**63)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, with the generator if it draws."""
        kwargs = kwargs or {}
        if (
            torch.Tag.nondeterministic_seeded in func.tags
            and kwargs.get("generator") is None
            and _is_on_cpu(args, kwargs)
        ):
            return _drawing_from_a_generator(func)(*args, **{**kwargs, "generator": self._generator})
        return func(*args, **kwargs)


def _is_on_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device") or next((each.device for each in args if isinstance(each, torch.Tensor)), None)
    return device is None or torch.device(device).type == "cpu"


@cache
def _drawing_from_a_generator(func: Any) -> Callable[..., Any]:
    """Return the overload of an operation that takes a generator; raises RuntimeError when there is none."""
    if "generator" in _argument_names(func):
        return func  # type: ignore[no-any-return]  # Untyped in torch.
    wanted = {*_argument_names(func), "generator"}
    packet = func.overloadpacket
    for name in packet.overloads():
        overload = getattr(packet, name)
        if set(_argument_names(overload)) == wanted:
            return overload  # type: ignore[no-any-return]  # Untyped in torch.
    raise RuntimeError(f"{func} draws random numbers and takes no generator")


def _argument_names(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments]
