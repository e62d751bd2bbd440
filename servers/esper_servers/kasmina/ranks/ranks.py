from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from esper_client.seed_host import OutOfStep

FIRST = 0


class Ranks:
    """The processes that train one model together. Every rank makes it, and every call, in the same order.

    Numbers and bytes go over a gloo group of their own, gradients on a device over the group of the user. A rank that
    is gone raises OutOfStep as soon as torch tells it.
    """

    def __init__(self) -> None:
        with together():
            self._control = dist.new_group(backend="gloo", timeout=_patience_of_user())
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self.is_first = self.rank == FIRST

    def total(self, values: Sequence[float]) -> list[float]:
        """Add up the values of all ranks, each place by itself."""
        sums = torch.tensor(values, dtype=torch.float64)
        with together():
            dist.all_reduce(sums, group=self._control)
        added: list[float] = sums.tolist()
        return added

    def begin_total(self, values: Sequence[float]) -> Summing:
        """Begin to add up the values of all ranks, and return at once."""
        sums = torch.tensor(values, dtype=torch.float64)
        with together():
            return Summing(dist.all_reduce(sums, group=self._control, async_op=True))

    def each(self, value: float) -> list[float]:
        """Return the values of all ranks, in their order."""
        return self.total([value if rank == self.rank else 0.0 for rank in range(self.size)])

    def collect(self, content: bytes) -> list[bytes]:
        """Return what all ranks give, in their order."""
        lengths = [int(length) for length in self.each(len(content))]
        if not any(lengths):
            return [b""] * self.size
        raw = torch.zeros(max(lengths), dtype=torch.uint8)
        raw[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else raw[:0]
        found = [torch.empty_like(raw) for _ in range(self.size)]
        with together():
            dist.all_gather(found, raw, group=self._control)
        return [each[:length].numpy().tobytes() for each, length in zip(found, lengths, strict=True)]

    def share(self, content: bytes = b"") -> bytes:
        """Return what the first rank gives; what the others give is ignored."""
        length = torch.tensor([len(content)] if self.is_first else [0])
        with together():
            dist.broadcast(length, src=FIRST, group=self._control)
            if not length.item():
                return b""
            raw = bytearray(content if self.is_first else int(length))
            dist.broadcast(torch.frombuffer(raw, dtype=torch.uint8), src=FIRST, group=self._control)
        return bytes(raw)

    def hand_out(self, tensor: Tensor) -> None:
        """Fill a tensor in the memory of this machine with what the first rank has in its place."""
        with together():
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=FIRST, group=self._control)

    def average(self, flat: Tensor) -> Tensor:
        """Return the mean of a tensor over all ranks: the same bits on each."""
        with together():
            dist.all_reduce(flat, group=None if flat.is_cuda else self._control)
        return flat / self.size


class Summing:
    """A total that other ranks have yet to give their part of."""

    def __init__(self, work: Any) -> None:
        self._work = work

    @property
    def is_done(self) -> bool:
        """Whether they have, or one of them is gone."""
        return bool(self._work.is_completed())

    def wait(self) -> None:
        """Wait until they have; raises OutOfStep."""
        with together():
            self._work.wait()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Have whatever fails in a block leave it as OutOfStep: a rank that skipped a part would hang the others."""
    try:
        yield
    except OutOfStep:
        raise
    except Exception as error:
        raise OutOfStep(f"The ranks of this training have come apart: {error}") from error


def _patience_of_user() -> timedelta | None:
    """How long the group of the user waits for a rank that hangs; torch shows it nowhere else."""
    for device in ("cpu", "cuda"):
        with contextlib.suppress(Exception):
            backend = dist.group.WORLD._get_backend(torch.device(device))  # type: ignore[union-attr]
            patience: timedelta = backend.options._timeout
            return patience
    return None
