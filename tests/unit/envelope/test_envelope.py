from __future__ import annotations

import contextlib
import hmac
import json
import random
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from esper_rpc.envelope import Keyring, Rejected, RootKeys, Verifier, VerifierConfig, mac_input, reasons, sign
from esper_rpc.envelope.keys import SECRET_VARIABLE, derive_audience_key, derive_issuer_key
from esper_rpc.envelope.verification import COMMAND_TYPE
from esper_rpc.errors import ConfigError
from esper_rpc.identity import SpiffeId
from esper_rpc.proto.leyline.v1 import CommandOutcome, SignedEnvelope

TRAINER = SpiffeId("trainer", "demo")
EPOCH = bytes(range(16))
ROOTS = RootKeys(active_key_id="k1", roots={"k1": bytes(32), "k0": bytes([7] * 32)})
NOW = 1_700_000_000 * 10**9
VECTORS = Path(__file__).parents[2] / "contract" / "envelope_vectors.json"


class Clock:
    def __init__(self):
        self.now = NOW

    def __call__(self):
        return self.now


def keyring(role="tamiyo"):
    return Keyring.for_identity(ROOTS, SpiffeId(role, "local"), issuers=())


def signed(*, signer="tamiyo", sequence=1, nonce="n1", **overrides):
    fields = {
        "payload_type": COMMAND_TYPE, "audience": str(TRAINER), "run_id": "run", "receiver_epoch": EPOCH,
        "sequence": sequence, "nonce": nonce, "request_digest": b"d" * 32, "issued_at_ns": NOW,
    } | overrides  # fmt: skip
    payload = fields.pop("payload", b"payload")
    return sign(payload, keyring=keyring(signer), **fields)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def verifier(clock):
    ring = Keyring.for_identity(ROOTS, TRAINER, issuers=("tamiyo", "operator", "simic"), audiences=("other",))
    return Verifier(keyring=ring, audience=str(TRAINER), receiver_epoch=EPOCH, clock_ns=clock, offset_ns=0)


def changed(envelope, **fields):
    copy = SignedEnvelope.FromString(envelope.SerializeToString())
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


REJECTIONS = {
    reasons.MISSING_SIGNATURE: lambda: changed(signed(), mac=b""),
    reasons.INVALID_SIGNATURE: lambda: changed(signed(), payload=b"another"),
    reasons.UNKNOWN_KEY: lambda: changed(signed(), key_id="k9"),
    reasons.WRONG_ISSUER: lambda: signed(signer="simic"),
    reasons.WRONG_AUDIENCE: lambda: signed(audience="other"),
    reasons.WRONG_PAYLOAD_TYPE: lambda: signed(payload_type="esper.leyline.v1.PolicyUpdate"),
    reasons.STALE_COMMAND: lambda: signed(issued_at_ns=NOW - 60 * 10**9 - 1),
    reasons.FUTURE_COMMAND: lambda: signed(issued_at_ns=NOW + 5 * 10**9 + 1),
    reasons.WRONG_EPOCH: lambda: signed(receiver_epoch=bytes(16)),
    reasons.OVERSIZE: lambda: signed(payload=bytes(256 * 1024 + 1)),
}


@pytest.mark.parametrize("reason", REJECTIONS)
def test_a_rejected_envelope_changes_nothing_and_is_counted(verifier, reason):
    with pytest.raises(Rejected) as caught:
        verifier.verify(REJECTIONS[reason]())
    assert caught.value.reason == reason
    assert (verifier.fences(), verifier.remembered_nonces()) == ({}, 0)
    assert verifier.rejections == {reason: 1}


@pytest.mark.parametrize(
    "fields",
    [{"payload": bytes(256 * 1024)}, {"issued_at_ns": NOW - 60 * 10**9}, {"issued_at_ns": NOW + 5 * 10**9}],
    ids=["largest", "oldest", "furthest ahead"],
)
def test_what_is_just_within_a_limit_is_accepted(verifier, fields):
    assert verifier.verify(signed(**fields)).nonce == "n1"


def test_an_envelope_of_another_version_is_rejected_though_it_was_signed_as_such(verifier):
    envelope = changed(signed(), version=2)
    envelope.mac = hmac.digest(keyring().signing_key(str(TRAINER)), mac_input(envelope), "sha256")
    with pytest.raises(Rejected, match=reasons.INVALID_SIGNATURE):
        verifier.verify(envelope)


def test_an_issuer_unknown_to_the_keyring_is_the_wrong_issuer(verifier):
    with pytest.raises(Rejected, match=reasons.WRONG_ISSUER):
        verifier.verify(changed(signed(), issuer="oona"))


