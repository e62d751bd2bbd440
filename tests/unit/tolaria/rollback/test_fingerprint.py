from __future__ import annotations

import pytest
import torch

from esper_servers.tolaria.rollback.fingerprint import SAMPLE, fingerprint


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 5, generator=generator), torch.randn(3 * SAMPLE, generator=generator), torch.tensor(2.5)]


def test_the_same_bits_have_the_same_fingerprint(tensors):
    assert fingerprint(tensors) == fingerprint([tensor.clone() for tensor in tensors])
    across = torch.randn(4, 6)
    assert fingerprint([across.t()]) == fingerprint([across.t().contiguous()])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_step_of_training_has_another(tensors, place):
    before = fingerprint(tensors)
    tensors[place].add_(1e-3)
    assert fingerprint(tensors) != before


def test_shapes_and_kinds_count_and_any_kind_has_one(tensors):
    kinds = [torch.zeros(8), torch.zeros(2, 4), torch.zeros(8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bool),
             torch.zeros(0), torch.zeros(8, dtype=torch.complex64)]  # fmt: skip
    assert len({fingerprint([each]) for each in kinds}) == len(kinds)
    assert fingerprint(tensors) != fingerprint(tensors[::-1])
