"""docs/wire.md says what the code does: its worked example is a golden vector, its reasons are the stable ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

from esper_rpc.envelope import reasons
from esper_rpc.envelope.keys import derive_issuer_key, length_prefixed
from esper_rpc.proto.leyline.v1 import SignedEnvelope

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "wire.md").read_text()
FULL = json.loads((ROOT / "tests" / "contract" / "envelope_vectors.json").read_text())[0]
ENVELOPE = SignedEnvelope.FromString(bytes.fromhex(FULL["envelope_hex"]))
EXAMPLE = DOCUMENT.partition("### Worked example")[2]


def hex_below(heading):
    """The hexadecimal words of the block that follows a line, without the names before them."""
    block = EXAMPLE.partition(heading)[2].split("```")[1]
    return "".join(re.findall(r"(?<![\w-])[0-9a-f]{4,}(?![\w-])", block))


def test_the_mac_input_of_the_example_is_that_of_the_vector():
    assert FULL["name"] == "full"
    assert hex_below("MAC input") == FULL["mac_input_hex"]
    assert f"{len(FULL['mac_input_hex']) // 2} bytes" in EXAMPLE


def test_the_keys_and_the_mac_of_the_example_are_those_of_the_vector():
    issuer_key = derive_issuer_key(bytes.fromhex(FULL["root_hex"]), ENVELOPE.key_id, ENVELOPE.issuer)
    infos = [length_prefixed("esper/1/issuer", "tamiyo"), length_prefixed("esper/1/audience", ENVELOPE.audience)]
    assert hex_below("Keys:") == infos[0].hex() + issuer_key.hex() + infos[1].hex() + FULL["key_hex"]
    assert hex_below("The result:") == FULL["mac_hex"]


def test_every_reason_of_a_refusal_is_documented():
    verification = DOCUMENT.partition("### Verification")[2].partition("### Worked example")[0]
    named = set(re.findall(r"`(\w+)`", verification))
    assert reasons.ALL - {reasons.UNSUPPORTED} <= named
