from __future__ import annotations

import hashlib
import json
import threading

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from esper_rpc import disk
from esper_rpc.proto.leyline.v1 import HazardBand
from esper_servers.kasmina.blending import alpha
from esper_servers.policy import registries as module
from esper_servers.policy import vocabularies
from esper_servers.policy.registries import Registries, Registry, mismatches

ALL = {"seed", "blueprint", "schedule", "layer_type", "activation_type", "optimizer_family", "hazard_class"}
CLOSED = ALL - {"seed", "blueprint"}
NAMES = st.text(min_size=1, max_size=12).filter(str.isprintable)
STEPS = st.lists(st.one_of(NAMES, st.just(None)), max_size=40)
"""Names that are registered one after the other; None is a restart."""


def test_all_registries_are_there_and_the_closed_ones_count_for_a_policy():
    registries = Registries.load(None)
    assert set(registries.digests()) == ALL
    assert registries.policy_digests() == {name: registries.digests()[name] for name in CLOSED}


@settings(max_examples=50, deadline=None)
@given(steps=STEPS)
def test_a_number_stays_the_same_whatever_is_registered_saved_and_loaded(tmp_path_factory, steps):
    directory, given_numbers = tmp_path_factory.mktemp("state"), {}
    registries = Registries.load(directory)
    for step in steps:
        if step is None:
            registries.save()
            registries = Registries.load(directory)
        else:
            given_numbers.setdefault(step, registries.seed.index(step))
        assert {name: registries.seed.find(name) for name in given_numbers} == given_numbers
    assert sorted(given_numbers.values()) == list(range(1, len(given_numbers) + 1))


@given(st.lists(NAMES, unique=True), st.randoms())
def test_a_digest_depends_on_names_and_numbers_and_on_nothing_else(names, dice):
    registry = Registry("one", capacity=100)
    numbers = {name: registry.index(name) for name in names}
    pairs = sorted(numbers.items())
    dice.shuffle(names)
    again = Registry("another", capacity=1000)
    again.read(orjson.dumps({name: numbers[name] for name in names}))
    assert again.digest() == registry.digest()
    assert registry.digest() == hashlib.sha256(orjson.dumps(pairs)).hexdigest()
    again.index("one more name than before")
    assert again.digest() != registry.digest()


def test_vocabularies_are_the_same_everywhere_and_take_no_names():
    here, there = Registries.load(None), Registries.load(None)
    for name in CLOSED:
        registry = getattr(here, name)
        size = len(registry)
        assert registry.index("a name of this installation") == module.UNKNOWN
        assert registry.find("a name of this installation") is None
        assert len(registry) == size > 0
    assert here.policy_digests() == there.policy_digests()


def test_the_vocabularies_begin_as_required():
    registries = Registries.load(None)
    assert [registries.schedule.index(name) for name in ("linear", "cosine", "warmup_hold", "sigmoid")] == [1, 2, 3, 4]
    assert all(registries.optimizer_family.find(name) for name in ("sgd", "adam", "adamw", "rmsprop", "adagrad"))
    assert registries.layer_type.find("Linear")
    assert registries.activation_type.find("GELU")


def test_a_hazard_class_has_the_number_of_its_band():
    registry = Registries.load(None).hazard_class
    for name, number in HazardBand.items():
        assert registry.index(name.removeprefix("HAZARD_BAND_")) == number


def test_schedules_stand_in_the_order_that_hosts_know():
    assert tuple(alpha._CURVES) == vocabularies.SCHEDULES


def test_beyond_its_bound_a_registry_gives_zero_and_keeps_what_it_has():
    registry = Registry("small", capacity=2)
    assert [registry.index(name) for name in ("a", "b", "c", "a", "")] == [1, 2, 0, 1, 0]
    assert registry.find("c") is None


@pytest.mark.parametrize("name", ["", "a\nb", "\ud800", "x" * 257])
def test_what_cannot_be_a_name_gets_no_number(name):
    registry = Registry("r", capacity=10)
    assert registry.index(name) == 0
    assert json.loads(registry.write()) == {}


