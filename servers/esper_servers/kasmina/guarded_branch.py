"""The backward pass of a seed, kept from the rest: it can neither raise there nor write what is not the seed's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ANCHOR = torch.zeros((), requires_grad=True)
"""What ties a branch to the graph of the user. It never gets a gradient."""


@dataclass(slots=True)
class _Branch:
    output: Tensor | None
    parameters: Sequence[Tensor]
    on_error: Callable[[Exception], None]
    around: Callable[[], AbstractContextManager[object]]

    def run(self, gradient: Tensor) -> None:
        """Give the seed its gradients."""
        output, keeps = self.output, torch._C._autograd._get_current_graph_task_keep_graph()
        if not keeps:
            self.output = None
        if output is None:
            return
        try:
            with self.around():
                torch.autograd.backward(output, gradient, retain_graph=keeps, inputs=self.parameters)
        except Exception as error:  # noqa: BLE001  # The seed is foreign code inside the user's backward pass.
            self.on_error(error)


class _Guarded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, branch: _Branch) -> Tensor:
        ctx.branch = branch
        assert branch.output is not None
        return branch.output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.branch.run(gradient)
        return None, None


class _Anchored(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, _anchor: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        return outputs[0].detach()

    @staticmethod
    def backward(_ctx: Any, _gradient: Tensor) -> tuple[None, None]:
        return None, None


def anchored(output: Tensor) -> Tensor:
    """Return a tensor that a backward pass may start from or go through, and that gives nobody a gradient."""
    return cast("Tensor", _Anchored.apply(_ANCHOR, [output]))  # type: ignore[no-untyped-call]


def guard(
    s: Tensor,
    parameters: Sequence[Tensor],
    on_error: Callable[[Exception], None],
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Return the output of a seed whose backward pass reaches these parameters and nothing else, and never raises.

    An error there goes to `on_error`, and the user's backward pass goes on without the seed. It runs within `around`.
    For a seed whose input is detached: no gradient goes back to the input.
    """
    if not s.requires_grad:
        return s
    return cast("Tensor", _Guarded.apply(_ANCHOR, _Branch(s, parameters, on_error, around)))  # type: ignore[no-untyped-call]


def leaves(s: Tensor) -> Iterator[Tensor]:
    """Yield the leaves that the backward pass of an output would write to."""
    seen, waiting = set(), [s.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            yield variable
        waiting += [following for following, _ in node.next_functions]
