from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_rpc.envelope import Rejected, reasons, sign
from esper_rpc.proto.leyline.v1 import PolicyUpdate, SignedEnvelope
from esper_rpc.testing import TemporaryMesh
from esper_servers.tamiyo.policy_updates.verification import (
    FRESH_NS,
    MAX_PAYLOAD_BYTES,
    UPDATE_TYPE,
    VERSION_NOT_ABOVE,
    number_of,
    open_update,
)

NOW = 1_800_000_000 * 10**9


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    return TemporaryMesh(tmp_path_factory.mktemp("mesh"))


def update(**fields):
    return PolicyUpdate(**({"version": 1, "tamiyo_policy_version": "gnn_v1-5", "payload": b"weights"} | fields))


def sealed(mesh, content=None, *, role="simic", **fields):
    payload = (content or update()).SerializeToString()
    defaults = {"payload_type": UPDATE_TYPE, "audience": "tamiyo", "issued_at_ns": NOW, "nonce": "n"}
    return sign(payload, keyring=mesh.keyring(role), **(defaults | fields))


def opened(mesh, envelope, highest=4, now_ns=NOW):
    return open_update(envelope, keyring=mesh.keyring("tamiyo"), now_ns=now_ns, highest=highest)


def why(mesh, envelope, **arguments):
    with pytest.raises(Rejected) as caught:
        opened(mesh, envelope, **arguments)
    return caught.value.reason


def test_what_simic_signed_for_every_tamiyo_is_taken(mesh):
    assert opened(mesh, sealed(mesh)) == update()
    assert opened(mesh, sealed(mesh), now_ns=NOW + FRESH_NS) == update()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"role": "operator"}, reasons.WRONG_ISSUER),
        ({"audience": "trainer"}, reasons.WRONG_AUDIENCE),
        ({"audience": "spiffe://esper/tamiyo/local"}, reasons.WRONG_AUDIENCE),
        ({"payload_type": "esper.leyline.v1.AdaptationCommand"}, reasons.WRONG_PAYLOAD_TYPE),
        ({"issued_at_ns": NOW - FRESH_NS - 1}, reasons.STALE_COMMAND),
        ({"issued_at_ns": NOW + 6 * 10**9}, reasons.FUTURE_COMMAND),
        ({"content": update(version=2)}, reasons.UNSUPPORTED),
        ({"content": update(training_run_id="run")}, reasons.UNSUPPORTED),
        ({"content": update(tamiyo_policy_version="gnn_v1-4")}, VERSION_NOT_ABOVE),
        ({"content": update(tamiyo_policy_version="gnn_v1")}, VERSION_NOT_ABOVE),
        ({"content": update(tamiyo_policy_version="")}, VERSION_NOT_ABOVE),
        ({"content": update(payload=bytes(MAX_PAYLOAD_BYTES))}, reasons.OVERSIZE),
    ],
)
def test_an_update_is_rejected_for_a_stable_reason(mesh, fields, reason):
    assert why(mesh, sealed(mesh, **fields)) == reason


@pytest.mark.parametrize("field", ["payload", "issuer", "audience", "nonce", "issued_at_ns", "key_id"])
def test_an_update_that_was_changed_is_rejected(mesh, field):
    envelope = sealed(mesh)
    value = getattr(envelope, field)
    changed = {str: lambda: value + "x", bytes: lambda: value + b"x", int: lambda: value + 1}[type(value)]()
    setattr(envelope, field, changed)
    assert why(mesh, envelope) in {reasons.INVALID_SIGNATURE, reasons.UNKNOWN_KEY, reasons.WRONG_AUDIENCE,
                                   reasons.WRONG_ISSUER}  # fmt: skip


def test_an_update_without_a_signature_is_rejected(mesh):
    assert why(mesh, SignedEnvelope(payload_type=UPDATE_TYPE, payload=update().SerializeToString())) == (
        reasons.MISSING_SIGNATURE
    )


@pytest.mark.parametrize(
    ("version", "number"),
    [
        ("gnn_v1-heuristic-1", 1),
        ("gnn_v1-12", 12),
        ("007", 7),
        ("v", -1),
        ("", -1),
        ("1.0 beta", -1),
        ("x" + "9" * 19, -1),
    ],
)
def test_a_version_is_as_high_as_the_number_that_it_ends_in(version, number):
    assert number_of(version) == number


@given(st.text(max_size=40), st.integers(0, 10**17), st.integers(0, 10**17))
def test_versions_of_one_name_are_ordered_by_their_numbers(name, one, other):
    first, second = f"{name}-{one}", f"{name}-{other}"
    assert (number_of(first) < number_of(second)) == (one < other)
