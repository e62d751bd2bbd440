from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from esper_client.seed_host import OutOfStep
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.learning_rate import RankAuthority
from esper_servers.kasmina.seed_slot import SeedSlot

from .ranks import Ranks, Summing, together

FAILED_ELSEWHERE = "failed on another rank"
BEAT_SECONDS = 1.0
"""How often a rank that stands still tells the others, who would give it up in time."""


class Lockstep:
    """What all ranks do at once at the start of a step, whether they have the module of a seed or not."""

    def __init__(
        self,
        ranks: Ranks,
        seeds: Mapping[str, SeedSlot],
        learning_rate: RankAuthority,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._beat: Summing | None = None
        self._beats_at = 0.0
        self._ranks = ranks
        self._seeds = seeds
        self._learning_rate = learning_rate
        self.layout: dict[str, list[int]] = {}
        """The sizes of the parameters of each seed, as the first rank has them."""

    def meet(self, loss: float) -> float:
        """Agree on which seeds have failed, average their gradients, and return the mean loss.

        Raises:
            OutOfStep: When a rank is gone, or holds other seeds or learning rates.
        """
        with together():
            failed = [self._has_failed(slot) for slot in self._seeds.values()]
            own = float(zlib.crc32(repr((self.layout, self._learning_rate.rates)).encode()))
            count, observed = self._learning_rate.take_observed()
            told = [loss, own, float(count), observed, *map(float, failed)]
            loss_sum, layouts, counts, observed, *failures = self._total(told)
            if layouts != own * self._ranks.size:
                raise OutOfStep(
                    "The ranks hold different seeds or learning rates; a checkpoint must be restored, and a controller"
                    " of learning rates made alike, on every rank."
                )
            if counts:
                self._learning_rate.settle(observed / counts)
            for slot, here, anywhere in zip(self._seeds.values(), failed, failures, strict=True):
                if anywhere and not here:
                    slot.site.failure = FAILED_ELSEWHERE
            self._average()
            return loss_sum / self._ranks.size

    def stand(self) -> None:
        """Keep the others waiting while this rank stands still amid a step; to be called again and again meanwhile.

        Returns at once. Raises OutOfStep when another rank is gone.
        """
        if self._beat is not None:
            if self._beat.is_done:
                self._end_beat()
        elif self.must_beat():
            self._beat = self._ranks.begin_total([1.0, *[0.0] * (4 + len(self._seeds))])

    def must_beat(self) -> bool:
        """Whether it is time to tell the others again; they count as told then."""
        if self._clock() < self._beats_at:
            return False
        self._beats_at = self._clock() + BEAT_SECONDS
        return True

    def _total(self, told: list[float]) -> list[float]:
        """Add up what the ranks tell, when none of them stands still any more."""
        self._end_beat()
        are_standing = 1.0
        while are_standing:
            are_standing, *sums = self._ranks.total([0.0, *told])
        return sums

    def _end_beat(self) -> None:
        beat, self._beat = self._beat, None
        if beat is not None:
            beat.wait()

    def measure(self) -> None:
        """Take the layout from the seeds as they are here."""
        self.layout = {seed_id: sizes_of(slot) for seed_id, slot in self._seeds.items() if slot.site.seed is not None}

    def _has_failed(self, slot: SeedSlot) -> bool:
        is_missing = slot.seed_id in self.layout and slot.site.seed is None
        return is_missing or (slot.stage in lifecycle.LIVE and slot.has_failed())

    def _average(self) -> None:
        if not self.layout:
            return
        slots = [self._seeds[seed_id] for seed_id in self.layout]
        parts = [part for slot in slots for part in self._parts(slot)]
        # Whatever their own precision, they are added up in at least single.
        wide = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        device = slots[0].site.device
        mean = self._ranks.average(torch.cat([part.to(device=device, dtype=wide) for part in parts]))
        self._spread(slots, list(torch.split(mean, [size + 1 for slot in slots for size in self.layout[slot.seed_id]])))

    def _parts(self, slot: SeedSlot) -> list[Tensor]:
        """For each parameter whether there is a gradient here, and the gradient."""
        sizes, parameters = self.layout[slot.seed_id], parameters_of(slot)
        device = slot.site.device
        gradients = [parameter.grad for parameter in parameters] if parameters else [None] * len(sizes)
        return [
            torch.zeros(size + 1, device=device)
            if gradient is None
            else torch.cat([gradient.new_ones(1), gradient.reshape(-1)])
            for size, gradient in zip(sizes, gradients, strict=True)
        ]

    def _spread(self, slots: Collection[SeedSlot], means: list[Tensor]) -> None:
        for slot in slots:
            taken = [means.pop(0) for _ in self.layout[slot.seed_id]]
            for parameter, mean in zip(parameters_of(slot), taken, strict=False):
                # Where no rank has a gradient there is none, as without ranks.
                parameter.grad = mean[1:].to(parameter).reshape(parameter.shape) if mean[0] > 0 else None


def parameters_of(slot: SeedSlot) -> list[nn.Parameter]:
    """The parameters of a seed that learn, none without a seed."""
    return [p for p in slot.site.seed.parameters() if p.requires_grad] if slot.site.seed is not None else []


def trained_tensors(seeds: Iterable[SeedSlot]) -> Iterator[Tensor]:
    """All of these seeds that must be the same on every rank: what learns, what remembers of it, stages and alphas."""
    for slot in seeds:
        yield torch.tensor([slot.stage, slot.site.alpha], dtype=torch.float64)
        yield from parameters_of(slot)
        for remembered in slot.optimizer.state.values() if slot.optimizer is not None else ():
            yield from (each for each in remembered.values() if isinstance(each, Tensor))


def sizes_of(slot: SeedSlot) -> list[int]:
    """How many numbers each of them holds."""
    return [math.prod(parameter.shape) for parameter in parameters_of(slot)]
