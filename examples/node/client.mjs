// A trainer in Node: opens a run, asks about a step by a call and on the stream, verifies the answers, prints JSON.
//
//   node client.mjs --address 127.0.0.1:PORT --identity $ESPER_HOME/identities/trainer-local --protos ../../protos
import { createHash, randomBytes, X509Certificate } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { createSecureContext } from "node:tls";
import { parseArgs } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

import { Rejected, Verifier } from "./envelope.mjs";

const LOADING = { keepCase: true, longs: String, enums: String, defaults: true, oneofs: true };
const GREETING = Buffer.alloc(0);
const BUDGET_US = 1_000_000;
const asIs = (bytes) => bytes;
const sha256 = (bytes) => createHash("sha256").update(bytes).digest();
const deadline = (seconds) => new Date(Date.now() + 1000 * seconds);

function readIdentity(directory) {
  const read = (name) => readFileSync(join(directory, name));
  const leaf = new X509Certificate(read("cert.pem"));
  const spiffeId = leaf.subjectAltName.match(/URI:(spiffe:\/\/esper\/[^,]+)/)[1];
  const tls = { ca: read("ca.pem"), cert: read("cert.pem"), key: read("key.pem"), minVersion: "TLSv1.3" };
  return { spiffeId, tls, keyring: JSON.parse(read("keyring.json")) };
}

function connect(address, identity, definition) {
  const { TamiyoService } = grpc.loadPackageDefinition(definition).esper.tamiyo.v1;
  const credentials = grpc.credentials.createFromSecureContext(createSecureContext(identity.tls));
  // The certificate names the role and never a host.
  return new TamiyoService(address, credentials, { "grpc.ssl_target_name_override": "tamiyo.esper" });
}

// Sends bytes, because the digest of a request is that of the bytes that travel.
function callWithBytes(client, name, bytes) {
  const { path, responseDeserialize } = client[name];
  return new Promise((resolve, reject) => {
    const done = (error, response) => (error ? reject(error) : resolve(response));
    client.makeUnaryRequest(path, asIs, responseDeserialize, bytes, { deadline: deadline(10) }, done);
  });
}

// One EvaluateSteps stream, one question at a time.
class DecisionStream {
  constructor(client) {
    const { path, responseDeserialize } = client.EvaluateSteps;
    this.call = client.makeBidiStreamRequest(path, asIs, responseDeserialize, { deadline: deadline(30) });
    this.answers = this.call[Symbol.asyncIterator]();
    this.mustLeave = false; // Then open another stream, ask there, and half-close this one.
  }

  async ask(bytes) {
    this.call.write(bytes);
    const { value, done } = await this.answers.next();
    if (done) throw new Error("the stream ended before its answer");
    this.mustLeave ||= value.decision.going_away;
    return value.decision;
  }

  close() {
    this.call.end();
  }
}

class Run {
  constructor(client, identity, id) {
    Object.assign(this, { client, identity, id });
    this.epoch = randomBytes(16);
    this.sequence = 0n;
  }

  async open() {
    const seed = { seed_id: "seed-0", site_id: "hidden", stage: "SEED_LIFECYCLE_STAGE_GERMINATED" };
    const request = {
      run_id: this.id,
      protocol_versions: [1],
      features: ["seed", "pause"],
      receiver_epoch: this.epoch,
      sites: [{ site_id: "hidden", module_kind: "Linear", output_shape: [32], dtype: "F32" }],
      seeds: [seed],
      last_sequence: this.sequence.toString(),
    };
    const sent = process.hrtime.bigint();
    const answer = await callWithBytes(this.client, "OpenRun", this.client.OpenRun.requestSerialize(request));
    const offset = BigInt(answer.server_time_ns) - (sent + process.hrtime.bigint()) / 2n;
    const clockNs = () => process.hrtime.bigint() + offset;
    const { keyring, spiffeId: audience } = this.identity;
    this.verifierOptions = { keyring, audience, receiverEpoch: this.epoch, clockNs };
    this.verifier = new Verifier(this.verifierOptions);
    return answer;
  }

