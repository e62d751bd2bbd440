from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_rpc.errors import ConfigError, InvalidRequest
from esper_rpc.telemetry.metrics import GRADIENT_CONFLICTS, GRADIENTS_DROPPED
from esper_servers.tolaria.aggregation import conflicts
from esper_servers.tolaria.aggregation.aggregator import AggregationConfig, GradientAggregator, SeedGradients

LAW = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
SHAPES = [(3, 2), (4,), ()]
UNLIMITED = 1e12


def gradients_of(seed, *, scale=1.0, missing=(), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    found = [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape in SHAPES]
    return [None if index in missing else each for index, each in enumerate(found)]


MISSING = st.sets(st.integers(0, 2), max_size=2)
SCALES = st.sampled_from([1e-6, 1e-3, 1.0, 50.0])
GRADIENTS = st.builds(gradients_of, st.integers(0, 999), scale=SCALES, missing=MISSING)
# Half of the seeds nearly oppose the model, which random directions hardly ever do.
OPPOSED = st.booleans()


def copies(gradients):
    return [None if each is None else each.clone() for each in gradients]


def against(host, seed):
    return [None if s is None else (s * 0.3 - 2 * h if h is not None else s) for h, s in zip(host, seed, strict=True)]


def dot(one, other):
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return sum(float((a.double() * b.double()).sum()) for a, b in pairs)


def norm(gradients):
    return math.sqrt(sum(float(each.double().square().sum()) for each in gradients if each is not None))


def same(one, other):
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


@LAW
@given(host=GRADIENTS, seed=GRADIENTS, is_opposed=OPPOSED)
def test_after_the_projection_a_seed_does_not_pull_against_the_model(host, seed, is_opposed):
    seed = against(host, seed) if is_opposed else seed
    before = copies(seed)
    [angle], _ = conflicts.angles([seed], host, shared=3)
    if angle.cosine >= -0.5:
        return
    assert conflicts.settle(conflicts.PCGRAD, seed, host, angle, shared=3)
    mine, theirs = conflicts.common(before, host)
    # What the 1e-8 of the denominator leaves where the model hardly has a gradient, and rounding.
    left = 1e-8 / (norm(theirs) ** 2 + 1e-8) + 1e-5
    assert dot(seed, host) >= -left * norm(mine) * norm(theirs)
    # The projection changes nothing across the gradient of the model, nor where only the seed has one.
    assert all(torch.equal(s, b) for s, b, h in zip(seed, before, host, strict=True) if s is not None and h is None)


@LAW
@given(host=GRADIENTS, seed=GRADIENTS, share=st.sampled_from([0.1, 1.0, 3.0]))
def test_without_a_conflict_gradients_are_added_as_they_are(host, seed, share):
    plain = copies(host)
    for index, each in enumerate(seed):
        if each is not None:
            plain[index] = each * share if plain[index] is None else plain[index].add(each, alpha=share)
    [angle], _ = conflicts.angles([seed], host, shared=3)
    kept = copies(seed)
    aggregator = GradientAggregator(AggregationConfig(max_norm=UNLIMITED))
    found = aggregator.combine(copies(host), {"a": SeedGradients(kept, share)})
    assert bool(found.conflicts) == (angle.cosine < -0.5)
    if not found.conflicts:
        assert same(found.gradients, plain)


@LAW
@given(
    host=GRADIENTS, seeds=st.lists(st.tuples(GRADIENTS, OPPOSED, st.sampled_from([0.0, 0.1, 1.0])), max_size=4),
    data=st.data(),
)  # fmt: skip
def test_the_norm_has_a_limit_and_the_order_does_not_matter(host, seeds, data):
    given_to = {
        f"seed-{index}": SeedGradients(against(host, seed) if is_opposed else seed, share)
        for index, (seed, is_opposed, share) in enumerate(seeds)
    }
    order = data.draw(st.permutations(list(given_to)))
    results = []
    for names in (list(given_to), order):
        fresh = {name: SeedGradients(copies(given_to[name].gradients), given_to[name].share) for name in names}
        results.append(GradientAggregator().combine(copies(host), fresh))
    assert same(results[0].gradients, results[1].gradients)
    assert results[0][1:] == results[1][1:]
    assert norm(results[0].gradients) <= 10.0 * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_opposed_gradients_of_every_precision_are_projected(dtype):
    host = gradients_of(1, dtype=dtype)
    seed = [(-each * 2).clone() for each in host]
    seed[1] = seed[1] + torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=dtype)
    found = GradientAggregator().combine(copies(host), {"a": SeedGradients(seed, 1.0)})
    assert found.conflicts == ("a",)
    assert all(each.dtype == dtype for each in found.gradients)
    left = dot([f - h for f, h in zip(found.gradients, host, strict=True)], host)
    assert left >= -0.05 * norm(host) ** 2


