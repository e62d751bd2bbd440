from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_rpc.errors import ConfigError, InvalidRequest
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_servers.tolaria.aggregation.weights import SeedLoss, grafting_alpha, total_loss, weight_of

LAW = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
TABLE = {
    "UNSPECIFIED": 0.0, "DORMANT": 0.0, "GERMINATED": 0.01, "TRAINING": 0.1, "BLENDING": 0.3, "SHADOWING": 0.5, "PROBATIONARY": 0.0,
    "FOSSILIZED": 0.0, "CULLED": 0.0, "EMBARGOED": 0.0, "RESETTING": 0.0, "TERMINATED": 0.0,
}  # fmt: skip


def stage(name):
    return Stage.Value(f"SEED_LIFECYCLE_STAGE_{name}")


def test_every_stage_has_the_weight_of_the_table():
    found = {name: weight_of(number, alpha=0.3) for name, number in Stage.items()}
    assert {name.removeprefix("SEED_LIFECYCLE_STAGE_"): weight for name, weight in found.items()} == TABLE


@pytest.mark.parametrize("name", ["SHADOWING", "PROBATIONARY"])
def test_a_seed_that_fine_tunes_counts_in_full(name):
    assert weight_of(stage(name), is_fine_tuning=True) == 1.0


@pytest.mark.parametrize(("alpha", "weight"), [(-1.0, 0.0), (2.0, 1.0), (math.nan, 0.0), (math.inf, 1.0)])
def test_an_alpha_that_is_none_does_no_harm(alpha, weight):
    assert weight_of(stage("BLENDING"), alpha=alpha) == weight


@LAW
@given(epoch=st.integers(0, 1000), total=st.integers(1, 1000), temperature=st.floats(0.1, 100.0))
def test_a_grafting_alpha_is_the_logistic_of_the_design(epoch, total, temperature):
    x = (epoch / total - 0.5) * temperature * 2 * math.pi
    expected = 1 / (1 + math.exp(-x)) if x > -700 else 0.0
    assert grafting_alpha(epoch, total, temperature) == pytest.approx(expected, abs=1e-12)
    assert grafting_alpha(epoch, total, temperature) <= grafting_alpha(epoch + 1, total, temperature)


@pytest.mark.parametrize("total", [0, -3])
def test_without_a_number_of_epochs_it_is_a_half(total):
    assert grafting_alpha(7, total) == 0.5


def test_the_temperature_is_two_and_half_way_is_a_half():
    assert grafting_alpha(5, 10) == 0.5
    assert grafting_alpha(10, 10) == pytest.approx(1 / (1 + math.exp(-2 * math.pi)))


def test_the_total_loss_counts_seeds_by_weight_and_samples():
    host = torch.tensor(2.0, requires_grad=True)
    first = SeedLoss(loss=torch.tensor(10.0), stage=stage("TRAINING"), samples=8)
    second = SeedLoss(loss=torch.tensor(1.0), stage=stage("BLENDING"), samples=32, alpha=0.25)
    idle = SeedLoss(loss=torch.tensor(math.nan), stage=stage("FOSSILIZED"), samples=32)
    total = total_loss(host, [first, second, idle], host_samples=16)
    assert float(total.detach()) == pytest.approx(2.0 + 10 * 0.1 * 8 / 16 + 0.25 * 32 / 16)
    assert total_loss(host, [], host_samples=16) is not None


def test_no_samples_are_refused():
    with pytest.raises(ConfigError, match="samples"):
        SeedLoss(loss=torch.tensor(1.0), stage=stage("TRAINING"), samples=0)
    seed = SeedLoss(loss=torch.tensor(1.0), stage=stage("TRAINING"), samples=1)
    with pytest.raises(InvalidRequest, match="one sample"):
        seed.share(0)
