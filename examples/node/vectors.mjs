// Checks the golden vectors with node alone: `node vectors.mjs ../../tests/contract/envelope_vectors.json`.
import { readFileSync } from "node:fs";

import { deriveAudienceKey, deriveIssuerKey, macInput, macOf } from "./envelope.mjs";

const TEXTS = { 2: "payload_type", 4: "key_id", 5: "issuer", 6: "audience", 7: "run_id", 11: "nonce" };
const BYTES = { 3: "payload", 8: "receiver_epoch", 12: "request_digest", 15: "mac" };
const INTEGERS = { 1: "version", 9: "sequence", 10: "issued_at_ns" };

function blank() {
  const fields = [[TEXTS, ""], [BYTES, Buffer.alloc(0)], [INTEGERS, 0n]];
  return Object.fromEntries(fields.flatMap(([names, empty]) => Object.values(names).map((name) => [name, empty])));
}

function varint(bytes, at) {
  let value = 0n;
  for (let shift = 0n; ; shift += 7n) {
    const byte = bytes[at++];
    value |= BigInt(byte & 0x7f) << shift;
    if (byte < 0x80) return [value, at];
  }
}

// Enough of Protobuf for a SignedEnvelope: varints and length-delimited fields.
function decode(bytes) {
  const envelope = blank();
  for (let at = 0, tag, value; at < bytes.length; ) {
    [tag, at] = varint(bytes, at);
    [value, at] = varint(bytes, at);
    const number = Number(tag >> 3n);
    if (number in INTEGERS) {
      envelope[INTEGERS[number]] = value;
      continue;
    }
    const content = bytes.subarray(at, (at += Number(value)));
    envelope[TEXTS[number] ?? BYTES[number]] = number in TEXTS ? content.toString("utf8") : content;
  }
  return envelope;
}

function check({ name, root_hex, key_hex, mac_input_hex, mac_hex, envelope_hex }) {
  const envelope = decode(Buffer.from(envelope_hex, "hex"));
  const issuerKey = deriveIssuerKey(Buffer.from(root_hex, "hex"), envelope.key_id, envelope.issuer);
  const key = deriveAudienceKey(issuerKey, envelope.audience);
  const mac = macOf(key, envelope);
  const found = [key, macInput(envelope), mac, envelope.mac].map((bytes) => bytes.toString("hex"));
  const expected = [key_hex, mac_input_hex, mac_hex, mac_hex];
  return { name, ok: found.every((hex, i) => hex === expected[i]) };
}

const results = JSON.parse(readFileSync(process.argv[2], "utf8")).map(check);
console.log(JSON.stringify(results));
process.exitCode = results.every(({ ok }) => ok) ? 0 : 1;
