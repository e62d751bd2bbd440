"""A short fixed run of every fuzz target; `make fuzz` searches on for longer."""

from __future__ import annotations

import random

import pytest
import structlog
from fuzz import targets
from fuzz.entropy import mutate_bytes

EXECUTIONS = {"identity": 200, "kernel": 200, "keyring": 300, "settings": 300, "step": 300, "topology": 300}
EXPECTED = {
    "envelope": {"accepted unchanged", "invalid_signature", "sequence_replayed", "unknown_key", "not protobuf"},
    "request": {"valid", "invalid", "not protobuf"},
    "step": {"command", "no_action", "error", "greeting"},
    "topology": {"opened", "INVALID_REQUEST", "FAILED_PRECONDITION"},
    "keyring": {"accepted", "refused"},
    "identity": {"accepted", "refused"},
    "settings": {"accepted", "refused"},
    "kernel": {"built", "rejected"},
}


@pytest.fixture
def quiet():
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    yield
    structlog.configure(**before)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_short_run_finds_no_fault_and_reaches_every_verdict(name):
    target, chance = targets.TARGETS[name], random.Random(7)
    corpus = target.seeds()
    inputs = corpus + [mutate_bytes(chance, chance.choice(corpus), corpus) for _ in range(EXECUTIONS.get(name, 1500))]
    assert EXPECTED[name] <= {target.run(data) for data in inputs}


def test_an_accepted_change_would_be_noticed(monkeypatch):
    monkeypatch.setattr("esper_rpc.envelope.verification.hmac.compare_digest", lambda *_: True)
    golden = targets.VECTORS[0]["envelope_hex"].replace("72756e2d31", "72756e2d32")
    with pytest.raises(targets.Fault, match="a changed envelope was accepted"):
        targets.envelope(bytes([0, 99]) + bytes.fromhex(golden))