def test_files_are_deterministic_and_written_only_when_something_changed(tmp_path):
    registries = Registries.load(tmp_path)
    registries.seed.index("b")
    registries.seed.index("a")
    registries.save()
    path = tmp_path / "seed_registry.json"
    assert list(json.loads(path.read_bytes()).items()) == [("b", 1), ("a", 2)]
    assert {file.name for file in tmp_path.iterdir()} == {f"{name}_registry.json" for name in ALL - {"blueprint"}}
    before = path.stat().st_ino
    registries.save()
    Registries.load(tmp_path).save()
    assert path.stat().st_ino == before


BAD = [
    b"", b"{", b"[]", b"null", b'{"a": 0}', b'{"a": 2}', b'{"a": 1, "b": 1}', b'{"a": 1, "b": 3}', b'{"a": true}',
    b'{"a": 1.0}', b'{"": 1}', b'{"a": "1"}', b"[" * 10_000, b"\xff\xfe", b'{"a": NaN}',
]  # fmt: skip


@pytest.mark.parametrize("content", BAD, ids=repr)
def test_a_file_that_cannot_be_used_is_set_aside_and_told_of_once(tmp_path, content):
    path = tmp_path / "seed_registry.json"
    path.write_bytes(content)
    with capture_logs() as logs:
        registries = Registries.load(tmp_path)
    assert [(line["event"], line["file"]) for line in logs] == [("state_file_unusable", path.name)]
    assert (tmp_path / f"{path.name}{disk.ASIDE}").read_bytes() == content
    assert registries.seed.index("first") == 1
    registries.save()
    assert Registries.load(tmp_path).seed.find("first") == 1


@settings(max_examples=100, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.dictionaries(st.text(max_size=4), st.one_of(st.integers(-1, 5), st.none(), st.floats())).map(
            lambda document: json.dumps(document).encode()
        ),
    ),
    name=st.sampled_from(sorted(ALL)),
)
def test_whatever_is_in_a_file_it_loads(tmp_path_factory, content, name):
    directory = tmp_path_factory.mktemp("state")
    (directory / f"{name}_registry.json").write_bytes(content)
    registries = Registries.load(directory)
    assert registries.policy_digests() == Registries.load(None).policy_digests()
    registries.save()


def test_a_directory_in_place_of_a_file_is_set_aside_too(tmp_path):
    (tmp_path / "seed_registry.json").mkdir()
    registries = Registries.load(tmp_path)
    registries.seed.index("a")
    registries.save()
    assert Registries.load(tmp_path).seed.find("a") == 1


def test_a_vocabulary_that_has_grown_since_is_taken_up_and_another_one_is_set_aside(tmp_path):
    path = tmp_path / "schedule_registry.json"
    path.write_bytes(b'{"linear": 1, "cosine": 2}')
    with capture_logs() as logs:
        Registries.load(tmp_path).save()
    assert (logs, len(json.loads(path.read_bytes()))) == ([], 4)
    path.write_bytes(b'{"cosine": 1, "linear": 2}')
    with capture_logs() as logs:
        assert Registries.load(tmp_path).schedule.find("linear") == 1
    assert len(logs) == 1


def test_names_may_be_registered_while_they_are_saved(tmp_path):
    registries, is_over = Registries.load(tmp_path), threading.Event()

    def save():
        while not is_over.is_set():
            registries.save()

    thread = threading.Thread(target=save)
    thread.start()
    numbers = {f"seed-{i}": registries.seed.index(f"seed-{i}") for i in range(2000)}
    is_over.set()
    thread.join()
    registries.save()
    loaded = Registries.load(tmp_path).seed
    assert {name: loaded.find(name) for name in numbers} == numbers


def test_a_mismatch_names_the_registry_in_a_sentence():
    ours = Registries.load(None).policy_digests()
    assert mismatches(ours, dict(ours)) == []
    other = ours | {"layer_type": "ab" * 32}
    (sentence,) = mismatches(other, ours)
    assert "layer_type" in sentence
    assert "abababababab" in sentence
    assert ours["layer_type"][:12] in sentence
    missing = {name: digest for name, digest in ours.items() if name != "schedule"}
    assert ["schedule" in line for line in mismatches(missing, ours)] == [True]
    assert ["schedule" in line for line in mismatches(ours, missing)] == [True]