def test_a_projection_takes_away_what_is_opposed_and_nothing_else():
    host, seed = [torch.tensor([1.0, 0.0])], [torch.tensor([-3.0, 1.0])]
    found = GradientAggregator().combine(host, {"a": SeedGradients(seed, 0.5)})
    torch.testing.assert_close(found.gradients[0], torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize(
    ("way", "expected"),
    [("pcgrad", [1.0, 1.0]), ("average", [0.0, 0.5]), ("priority", [1.0, 0.0]), ("keep", [-2.0, 1.0])],
)
def test_a_conflict_is_settled_as_it_is_configured(way, expected):
    host, seed = [torch.tensor([1.0, 0.0])], [torch.tensor([-3.0, 1.0])]
    found = GradientAggregator(AggregationConfig(conflict=way)).combine(host, {"a": SeedGradients(seed, 1.0)})
    torch.testing.assert_close(found.gradients[0], torch.tensor(expected))
    assert found.conflicts == ("a",)


def test_a_gradient_across_is_no_conflict_and_the_threshold_is_a_half():
    slightly = [torch.tensor([-0.4, 1.0])]
    found = GradientAggregator().combine([torch.tensor([1.0, 0.0])], {"a": SeedGradients(slightly, 1.0)})
    assert found.conflicts == ()
    torch.testing.assert_close(found.gradients[0], torch.tensor([0.6, 1.0]))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_seed_whose_gradient_is_no_number_is_left_out_alone_counted_and_told_once(broken, told):
    aggregator = GradientAggregator()
    before = GRADIENTS_DROPPED.labels("seed")._value.get()
    for _ in range(2):
        bad = [torch.ones(2), torch.tensor(broken)]
        seeds = {"bad": SeedGradients(bad, 1.0), "good": SeedGradients([torch.ones(2), None], 0.5)}
        found = aggregator.combine([torch.ones(2), torch.tensor(1.0)], seeds)
        assert found.dropped == ("bad",)
        torch.testing.assert_close(found.gradients[0], torch.full((2,), 1.5))
        assert float(found.gradients[1]) == 1.0
    assert [(name, details["whose"]) for name, details in told()] == [("gradient_dropped", "bad")]
    assert GRADIENTS_DROPPED.labels("seed")._value.get() == before + 2
    aggregator.combine([torch.ones(2)], {"bad": SeedGradients([torch.ones(2)], 1.0)})
    aggregator.combine([torch.ones(2)], {"bad": SeedGradients([torch.full((2,), broken)], 1.0)})
    assert len(told()) == 2


def test_a_gradient_of_the_model_that_is_no_number_comes_back_as_it_is():
    host = [torch.tensor([math.inf, 1.0]), None]
    found = GradientAggregator().combine(host, {"a": SeedGradients([torch.ones(2), torch.ones(2)], 1.0)})
    assert found.gradients[0] is host[0]
    assert found.gradients[1] is None
    assert math.isnan(found.norm)
    assert found.dropped == ()


@pytest.mark.parametrize("seeds", [{}, {"a": SeedGradients([torch.tensor([6e25, 8e25])], 0.5)}])
def test_a_gradient_whose_square_overflows_is_limited_too(seeds):
    found = GradientAggregator().combine([torch.tensor([3e25, 4e25])], seeds)
    assert found.dropped == ()
    torch.testing.assert_close(found.gradients[0], torch.tensor([6.0, 8.0]))


def test_a_short_gradient_keeps_its_bits_and_its_norm_is_told():
    host = gradients_of(3)
    found = GradientAggregator().combine(copies(host), {})
    assert same(found.gradients, host)
    assert found.norm == pytest.approx(norm(host))


@pytest.mark.parametrize(("sign", "opposed"), [(1.0, ()), (-1.0, ("a",))])
def test_only_what_is_shared_is_compared_projected_and_limited(sign, opposed):
    host = [torch.tensor([1.0, 0.0]), torch.tensor([-100.0])]
    seed = [torch.tensor([sign, 0.0]), torch.tensor([300.0])]
    found = GradientAggregator().combine(host, {"a": SeedGradients(seed, 1.0)}, shared=1)
    assert found.conflicts == opposed
    torch.testing.assert_close(found.gradients[0], torch.tensor([1.0 + max(0.0, sign), 0.0]))
    torch.testing.assert_close(found.gradients[1], torch.tensor([200.0]))


def test_the_rate_of_conflicts_is_over_the_last_hundred_steps():
    aggregator = GradientAggregator()
    assert aggregator.rate.metrics() == {}
    before = GRADIENT_CONFLICTS.labels("seed")._value.get()

    def step(sign):
        return aggregator.combine([torch.ones(2)], {"a": SeedGradients([torch.ones(2) * sign], 1.0)})

    for sign in (-1, 1, 1, 1):
        step(sign)
    assert aggregator.rate.metrics() == {"grad_conflict_rate": 0.25}
    assert GRADIENT_CONFLICTS.labels("seed")._value.get() == before + 1
    for _ in range(100):
        step(1)
    assert aggregator.rate.metrics() == {"grad_conflict_rate": 0.0}


@pytest.mark.parametrize(
    "seed", [[torch.ones(2)], [torch.ones(2), torch.ones(2).to_sparse()]], ids=["too short", "sparse"]
)
def test_what_cannot_be_compared_is_refused_and_nothing_is_changed(seed):
    host = [torch.ones(2), torch.ones(2)]
    with pytest.raises(InvalidRequest):
        GradientAggregator().combine(host, {"a": SeedGradients(seed, 1.0)})
    assert same(host, [torch.ones(2), torch.ones(2)])


def test_a_way_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="none of pcgrad, average, priority, keep"):
        AggregationConfig(conflict="fight")
