// SignedEnvelope as docs/wire.md describes it, with node:crypto and nothing else.
import { createHmac, hkdfSync, timingSafeEqual } from "node:crypto";

const FIELDS = [
  ["version", "integer"],
  ["payload_type", "text"],
  ["payload", "bytes"],
  ["key_id", "text"],
  ["issuer", "text"],
  ["audience", "text"],
  ["run_id", "text"],
  ["receiver_epoch", "bytes"],
  ["sequence", "integer"],
  ["issued_at_ns", "integer"],
  ["nonce", "text"],
  ["request_digest", "bytes"],
];
const COMMAND_TYPE = "esper.leyline.v1.AdaptationCommand";
const COMMAND_ISSUERS = ["tamiyo", "operator"];
const MAX_PAYLOAD_BYTES = 256 * 1024;
const PAST_NS = 60n * 10n ** 9n;
const FUTURE_NS = 5n * 10n ** 9n;
const NONCE_TTL_NS = 300n * 10n ** 9n;
const NONCE_CAPACITY = 100_000;

const hmac = (key, ...parts) => parts.reduce((mac, part) => mac.update(part), createHmac("sha256", key)).digest();
const equal = (a, b) => a.length === b.length && timingSafeEqual(a, b);

function u64(value) {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt(value));
  return bytes;
}

const lengthPrefixed = (...parts) => Buffer.concat(parts.flatMap((part) => [u64(part.length), part]));

const ENCODE = {
  integer: (value) => (BigInt(value) === 0n ? Buffer.alloc(0) : u64(value)),
  text: (value) => Buffer.from(value, "utf8"),
  bytes: (value) => value,
};

// The bytes that the MAC covers.
export function macInput(envelope) {
  const parts = FIELDS.map(([name, kind]) => ENCODE[kind](envelope[name]));
  return Buffer.concat([Buffer.from("EsperEnvelope1", "ascii"), lengthPrefixed(...parts)]);
}

export const macOf = (key, envelope) => hmac(key, macInput(envelope));

// Only a holder of the root derives keys; a client reads them from its keyring. The vectors need both.
export function deriveIssuerKey(root, keyId, role) {
  const info = lengthPrefixed(Buffer.from("esper/1/issuer"), Buffer.from(role));
  return Buffer.from(hkdfSync("sha256", root, Buffer.from(keyId), info, 32));
}

export function deriveAudienceKey(issuerKey, audience) {
  const info = lengthPrefixed(Buffer.from("esper/1/audience"), Buffer.from(audience));
  return hmac(issuerKey, info, Buffer.from([1])); // HKDF-Expand to 32 bytes is one round.
}

export class Rejected extends Error {
  constructor(reason) {
    super(reason);
    this.reason = reason;
  }
}

function refuseIf(condition, reason) {
  if (condition) throw new Rejected(reason);
}

// Verifies the commands for one receiver. The payload may be parsed only after `verify` returned it.
export class Verifier {
  constructor({ keyring, audience, receiverEpoch, clockNs }) {
    Object.assign(this, { audience, receiverEpoch, clockNs });
    this.received = keyring.received;
    this.fences = new Map();
    this.nonces = new Map(); // In order of arrival, which is the order in which they expire.
  }

  // `sequence` and `digest` are those of the request that waits for this answer.
  verify(envelope, { sequence, digest }) {
    this.checkSignature(envelope);
    this.checkAddress(envelope);
    return this.commit(envelope, sequence, digest);
  }

  checkSignature(envelope) {
    refuseIf(envelope.payload.length > MAX_PAYLOAD_BYTES, "oversize");
    refuseIf(envelope.mac.length === 0, "missing_signature");
    const key = this.keyOf(envelope);
    const isGood = envelope.version === 1 && equal(macOf(key, envelope), envelope.mac);
    refuseIf(!isGood, "invalid_signature");
  }

  keyOf({ key_id, issuer, audience }) {
    const row = this.received.find(([k, i, a]) => k === key_id && i === issuer && a === audience);
    if (row) return Buffer.from(row[3], "base64");
    refuseIf(!this.received.some(([k]) => k === key_id), "unknown_key");
    throw new Rejected(this.received.some(([, i]) => i === issuer) ? "wrong_audience" : "wrong_issuer");
  }

  checkAddress(envelope) {
    refuseIf(envelope.payload_type !== COMMAND_TYPE, "wrong_payload_type");
    refuseIf(!COMMAND_ISSUERS.includes(envelope.issuer), "wrong_issuer");
    refuseIf(envelope.audience !== this.audience, "wrong_audience");
    const age = this.clockNs() - BigInt(envelope.issued_at_ns);
    refuseIf(age > PAST_NS, "stale_command");
    refuseIf(age < -FUTURE_NS, "future_command");
    refuseIf(!equal(envelope.receiver_epoch, this.receiverEpoch), "wrong_epoch");
  }

  commit(envelope, sequence, digest) {
    this.forgetOldNonces();
    const known = this.nonces.get(envelope.nonce);
    if (known) {
      refuseIf(!equal(known.mac, envelope.mac), "nonce_replayed");
      return { payload: envelope.payload, duplicate: true };
    }
    const number = BigInt(envelope.sequence);
    refuseIf(number <= (this.fences.get(envelope.issuer) ?? 0n), "sequence_replayed");
    refuseIf(number !== BigInt(sequence) || !equal(envelope.request_digest, digest), "sequence_replayed");
    refuseIf(this.nonces.size >= NONCE_CAPACITY, "local_limit");
    this.fences.set(envelope.issuer, number);
    this.nonces.set(envelope.nonce, { mac: envelope.mac, expires: this.clockNs() + NONCE_TTL_NS });
    return { payload: envelope.payload, duplicate: false };
  }

  forgetOldNonces() {
    const now = this.clockNs();
    for (const [nonce, { expires }] of this.nonces) {
      if (expires > now) return;
      this.nonces.delete(nonce);
    }
  }
}