  // The bytes of a question; they are the same for the call and for the stream.
  question(loss) {
    this.sequence += 1n;
    const seed = { seed_id: "seed-0", stage: "SEED_LIFECYCLE_STAGE_GERMINATED", learning_rate: 0.001 };
    const packet = { version: 1, global_step: `${this.sequence}`, training_metrics: { loss }, seed_states: [seed] };
    const step = { run_id: this.id, sequence: `${this.sequence}`, budget_us: BUDGET_US, packet };
    return this.client.EvaluateStep.requestSerialize({ step });
  }
}

function read(definition, run, decision, bytes) {
  const { sequence, ledger, no_action } = decision;
  const facts = { sequence: Number(sequence), kind: decision.decision, total_us: ledger?.total_us };
  if (decision.decision !== "command") return { ...facts, reason: no_action?.reason };
  const { payload } = run.verifier.verify(decision.command, { sequence: run.sequence, digest: sha256(bytes) });
  const command = definition["esper.leyline.v1.AdaptationCommand"].deserialize(payload);
  return { ...facts, command_id: command.command_id, operation: command.seed_operation?.operation };
}

const flipped = (bytes) => Buffer.from(bytes.map((byte, i) => (i === 0 ? byte ^ 1 : byte)));

// What a fresh verifier says to an envelope that is not what was sent, or not for this question.
function refusals(run, envelope, bytes) {
  const asked = { sequence: run.sequence, digest: sha256(bytes) };
  const attempt = (change, expectation = asked, options = {}) => {
    try {
      new Verifier({ ...run.verifierOptions, ...options }).verify({ ...envelope, ...change }, expectation);
      return "accepted";
    } catch (error) {
      if (error instanceof Rejected) return error.reason;
      throw error;
    }
  };
  const later = (seconds) => ({ clockNs: () => run.verifierOptions.clockNs() + BigInt(seconds) * 10n ** 9n });
  return {
    untouched: attempt({}),
    payload: attempt({ payload: flipped(envelope.payload) }),
    mac: attempt({ mac: flipped(envelope.mac) }),
    no_mac: attempt({ mac: Buffer.alloc(0) }),
    nonce: attempt({ nonce: `${envelope.nonce}x` }),
    issuer: attempt({ issuer: "simic" }),
    audience: attempt({ audience: "spiffe://esper/trainer/other" }),
    key_id: attempt({ key_id: "another" }),
    old: attempt({}, asked, later(61)),
    early: attempt({}, asked, later(-6)),
    other_epoch: attempt({}, asked, { receiverEpoch: randomBytes(16) }),
    other_question: attempt({}, { ...asked, digest: sha256(GREETING) }),
  };
}

async function main() {
  const options = { address: { type: "string" }, identity: { type: "string" }, protos: { type: "string" } };
  const { values } = parseArgs({ options });
  const file = "esper/tamiyo/v1/tamiyo_service.proto";
  const definition = protoLoader.loadSync(file, { ...LOADING, includeDirs: [values.protos] });
  const identity = readIdentity(values.identity);
  const client = connect(values.address, identity, definition);
  const run = new Run(client, identity, `node-${randomBytes(4).toString("hex")}`);
  const opened = await run.open();

  const first = run.question(0.5);
  const { decision } = await callWithBytes(client, "EvaluateStep", first);
  const refused = refusals(run, decision.command, first);
  const unary = read(definition, run, decision, first);

  const stream = new DecisionStream(client);
  const greeting = await stream.ask(GREETING);
  const second = run.question(0.4);
  const streamed = read(definition, run, await stream.ask(second), second);
  const again = await stream.ask(Buffer.from([0xff]));
  stream.close();

  const closed = await callWithBytes(client, "CloseRun", client.CloseRun.requestSerialize({ run_id: run.id }));
  client.close();
  const facts = { run_id: run.id, protocol_version: opened.protocol_version, features: opened.features };
  const greeted = { sequence: Number(greeting.sequence), kind: greeting.decision ?? null };
  const malformed = { kind: again.decision, code: again.error?.code };
  console.log(JSON.stringify({ opened: facts, unary, refused, greeted, streamed, malformed, closed }, null, 1));
}

main().catch((error) => {
  const status = grpc.status[error.code];
  console.error(JSON.stringify({ error: status ?? error.name, message: error.details ?? error.message }));
  process.exitCode = 1;
});
