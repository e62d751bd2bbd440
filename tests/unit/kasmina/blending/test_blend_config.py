"""What a command says of blending is read strictly, and never stops the command."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_rpc.blending import BLEND_MODES
from esper_servers.kasmina.blending.config import BlendConfig, read_blend_config

CHANNELS = 12


def read(**annotations):
    return read_blend_config(annotations, CHANNELS)


def test_without_a_mode_it_is_convex_and_nothing_is_wrong():
    assert read(gate_k="nonsense", feature_coverage="0.4") == (BlendConfig(), "")
    assert BlendConfig().mode == "CONVEX"


@pytest.mark.parametrize("mode", BLEND_MODES)
@pytest.mark.parametrize("source", ["override", "heuristic"])
def test_every_mode_is_read_with_who_chose_it(mode, source):
    config, problem = read(blend_mode=mode, blend_mode_source=source, alpha_vec="[0.5]")
    assert (config.mode, config.source, problem) == (mode, source, "")


def test_the_gate_of_a_command_is_taken_as_it_is():
    config, _ = read(blend_mode="CONFIDENCE", gate_k="5", gate_tau="0.25", alpha_lo="0.1", alpha_hi="0.9")
    assert (config.gate_k, config.gate_tau, config.alpha_lo, config.alpha_hi) == (5.0, 0.25, 0.1, 0.9)


def test_swapped_bounds_are_ordered():
    config, problem = read(blend_mode="CONFIDENCE", alpha_lo="0.9", alpha_hi="0.1")
    assert (config.alpha_lo, config.alpha_hi, problem) == (0.1, 0.9, "")


def test_numbers_out_of_range_are_clamped():
    low, _ = read(blend_mode="CONFIDENCE", gate_k="1", gate_tau="-3", alpha_lo="-1", alpha_hi="7")
    high, _ = read(blend_mode="CONFIDENCE", gate_k="99", gate_tau="1.0")
    assert (low.gate_k, low.gate_tau, low.alpha_lo, low.alpha_hi) == (4.0, 0.1, 0.0, 1.0)
    assert (high.gate_k, high.gate_tau) == (8.0, 0.3)


@pytest.mark.parametrize(
    ("annotations", "named"),
    [
        ({"blend_mode": "DELTA"}, "DELTA"),
        ({"blend_mode": "convex"}, "convex"),
        ({"blend_mode": ""}, "blend_mode"),
        ({"blend_mode": "RESIDUAL", "blend_mode_source": "whim"}, "whim"),
        ({"blend_mode": "CONFIDENCE", "gate_k": "steep"}, "gate_k"),
        ({"blend_mode": "CONFIDENCE", "gate_tau": "nan"}, "gate_tau"),
        ({"blend_mode": "CONFIDENCE", "alpha_hi": "inf"}, "alpha_hi"),
        ({"blend_mode": "RESIDUAL", "alpha_lo": "low"}, "alpha_lo"),
        ({"blend_mode": "CHANNEL"}, "alpha_vec"),
        ({"blend_mode": "CHANNEL", "alpha_vec": "[]"}, "alpha_vec"),
        ({"blend_mode": "CHANNEL", "alpha_vec": "[0.1,0.2,0.3,0.4,0.5]"}, "12 channels"),
        ({"blend_mode": "CHANNEL", "alpha_vec": json.dumps([0.1] * 24)}, "12 channels"),
        ({"blend_mode": "CHANNEL", "alpha_vec": "[0.1, null]"}, "alpha_vec"),
        ({"blend_mode": "CHANNEL", "alpha_vec": '{"0": 0.1}'}, "alpha_vec"),
        ({"blend_mode": "CHANNEL", "alpha_vec": "[[0.1], [0.2]]"}, "alpha_vec"),
        ({"blend_mode": "CHANNEL", "alpha_vec": "0.1,,0.2"}, "alpha_vec"),
        ({"blend_mode": "CHANNEL", "alpha_vec": "nan"}, "alpha_vec"),
        ({"blend_mode": "CHANNEL", "alpha_vec": "0.1,0.2", "alpha_vec_len": "3"}, "alpha_vec_len"),
        ({"blend_mode": "CHANNEL", "alpha_vec": "0.1,0.2", "alpha_vec_len": "two"}, "alpha_vec_len"),
        ({"blend_mode": "CHANNEL", "alpha_vec": "[" * 100_000}, "alpha_vec"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_convex_and_says_why(annotations, named):
    config, problem = read(**annotations)
    assert config == BlendConfig(source=config.source)
    assert named in problem
    assert len(problem) < 200


def test_a_site_that_never_ran_has_no_channels_to_weigh():
    config, problem = read_blend_config({"blend_mode": "CHANNEL", "alpha_vec": "[0.5]"}, 0)
    assert config.mode == "CONVEX"
    assert problem


def test_who_chose_an_impossible_mode_is_kept():
    assert read(blend_mode="DELTA", blend_mode_source="override")[0].source == "override"


@pytest.mark.parametrize("text", ["[0.1, 0.2, 0.3]", "0.1,0.2,0.3", " 0.1, 0.2 ,0.3 "], ids=["json", "csv", "spaces"])
def test_a_vector_is_json_or_csv(text):
    config, problem = read(blend_mode="CHANNEL", alpha_vec=text, alpha_vec_len="3")
    assert (config.alpha_vec, problem) == ((0.1, 0.2, 0.3), "")


def test_a_vector_is_kept_by_the_mode_that_uses_it_only():
    assert read(blend_mode="CHANNEL", alpha_vec="0.5")[0].alpha_vec
    assert read(blend_mode="RESIDUAL", alpha_vec=json.dumps([0.5] * 10_000)) == (BlendConfig(mode="RESIDUAL"), "")


def test_a_single_number_is_a_vector_of_one():
    assert read(blend_mode="CHANNEL", alpha_vec="0.5")[0].alpha_vec == (0.5,)


def test_of_a_vector_at_most_a_fifth_passes_the_ceiling_and_the_greatest_keep_their_place():
    wanted = [0.9, 1.0, 0.85, 0.2, 0.95, 0.0, 0.1, 0.3, 0.8, 0.7, 0.6, 0.5]
    config, _ = read(blend_mode="CHANNEL", alpha_vec=json.dumps(wanted))
    assert config.alpha_vec == (0.8, 1.0, 0.8, 0.2, 0.95, 0.0, 0.1, 0.3, 0.8, 0.7, 0.6, 0.5)


@settings(deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 6, 12]).flatmap(lambda n: st.lists(st.floats(-1, 2), min_size=n, max_size=n)))
def test_whatever_is_asked_the_vector_is_bounded_and_only_ever_lowered(wanted):
    config, problem = read(blend_mode="CHANNEL", alpha_vec=json.dumps(wanted))
    assert problem == ""
    assert all(0.0 <= value <= 1.0 for value in config.alpha_vec)
    assert sum(value > 0.8 for value in config.alpha_vec) <= 0.2 * len(wanted)
    assert all(value <= max(0.0, asked) for value, asked in zip(config.alpha_vec, wanted, strict=True))


KEYS = ("blend_mode", "blend_mode_source", "gate_k", "gate_tau", "alpha_lo", "alpha_hi", "alpha_vec", "alpha_vec_len")
ODD = st.one_of(st.text(max_size=20), st.sampled_from([*BLEND_MODES, "1e999", "-0", "[0.5]", "0.5,0.5", "true"]))


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), ODD))
def test_no_annotations_raise_and_what_comes_of_them_is_usable(annotations):
    config, problem = read_blend_config(annotations, CHANNELS)
    assert config.mode in BLEND_MODES
    assert not problem or config.mode == "CONVEX"
    assert config.alpha_lo <= config.alpha_hi
    assert all(map(math.isfinite, (config.gate_k, config.gate_tau, config.alpha_lo, config.alpha_hi)))
    assert config.mode != "CHANNEL" or CHANNELS % len(config.alpha_vec) == 0
