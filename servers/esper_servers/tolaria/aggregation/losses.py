"""From losses to the gradients of a step, by one backward pass for each loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from esper_rpc.errors import InvalidRequest

from .aggregator import Aggregated, GradientAggregator, SeedGradients
from .weights import SeedLoss


def backward(
    aggregator: GradientAggregator,
    host_loss: Tensor,
    seeds: Mapping[str, SeedLoss],
    parameters: Sequence[Tensor],
    *,
    host_samples: int,
) -> Aggregated:
    """Set the gradients of the model's parameters, and of seeds, to what their losses give together.

    It takes the place of `loss.backward()`, and replaces gradients that are there. Seeds whose weight is 0 cost
    nothing. Not for use under DDP, which sums gradients in hooks that this passes by.

    Raises:
        InvalidRequest: When a loss depends on nothing that learns.
    """
    counted = {name: seed for name, seed in sorted(seeds.items()) if seed.share(host_samples)}
    for name, loss in {
        "of the model": host_loss,
        **{f"of {name}": seed.loss for name, seed in counted.items()},
    }.items():
        if not loss.requires_grad:
            raise InvalidRequest(f"The loss {name} depends on nothing that learns.")
    everything = [*parameters, *dict.fromkeys(p for seed in seeds.values() for p in seed.parameters)]
    losses = [host_loss, *(seed.loss for seed in counted.values())]
    host, *rest = [_gradients(loss, everything, is_last=index == len(losses) - 1) for index, loss in enumerate(losses)]
    given = {
        name: SeedGradients(found, seed.share(host_samples))
        for (name, seed), found in zip(counted.items(), rest, strict=True)
    }
    aggregated = aggregator.combine(host, given, shared=len(parameters))
    for parameter, gradient in zip(everything, aggregated.gradients, strict=True):
        parameter.grad = gradient
    return aggregated


def _gradients(loss: Tensor, parameters: Sequence[Tensor], *, is_last: bool) -> list[Tensor | None]:
    found = torch.autograd.grad(loss, parameters, retain_graph=not is_last, allow_unused=True)
    seen: set[int] = set()
    return [each if each is None else _own(each, seen) for each in found]


def _own(gradient: Tensor, seen: set[int]) -> Tensor:
    """Two parameters may be given one gradient, or one number for all its places; neither could be changed alone."""
    place = gradient.untyped_storage().data_ptr()
    if place in seen or 0 in gradient.stride():
        return gradient.clone(memory_format=torch.contiguous_format)
    seen.add(place)
    return gradient


def by_tag(sample_losses: Tensor, tags: Sequence[str | None]) -> dict[str | None, tuple[Tensor, int]]:
    """Split the losses of the samples of a batch by the seed that each sample is for; None is for the model.

    Returns the mean and the number of samples of each.

    Raises:
        InvalidRequest: When there is not one tag for each loss.
    """
    if sample_losses.dim() != 1 or len(tags) != len(sample_losses):
        raise InvalidRequest(f"There are {len(tags)} tags for losses of the shape {tuple(sample_losses.shape)}.")
    found = {}
    for tag in dict.fromkeys(tags):
        places = [index for index, each in enumerate(tags) if each == tag]
        found[tag] = (sample_losses[places].mean(), len(places))
    return found
