"""What holds for each mode, whatever host and seed put out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_rpc.blending import BLEND_MODES
from esper_servers.kasmina.blending import mixing as blending
from esper_servers.kasmina.blending.alpha import band_after, gradient_clip
from esper_servers.kasmina.blending.config import BlendConfig
from esper_servers.kasmina.blending.finite import finite_mask
from esper_servers.kasmina.blending.mixing import Blend, mixing_of

BATCH, CHANNELS = 3, 6
LAYOUTS = {
    "image": ((BATCH, CHANNELS, 2, 2), 1),
    "sequence": ((BATCH, 4, CHANNELS), -1),
    "rows": ((BATCH, CHANNELS), -1),
}
VECTOR = (0.0, 0.25, 1.0)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

untimed = settings(deadline=None, max_examples=30)
modes = pytest.mark.parametrize("mode", BLEND_MODES)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
alphas = st.floats(0, 1, width=32)
seeds = st.integers(0, 2**31)
scales = st.sampled_from([1e-3, 1.0, 30.0])


def blend_of(mode, layout, *, alpha=0.5, is_classifier=False, **config):
    shape, dim = LAYOUTS[layout]
    blend = Blend()
    blend.mixing = mixing_of(
        BlendConfig(mode=mode, alpha_vec=VECTOR, **config), channels=CHANNELS, dim=dim, dims=len(shape),
        is_classifier=is_classifier,
    )  # fmt: skip
    blend.alpha.fill_(alpha)
    return blend


def maps(layout, seed, scale=1.0, dtype=torch.float32):
    drawn = torch.randn(2, *LAYOUTS[layout][0], generator=torch.Generator().manual_seed(seed)) * scale
    return drawn[0].to(dtype).requires_grad_(), drawn[1].to(dtype).requires_grad_()


def mixed(blend, h, s):
    return blend(h, s, finite_mask(s.detach()))


@modes
@layouts
@untimed
@given(seeds, scales)
def test_at_alpha_zero_it_is_the_host_bit_for_bit(mode, layout, seed, scale):
    h, s = maps(layout, seed, scale)
    assert torch.equal(mixed(blend_of(mode, layout, alpha=0.0), h, s), h)


@layouts
@untimed
@given(seeds, scales)
def test_at_full_alpha_convex_is_the_seed(layout, seed, scale):
    h, s = maps(layout, seed, scale)
    assert torch.equal(mixed(blend_of("CONVEX", layout, alpha=1.0), h, s), s)


@modes
@layouts
@untimed
@given(seeds, scales, st.sampled_from(DTYPES))
def test_at_full_alpha_it_is_what_a_fossil_gives(mode, layout, seed, scale, dtype):
    h, s = maps(layout, seed, scale, dtype)
    blend = blend_of(mode, layout, alpha=1.0)
    assert torch.equal(mixed(blend, h, s), blend.mixing(h, s))


@modes
@layouts
@untimed
@given(alphas, seeds, scales)
def test_it_is_the_rule_of_the_requirements(mode, layout, alpha, seed, scale):
    h, s = (each.detach().double() for each in maps(layout, seed, scale))
    dim = LAYOUTS[layout][1]
    blend = blend_of(mode, layout, alpha=alpha)
    by_channel = torch.tensor(VECTOR, dtype=torch.float64).repeat_interleave(2)
    signal = h.norm(dim=dim, keepdim=True) / (h.norm(dim=dim, keepdim=True) + (s - h).norm(dim=dim, keepdim=True))
    expected = {
        "CONVEX": alpha * s + (1 - alpha) * h,
        "RESIDUAL": h + alpha * s,
        "CHANNEL": h + alpha * (by_channel if dim == -1 else by_channel[:, None, None]) * (s - h),
        "CONFIDENCE": h + alpha * torch.sigmoid(6.0 * (signal - 0.2)) * (s - h),
    }[mode]
    torch.testing.assert_close(mixed(blend, h, s), expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("mode", ["CONVEX", "CHANNEL", "CONFIDENCE"])
@layouts
@untimed
@given(alphas, seeds, scales)
def test_between_host_and_seed_it_leaves_neither_side(mode, layout, alpha, seed, scale):
    h, s = maps(layout, seed, scale)
    out, slack = mixed(blend_of(mode, layout, alpha=alpha), h, s), 1e-6 * scale * 10
    assert bool((out >= torch.minimum(h, s) - slack).all())
    assert bool((out <= torch.maximum(h, s) + slack).all())


@layouts
@untimed
@given(alphas, seeds, scales)
def test_residual_moves_the_host_by_no_more_than_the_seed(layout, alpha, seed, scale):
    h, s = maps(layout, seed, scale)
    moved = (mixed(blend_of("RESIDUAL", layout, alpha=alpha), h, s) - h).abs()
    assert bool((moved <= s.abs() + 1e-5 * scale).all())


@layouts
@pytest.mark.parametrize("is_classifier", [True, False], ids=["classifier", "map"])
@untimed
@given(seeds, scales, st.tuples(alphas, alphas).map(sorted), st.sampled_from(DTYPES))
def test_the_gate_stays_between_its_bounds(layout, is_classifier, seed, scale, bounds, dtype):
    blend = blend_of("CONFIDENCE", layout, is_classifier=is_classifier, alpha_lo=bounds[0], alpha_hi=bounds[1])
    share = blend.mixing.share(*maps(layout, seed, scale, dtype))
    assert bool(((share >= bounds[0]) & (share <= bounds[1])).all())
    assert not share.requires_grad


@modes
@layouts
@untimed
@given(alphas, seeds)
def test_no_gradient_reaches_the_host_and_the_seed_gets_one(mode, layout, alpha, seed):
    h, s = maps(layout, seed)
    mixed(blend_of(mode, layout, alpha=alpha), h, s).square().sum().backward()
    assert h.grad is None
    assert torch.isfinite(s.grad).all()


@modes
@layouts
@pytest.mark.parametrize("is_masked", [True, False], ids=["masked", "finite"])
def test_the_gradient_of_the_seed_is_the_slope_of_what_it_gives(mode, layout, is_masked):
    h, s = maps(layout, 5, dtype=torch.float64)
    # Bounds that meet hold the gate: of a gate that moves the gradient does not tell, and should not.
    blend = blend_of(mode, layout, alpha=0.4, alpha_lo=0.6, alpha_hi=0.6)
    mask = torch.rand(s.shape, generator=torch.Generator().manual_seed(6)) < 0.7 if is_masked else None
    assert torch.autograd.gradcheck(lambda seed: blend(h, seed, mask), (s,))


@pytest.mark.parametrize("layout", ["image", "sequence"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_that_is_computed_by_parts_is_the_one_of_the_whole(layout, dtype, monkeypatch):
    monkeypatch.setattr(blending, "_PART", 40)
    h, s = maps(layout, 9, dtype=dtype)
    blend = blend_of("CONFIDENCE", layout, alpha=1.0)
    assert len(list(blending._parts(h, s))) > 1
    assert torch.equal(mixed(blend, h, s), blend.mixing(h, s))


@layouts
@pytest.mark.parametrize("is_classifier", [True, False], ids=["classifier", "map"])
def test_the_gradient_of_the_seed_is_its_share_of_what_comes_back(layout, is_classifier):
    h, s = maps(layout, 7)
    blend = blend_of("CONFIDENCE", layout, alpha=0.4, is_classifier=is_classifier)
    back = torch.randn(s.shape, generator=torch.Generator().manual_seed(8))
    mixed(blend, h, s).backward(back)
    torch.testing.assert_close(s.grad, back * 0.4 * blend.mixing.share(h, s))


@modes
@layouts
@untimed
@given(alphas, seeds, st.sampled_from(["nan", "inf", "-inf"]), st.floats(0, 1), st.sampled_from(DTYPES))
def test_where_the_seed_is_not_finite_the_host_stands_alone_and_no_gradient_is_lost(
    mode, layout, alpha, seed, value, share, dtype
):
    h, s = maps(layout, seed, dtype=dtype)
    broken = torch.rand(s.shape, generator=torch.Generator().manual_seed(seed)) < share
    with torch.no_grad():
        s[broken] = float(value)
    out = mixed(blend_of(mode, layout, alpha=alpha), h, s)
    out.float().sum().backward()
    assert torch.equal(out[broken], h[broken])
    assert torch.isfinite(out).all()
    assert torch.isfinite(s.grad).all()
    assert not s.grad[broken].any()


@modes
@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_type_of_the_host_is_kept(mode, layout, dtype):
    h, s = maps(layout, 1, dtype=dtype)
    assert mixed(blend_of(mode, layout), h, s).dtype == dtype


def test_a_gate_opens_for_a_seed_that_is_sure_and_not_for_one_that_guesses():
    sure, guessing = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.1, 0.0, 0.0]])
    gate = blend_of("CONFIDENCE", "rows", is_classifier=True).mixing
    assert gate.share(sure, sure) > 0.98
    assert gate.share(sure, guessing) < 0.3


def test_a_gate_opens_for_a_seed_that_changes_little_and_not_for_one_that_tears_the_map_apart():
    h = torch.ones(1, CHANNELS)
    gate = blend_of("CONFIDENCE", "rows").mixing
    assert gate.share(h, 1.01 * h) > 0.98
    assert gate.share(h, -50 * h) < 0.3


def test_a_position_does_not_hear_of_later_ones_through_the_gate():
    h, s = (each.detach() for each in maps("sequence", 3))
    changed = s.clone()
    changed[:, -1] += 5.0
    blend = blend_of("CONFIDENCE", "sequence")
    assert torch.equal(mixed(blend, h, s)[:, :-1], mixed(blend, h, changed)[:, :-1])


@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=["vanishing", "huge"])
@pytest.mark.parametrize("is_classifier", [True, False], ids=["classifier", "map"])
def test_maps_at_the_ends_of_what_a_float_holds_give_a_gate(scale, is_classifier):
    h, s = (each.detach() * scale for each in maps("rows", 4))
    share = blend_of("CONFIDENCE", "rows", is_classifier=is_classifier).mixing.share(h, s)
    assert bool(((share >= 0) & (share <= 1)).all())


def test_a_map_of_zeros_that_stays_one_opens_the_gate():
    zero = torch.zeros(1, CHANNELS)
    assert blend_of("CONFIDENCE", "rows").mixing.share(zero, zero) > 0.98


def test_a_cast_of_the_model_does_not_round_alpha():
    blend = blend_of("CHANNEL", "rows", alpha=0.35).bfloat16()
    assert blend.alpha == torch.tensor(0.35)
    assert blend.mixing.shares.dtype == torch.float32


@untimed
@given(st.lists(st.floats(0, 1), max_size=40))
def test_a_band_is_left_only_two_hundredths_behind_its_threshold(values):
    band = 0
    for alpha in values:
        before, band = band, band_after(band, alpha)
        if band > before:
            assert alpha > (0.3, 0.7)[band - 1] + 0.02
        if band < before:
            assert alpha <= (0.3, 0.7)[band] - 0.02
    assert band in (0, 1, 2)


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_around_a_threshold_the_band_of_before_stays(threshold):
    below, above = band_after(0, threshold - 0.1), band_after(2, threshold + 0.1)
    near = (threshold - 0.019, threshold, threshold + 0.019)
    assert [band_after(below, alpha) for alpha in near] == [below] * 3
    assert [band_after(above, alpha) for alpha in near] == [above] * 3
    assert above == below + 1


@pytest.mark.parametrize(("alpha", "clip"), [(0.0, 0.1 / 26), (0.4, 0.05), (0.5, 0.1), (1.0, 0.1 / 26)])
def test_the_clip_is_widest_half_way(alpha, clip):
    assert gradient_clip(alpha) == pytest.approx(clip)
