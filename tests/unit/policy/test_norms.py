from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from esper_rpc import disk
from esper_servers.policy import norms_store
from esper_servers.policy.norms import (
    MOST_MEAN,
    MOST_VARIANCE,
    PRIORS,
    Experience,
    Norms,
    is_sound,
    pool,
    prior_moments,
)
from esper_servers.policy.norms_store import FILE_NAME, MOST_STEPS, NormsStore, read_experience, write_experience

SOUND = st.tuples(st.floats(-MOST_MEAN, MOST_MEAN), st.floats(0, MOST_VARIANCE))
ANY = st.tuples(st.floats(), st.floats())
MOMENTS = st.fixed_dictionaries(dict.fromkeys(PRIORS, SOUND))
WILD_MOMENTS = st.fixed_dictionaries(dict.fromkeys(PRIORS, st.one_of(SOUND, ANY)))


def learned(value, steps=50):
    """What a run has learned whose inputs were all of one value."""
    norms = Norms()
    for _ in range(steps):
        for name in PRIORS:
            norms.update(name, value)
    return Experience(dict(norms.moments), steps)


def test_the_norms_of_a_new_run_have_the_means_and_deviations_of_the_requirements():
    assert Norms().moments == {name: (mean, sd**2) for name, (mean, sd) in PRIORS.items()}
    assert PRIORS["samples_per_s"] == (4500.0, 500.0)


@given(MOMENTS, st.integers(0, MOST_STEPS))
def test_norms_that_were_saved_and_loaded_are_equal(moments, steps):
    experience = Experience(moments, steps)
    assert read_experience(write_experience(experience)) == experience


@settings(max_examples=50, deadline=None)
@given(parts=st.lists(st.builds(Experience, WILD_MOMENTS, st.integers(0, 10**6)), max_size=5))
def test_whatever_runs_have_learned_what_is_saved_can_be_loaded(tmp_path_factory, parts):
    directory = tmp_path_factory.mktemp("state")
    store = NormsStore.load(directory)
    store.save(store.parts(parts))
    with capture_logs() as logs:
        found = NormsStore.load(directory).begin().moments
    assert logs == []
    assert found == store.begin().moments
    assert all(is_sound(*each) for each in found.values())


def test_a_pool_is_the_mean_by_steps_and_the_variance_within_and_between():
    one = Experience(dict.fromkeys(PRIORS, (1.0, 0.5)), 30)
    other = Experience(dict.fromkeys(PRIORS, (5.0, 0.5)), 10)
    pooled = pool([one, other])
    assert pooled.steps == 40
    assert pooled.moments["loss"] == pytest.approx((2.0, 0.5 + (30 * 1 + 10 * 9) / 40))


@given(MOMENTS, st.integers(1, 1000), st.integers(1, 1000))
def test_a_pool_of_equals_is_the_same(moments, steps, more):
    pooled = pool([Experience(moments, steps), Experience(moments, more)])
    for name, found in pooled.moments.items():
        assert found == pytest.approx(moments[name], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (math.inf, 1.0), (1.0, -1.0), (1.0, math.inf), (1e300, 1.0)])
def test_moments_that_are_not_sound_teach_nothing(bad):
    calm, wild = learned(2.0), Experience(dict.fromkeys(PRIORS, bad), 5000)
    assert pool([Experience(), calm, wild]).moments == pool([Experience(), calm]).moments


def test_without_a_file_a_run_starts_from_the_priors_and_nothing_is_told(tmp_path):
    with capture_logs() as logs:
        store = NormsStore.load(tmp_path)
    assert (store.begin().moments, logs) == (prior_moments(), [])
    store.save(store.parts([]))
    assert list(tmp_path.iterdir()) == []


def test_a_run_starts_from_what_open_and_ended_runs_have_learned(tmp_path):
    store = NormsStore.load(tmp_path)
    store.save(store.parts([learned(3.0)]))
    assert store.begin().moments["loss"][0] == pytest.approx(3.0, abs=0.05)
    store.end(learned(3.0))
    store.end(learned(5.0))
    store.save(store.parts([]))
    found = NormsStore.load(tmp_path).begin().moments["loss"]
    assert found == store.begin().moments["loss"]
    assert found[0] == pytest.approx(4.0, abs=0.05)
    assert found[1] == pytest.approx(1.0, abs=0.1)