def test_a_good_envelope_moves_the_fence(verifier):
    assert verifier.verify(signed(sequence=4)).payload == b"payload"
    assert verifier.fences() == {"tamiyo": 4}


def test_every_issuer_has_a_fence_of_its_own(verifier):
    verifier.verify(signed(sequence=4))
    verifier.verify(signed(signer="operator", sequence=1, nonce="n2"))
    assert verifier.fences() == {"tamiyo": 4, "operator": 1}


@pytest.mark.parametrize("sequence", [3, 4])
def test_a_sequence_at_or_below_the_fence_is_replayed(verifier, sequence):
    verifier.verify(signed(sequence=4))
    with pytest.raises(Rejected, match=reasons.SEQUENCE_REPLAYED):
        verifier.verify(signed(sequence=sequence, nonce="n2"))
    assert verifier.fences() == {"tamiyo": 4}


def test_on_the_step_path_only_the_outstanding_request_is_answered(verifier):
    for sequence, digest in ((6, b"d" * 32), (5, b"e" * 32)):
        with pytest.raises(Rejected, match=reasons.SEQUENCE_REPLAYED):
            verifier.verify(signed(sequence=5), expected_sequence=sequence, expected_digest=digest)
    assert verifier.fences() == {}
    assert not verifier.verify(signed(sequence=5), expected_sequence=5, expected_digest=b"d" * 32).duplicate


def test_the_identical_envelope_again_returns_the_recorded_outcome(verifier):
    outcome = CommandOutcome(command_id="n1", result=CommandOutcome.RESULT_APPLIED)
    verifier.verify(signed())
    verifier.record_outcome("n1", outcome)
    again = verifier.verify(signed())
    assert (again.duplicate, again.outcome) == (True, outcome)


def test_of_one_envelope_that_comes_twice_at_once_one_is_the_duplicate(verifier, monkeypatch):
    is_full, both = verifier._nonces.is_full, threading.Barrier(2)

    def meeting():
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # Only without a lock would they meet here.
        return is_full()

    monkeypatch.setattr(verifier._nonces, "is_full", meeting)
    with ThreadPoolExecutor(2) as pool:
        accepted = pool.map(verifier.verify, [signed(), signed()])
    assert sorted(each.duplicate for each in accepted) == [False, True]


def test_the_same_command_id_with_another_mac_is_rejected(verifier):
    verifier.verify(signed())
    with pytest.raises(Rejected, match=reasons.NONCE_REPLAYED):
        verifier.verify(signed(sequence=2, payload=b"another"))


def test_a_nonce_is_forgotten_after_five_minutes_but_its_envelope_stays_dead(verifier, clock):
    verifier.verify(signed())
    clock.now += 301 * 10**9
    with pytest.raises(Rejected, match=reasons.STALE_COMMAND):
        verifier.verify(signed())
    with pytest.raises(Rejected, match=reasons.SEQUENCE_REPLAYED):
        verifier.verify(signed(issued_at_ns=clock.now, nonce="n2"))


def test_a_full_nonce_store_refuses_rather_than_forget(clock):
    ring = Keyring.for_identity(ROOTS, TRAINER, issuers=("tamiyo",))
    config = VerifierConfig(nonce_capacity=1)
    small = Verifier(
        keyring=ring, audience=str(TRAINER), receiver_epoch=EPOCH, clock_ns=clock, offset_ns=0, config=config
    )
    small.verify(signed())
    with pytest.raises(Rejected, match=reasons.LOCAL_LIMIT):
        small.verify(signed(sequence=2, nonce="n2"))


def test_a_step_of_the_clock_offset_decides_freshness(verifier):
    verifier.set_clock_offset(61 * 10**9)
    with pytest.raises(Rejected, match=reasons.STALE_COMMAND):
        verifier.verify(signed())


def test_both_live_keys_are_accepted_during_a_rotation(verifier):
    older = Keyring.for_identity(
        RootKeys(active_key_id="k0", roots=ROOTS.roots), SpiffeId("tamiyo", "local"), issuers=()
    )
    envelope = sign(
        b"p", payload_type=COMMAND_TYPE, keyring=older, audience=str(TRAINER), issued_at_ns=NOW, nonce="old",
        receiver_epoch=EPOCH, sequence=1,
    )  # fmt: skip
    assert verifier.verify(envelope).payload == b"p"


def test_none_of_100_000_mutated_envelopes_is_accepted(verifier):
    draw = random.Random(20261121)
    genuine = signed(sequence=9).SerializeToString()
    accepted = unparsed = 0
    for _ in range(100_000):
        raw = bytearray(genuine)
        for _ in range(draw.randint(1, 3)):
            mutate(raw, draw)
        try:
            envelope = SignedEnvelope.FromString(bytes(raw))
        except Exception:  # noqa: BLE001  # Whatever the parser says, it is not an envelope.
            unparsed += 1
            continue
        accepted += is_accepted_as_something_else(verifier, envelope, genuine)
    assert accepted == 0
    assert verifier.fences() == {}
    assert unparsed < 90_000