def test_what_was_loaded_counts_too_but_not_for_ever(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(write_experience(Experience(dict.fromkeys(PRIORS, (0.0, 0.0)), 10**9)))
    store = NormsStore.load(tmp_path)
    store.save(store.parts([Experience(dict.fromkeys(PRIORS, (1.0, 0.0)), MOST_STEPS)]))
    assert store.begin().moments["loss"][0] == pytest.approx(0.5)


def test_runs_do_not_share_norms():
    store = NormsStore()
    first, second = store.begin(), store.begin()
    first.update("loss", 100.0)
    assert second.moments == prior_moments()
    assert store.begin().moments == prior_moments()


def test_nothing_is_written_when_no_step_was_taken_since(tmp_path):
    store, run = NormsStore.load(tmp_path), learned(2.0)
    store.save(store.parts([run]))
    before = (tmp_path / FILE_NAME).stat().st_ino
    store.save(store.parts([run]))
    assert (tmp_path / FILE_NAME).stat().st_ino == before
    store.save(store.parts([learned(2.0, steps=51)]))
    assert json.loads((tmp_path / FILE_NAME).read_bytes())["steps"] == 51


WHOLE = write_experience(Experience())
BAD = {
    "empty": b"",
    "truncated": WHOLE[: len(WHOLE) // 2],
    "no object": b"[1, 2]",
    "no moments": b'{"steps": 3}',
    "no steps": b'{"moments": {}}',
    "steps of the wrong type": b'{"steps": true, "moments": {}}',
    "moments of the wrong type": b'{"steps": 1, "moments": {"loss": [0.8, 0.09]}}',
    "a mean of the wrong type": b'{"steps": 1, "moments": {"loss": {"mean": "0.8", "variance": 0.09}}}',
    "NaN": b'{"steps": 1, "moments": {"loss": {"mean": NaN, "variance": 0.09}}}',
    "infinite": b'{"steps": 1, "moments": {"loss": {"mean": 1e999, "variance": 0.09}}}',
    "null": b'{"steps": 1, "moments": {"loss": {"mean": null, "variance": 0.09}}}',
    "a negative variance": b'{"steps": 1, "moments": {"loss": {"mean": 0.8, "variance": -0.09}}}',
    "nested": b"[" * 5000,
    "not text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_a_file_that_cannot_be_used_gives_priors_is_told_of_once_and_kept_aside(tmp_path, content):
    path = tmp_path / FILE_NAME
    path.write_bytes(content)
    with capture_logs() as logs:
        store = NormsStore.load(tmp_path)
    assert store.begin().moments == prior_moments()
    assert [(line["event"], line["log_level"]) for line in logs] == [("state_file_unusable", "warning")]
    assert (tmp_path / f"{FILE_NAME}{disk.ASIDE}").read_bytes() == content
    store.save(store.parts([learned(2.0)]))
    assert NormsStore.load(tmp_path).begin().moments == store.begin().moments


@settings(max_examples=200, deadline=None)
@given(content=st.one_of(st.binary(max_size=80), st.integers(0, len(WHOLE)).map(lambda n: WHOLE[:n])))
def test_whatever_is_in_the_file_a_run_starts_from_sound_norms(tmp_path_factory, content):
    directory = tmp_path_factory.mktemp("state")
    (directory / FILE_NAME).write_bytes(content)
    moments = NormsStore.load(directory).begin().moments
    assert moments.keys() == PRIORS.keys()
    assert all(is_sound(*each) for each in moments.values())


def test_an_input_that_the_file_does_not_know_has_its_prior(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b'{"steps": 9, "moments": {"loss": {"mean": 2, "variance": 1}, "new": 7}}')
    moments = NormsStore.load(tmp_path).begin().moments
    assert moments == prior_moments() | {"loss": (2.0, 1.0)}


def test_a_save_that_fails_leaves_the_old_file_and_is_done_again(tmp_path, monkeypatch):
    store = NormsStore.load(tmp_path)
    store.save(store.parts([learned(2.0)]))
    before = (tmp_path / FILE_NAME).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(disk.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.save(store.parts([learned(7.0)]))
    assert (tmp_path / FILE_NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    store.save(store.parts([learned(7.0)]))
    assert (tmp_path / FILE_NAME).read_bytes() != before


def test_a_store_without_a_directory_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(norms_store.disk, "write_whole", lambda *_: pytest.fail("it wrote"))
    store = NormsStore.load(None)
    store.save(store.parts([learned(2.0)]))