def mutate(raw, draw):
    position = draw.randrange(len(raw))
    match draw.randrange(3):
        case 0:
            raw[position] ^= 1 << draw.randrange(8)
        case 1:
            del raw[position]
        case _:
            raw.insert(position, draw.randrange(256))


def is_accepted_as_something_else(verifier, envelope, genuine):
    original = SignedEnvelope.FromString(genuine)
    if (mac_input(envelope), envelope.mac) == (mac_input(original), original.mac):
        return False  # Only unknown fields were added: it says the same.
    try:
        verifier.verify(envelope)
    except Rejected:
        return False
    return True


def test_a_leaked_trainer_keyring_forges_nothing_to_another_trainer():
    leaked = Keyring.for_identity(ROOTS, TRAINER, issuers=("tamiyo",))
    victim = "spiffe://esper/trainer/victim"
    key = derive_audience_key(derive_issuer_key(ROOTS.roots["k1"], "k1", "tamiyo"), victim)
    assert leaked.verification_key("k1", "tamiyo", victim) is None
    assert leaked.signing_key(victim) != key


def test_the_keyring_file_is_private_and_its_repr_shows_no_secret(tmp_path):
    path = tmp_path / "keyring.json"
    ring = Keyring.for_identity(ROOTS, TRAINER, issuers=("tamiyo",))
    ring.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Keyring.load(path).to_json() == ring.to_json()
    assert not any(key in repr(ring) for key in json.loads(ring.to_json())["issuer_keys"].values())
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Keyring.load(path)


@pytest.mark.parametrize("source", ["keyring.json", SECRET_VARIABLE])
def test_the_keyring_of_another_role_is_a_clear_error(tmp_path, source):
    ring = keyring("urza")
    ring.save(tmp_path / "keyring.json")
    environ = {SECRET_VARIABLE: ring.to_json().decode()} if source == SECRET_VARIABLE else {}
    assert Keyring.find(tmp_path, environ, role="urza").role == "urza"
    with pytest.raises(ConfigError, match=f"{source} holds the keyring of urza, and this is tamiyo"):
        Keyring.find(tmp_path, environ, role="tamiyo")


RING = '{"role": %s, "active_key_id": "k", "issuer_keys": %s, "received": %s}'


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"role": "x"}', "[" * 100_000, b"\xff", RING % (1, "{}", "[]"), RING % ('"a"', "[]", "[]"),
     RING % ('"a"', "{}", "7"), RING % ('"a"', '{"k": 7}', "[]"), RING % ('"a"', "{}", '[["k", 1, "a", ""]]')],
)  # fmt: skip
def test_a_broken_keyring_is_a_clear_error(text):
    with pytest.raises(ConfigError, match="keyring"):
        Keyring.parse(text)


@pytest.mark.parametrize("vector", json.loads(VECTORS.read_text()), ids=lambda v: v["name"])
def test_the_published_vectors_hold(vector):
    envelope = SignedEnvelope.FromString(bytes.fromhex(vector["envelope_hex"]))
    root = bytes.fromhex(vector["root_hex"])
    key = derive_audience_key(derive_issuer_key(root, envelope.key_id, envelope.issuer), envelope.audience)
    assert key.hex() == vector["key_hex"]
    assert mac_input(envelope).hex() == vector["mac_input_hex"]
    ring = Keyring.for_identity(
        RootKeys(active_key_id=envelope.key_id, roots={envelope.key_id: root}),
        SpiffeId(envelope.issuer, "any"),
        issuers=(),
    )
    again = sign(
        envelope.payload, payload_type=envelope.payload_type, keyring=ring, audience=envelope.audience,
        run_id=envelope.run_id, receiver_epoch=envelope.receiver_epoch, sequence=envelope.sequence,
        issued_at_ns=envelope.issued_at_ns, nonce=envelope.nonce, request_digest=envelope.request_digest,
    )  # fmt: skip
    assert again == envelope


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"active_key_id": "k", "roots": []}', '{"active_key_id": "k", "roots": {}}',
     '{"active_key_id": ["k"], "roots": {}}', '{"active_key_id": "k", "roots": {"k": null}}',
     '{"active_key_id": "k", "roots": {"k": "\u00e4"}}', '{"active_key_id": "k", "roots": {"k": "AAAA"}}'],
)  # fmt: skip
def test_a_broken_file_of_roots_is_a_clear_error(tmp_path, text):
    path = tmp_path / "root.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError):
        RootKeys.load(path)
