"""What is fuzzed. A target gets bytes and raises when the product does what it must not; it returns what happened."""

from __future__ import annotations

import asyncio
import atexit
import base64
import contextlib
import hashlib
import json
import shutil
import tempfile
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import orjson
import safetensors.torch
import torch
from fuzz.entropy import Entropy, document, json_bytes, message, mutate_document
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from esper_client.discovery import find_mesh
from esper_rpc import config, rules
from esper_rpc.envelope import Keyring, Rejected, RootKeys, Verifier, mac_input, reasons
from esper_rpc.envelope.verification import COMMAND_ISSUERS
from esper_rpc.errors import ConfigError, EsperError, Internal, InvalidRequest
from esper_rpc.identity import Authority, Identity, SpiffeId
from esper_rpc.proto.identity.v1 import identity_service_pb2
from esper_rpc.proto.kasmina.v1 import kasmina_service_pb2
from esper_rpc.proto.leyline.v1 import AdaptationCommand, SeedLifecycleStage, SignedEnvelope, SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import (
    EvaluateStepRequest,
    EvaluateStepsResponse,
    OpenRunRequest,
    Step,
    tamiyo_service_pb2,
)
from esper_rpc.proto.urza.v1 import BatchGetExtrasResponse, KernelManifest, urza_service_pb2
from esper_rpc.status import hide_unexpected
from esper_servers.blueprints.catalogue import load_factories
from esper_servers.blueprints.kernel import KernelRejected, instantiate
from esper_servers.cli.home import Home
from esper_servers.policy import sample
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import PriorConfig
from esper_servers.tamiyo.blueprint_cache import BlueprintCache
from esper_servers.tamiyo.choosing import INFERENCE_FAILED
from esper_servers.tamiyo.conservative_mode import ConservativeMode
from esper_servers.tamiyo.pipeline import StepPipeline
from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.run_state import Runs, build_graph
from esper_servers.urza.seeding import installed_blueprints

VECTORS = json.loads((Path(__file__).parents[1] / "contract" / "envelope_vectors.json").read_text())
FILES = (identity_service_pb2, kasmina_service_pb2, tamiyo_service_pb2, urza_service_pb2)
OWNER = "spiffe://esper/trainer/local"
INTERNAL_CODE = 13
RAW, DRAWN = b"\0", b"\1"
"""The first byte of an input: whether the rest is the message itself, or what a message is drawn from."""


class Fault(AssertionError):
    """The product did what it must not do."""


@dataclass(frozen=True)
class Target:
    """One thing to fuzz."""

    run: Callable[[bytes], str]
    seeds: Callable[[], list[bytes]]


def _message_of(data, cls):
    entropy = Entropy(data[1:])
    return cls.FromString(data[1:]) if data[:1] == RAW else message(entropy, cls.DESCRIPTOR)


# Envelopes: nothing is accepted but what was signed.


@cache
def _golden():
    return [SignedEnvelope.FromString(bytes.fromhex(v["envelope_hex"])) for v in VECTORS]


@cache
def _ring(index):
    golden, root = _golden()[index], bytes.fromhex(VECTORS[index]["root_hex"])
    roots = RootKeys(active_key_id=golden.key_id, roots={golden.key_id: root})
    issuers = ("tamiyo", "operator")
    return Keyring.for_identity(roots, SpiffeId("trainer", "demo"), issuers=issuers, audiences=("tamiyo",))


def envelope(data):
    """A changed envelope is refused for a stable reason; an unchanged one is accepted."""
    entropy = Entropy(data)
    index = entropy.below(len(_golden()))
    golden, found = _golden()[index], SignedEnvelope()
    if entropy.chance(60):
        found.CopyFrom(golden)
        found.MergeFrom(message(entropy, SignedEnvelope.DESCRIPTOR))
    else:
        try:
            found = SignedEnvelope.FromString(entropy.rest())
        except DecodeError:
            return "not protobuf"
    verifier = Verifier(
        keyring=_ring(index), audience=golden.audience, receiver_epoch=golden.receiver_epoch, issuers=COMMAND_ISSUERS,
        clock_ns=lambda: golden.issued_at_ns, offset_ns=0,
    )  # fmt: skip
    return _verdict(verifier, found, golden)


def _verdict(verifier, found, golden):
    try:
        accepted = verifier.verify(found)
    except Rejected as rejected:
        if rejected.reason not in reasons.ALL or verifier.fences() or verifier.remembered_nonces():
            raise Fault(f"a refusal as {rejected.reason} left a trace") from rejected
        return rejected.reason
    if (mac_input(found), found.mac) != (mac_input(golden), golden.mac) or accepted.payload != golden.payload:
        raise Fault("a changed envelope was accepted")
    return "accepted unchanged"


def _envelope_seeds():
    raw = [bytes([i, 99]) + bytes.fromhex(v["envelope_hex"]) for i, v in enumerate(VECTORS)]
    return [*raw, *(bytes([i, 0]) for i in range(len(VECTORS)))]


# Requests: whatever arrives is decoded and checked, or refused as InvalidRequest.


@cache
def _requests():
    services = [s for file in FILES for s in file.DESCRIPTOR.services_by_name.values()]
    found = {m.input_type.full_name: m.input_type for s in services for m in s.methods}
    return [GetMessageClass(descriptor) for descriptor in (*found.values(), AdaptationCommand.DESCRIPTOR)]


def request(data):
    """A request message of any service passes its rules or breaks them, and nothing else."""
    cls = _requests()[data[0] % len(_requests())] if data else _requests()[0]
    try:
        found = _message_of(data[1:], cls)
    except DecodeError:
        return "not protobuf"
    try:
        rules.check(found)
    except InvalidRequest as error:
        if not error.violations:
            raise Fault("a refusal names no field") from error
        return "invalid"
    return "valid"


def _request_seeds():
    drawn = bytes((i * 37 + 11) % 256 for i in range(256))
    return [bytes([i]) + DRAWN + drawn[i:] for i in range(len(_requests()))] + [
        bytes([i]) + RAW + example.SerializeToString()
        for i, cls in enumerate(_requests())
        for example in (_open_run(), _step())
        if isinstance(example, cls)
    ]


# Steps: always an answer, never an internal error, and no run spoils the policy for the others.


class _NoLog:
    def record(self, *_):
        pass


@cache
def _pipeline():
    blueprints = BlueprintCache()
    blueprints.replace_with([request.blueprint for request in installed_blueprints()], BatchGetExtrasResponse())
    roots = RootKeys(active_key_id="k", roots={"k": bytes(32)})
    keyring = Keyring.for_identity(roots, SpiffeId("tamiyo", "local"), issuers=())
    torch.set_num_threads(1)
    pipeline = StepPipeline(
        policy=Policy.initial(), runs=Runs(), blueprints=blueprints, keyring=keyring, decisions=_NoLog(),
        mode=ConservativeMode(),
    )  # fmt: skip
    pipeline.runs.open(_open_run(), OWNER, blueprints.candidates(sample.sample_sites()), blueprints.version)
    return pipeline


def _open_run():
    return OpenRunRequest(
        run_id="run", protocol_versions=[1], receiver_epoch=bytes(range(16)), features=["seed", "pause", "optimizer"],
        sites=sample.sample_sites(), seeds=sample.sample_seeds(), host_topology=orjson.dumps(sample.sample_topology()),
    )  # fmt: skip


def _step(stage=SeedLifecycleStage.SEED_LIFECYCLE_STAGE_GERMINATED):
    packet = SystemStatePacket(training_metrics={"loss": 0.5}, seed_states=sample.sample_states(stage))
    return EvaluateStepRequest(step=Step(run_id="run", sequence=1, budget_us=60_000_000, packet=packet))


def step(data):
    """Arbitrary bytes on the stream get an answer that is neither an internal error nor a failed inference."""
    pipeline = _pipeline()
    pipeline.runs.get("run", OWNER).last_sequence = 0
    failures = pipeline.reasons[INFERENCE_FAILED]
    answer = EvaluateStepsResponse.FromString(_loop().run(_answer(pipeline, _raw_step(data)))).decision
    pipeline.report()
    if answer.error.code == INTERNAL_CODE:
        raise Fault(f"a step made an internal error: {answer.error.message}")
    if pipeline.reasons[INFERENCE_FAILED] != failures:
        pipeline.breaker.record_success()
        raise Fault("the state of one run made the policy fail")
    return answer.WhichOneof("decision") or "greeting"


@cache
def _loop():
    return asyncio.Runner()


async def _answer(pipeline, raw):
    answer = await pipeline.evaluate_in_band(raw, OWNER)
    await asyncio.sleep(0)  # The queue takes the turn back.
    return answer


def _raw_step(data):
    if data[:1] == RAW:
        return data[1:]
    entropy = Entropy(data[1:])
    drawn = _step(entropy.below(12))
    if entropy.chance(50):
        del drawn.step.packet.seed_states[:]
    drawn.step.packet.MergeFrom(message(entropy, SystemStatePacket.DESCRIPTOR))
    for state in drawn.step.packet.seed_states:
        if entropy.chance(95) and not 0 <= state.risk_score <= 1:
            state.ClearField("risk_score")
    return drawn.SerializeToString()


def _step_seeds():
    drawn = [DRAWN + bytes([stage, 0]) + bytes((i * 53 + stage) % 256 for i in range(300)) for stage in range(12)]
    return [RAW + _step(stage).SerializeToString() for stage in range(12)] + drawn + [RAW]


def topology(data):
    """A run of any shape is opened, or refused with an error that is not internal, and its graph feeds the policy."""
    found = _drawn_run(data)
    pipeline = _pipeline()
    try:
        rules.check(found)
        graph = build_graph(found, pipeline._blueprints.candidates(found.sites))
    except EsperError as error:
        return _refused(error)
    except Exception as error:
        raise Fault("opening a run made an internal error") from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in graph.fill(SystemStatePacket()).features.values()):
        raise Fault("a topology made features that are not finite")
    return "opened"


def _refused(error):
    if isinstance(hide_unexpected(error), Internal):
        raise Fault("an internal error") from error
    return error.reason


def _drawn_run(data):
    if data[:1] == RAW:
        return OpenRunRequest(run_id="run", receiver_epoch=bytes(16), protocol_versions=[1], host_topology=data[1:])
    entropy, drawn = Entropy(data[1:]), _open_run()
    if entropy.chance(30):
        drawn.MergeFrom(message(entropy, OpenRunRequest.DESCRIPTOR))
    drawn.host_topology = json_bytes(mutate_document(entropy, orjson.loads(_open_run().host_topology)))
    return drawn


def _topology_seeds():
    texts = (b"{}", b"[]", b'{"layers":[{"layer_id":"a","parameter_count":3}],"adjacency":{"layer":[[0,0]]}}')
    return [RAW + text for text in (*texts, _open_run().host_topology)] + [
        DRAWN + bytes((i * 71 + n * 13) % 256 for i in range(64)) for n in range(12)
    ]


# Files: what cannot be used is a ConfigError.


@cache
def _scratch():
    directory = Path(tempfile.mkdtemp(prefix="esper-fuzz-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@cache
def _identity_files():
    authority = Authority.create(_scratch() / "pki")
    Identity.of(authority.issue(SpiffeId("trainer", "demo"))).save(_scratch() / "identity")
    names = [("identity", n) for n in ("cert.pem", "key.pem", "ca.pem")]
    names += [("pki", n) for n in ("root.pem", "intermediate.pem", "intermediate.key")]
    return [(folder, name, (_scratch() / folder / name).read_bytes()) for folder, name in names]


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def _config_error_or(work, expected):
    try:
        found = work()
    except ConfigError:
        return "refused"
    if not isinstance(found, expected):
        raise Fault(f"{found!r} is not {expected}")
    return "accepted"


def keyring(data):
    """A keyring or a file of roots is read, or is a ConfigError."""
    entropy = Entropy(data[1:])
    ring = json.loads(_ring(0).to_json())
    roots = {"active_key_id": "k1", "roots": {"k1": base64.b64encode(bytes(32)).decode()}}
    text = data[1:] if data[:1] == RAW else json_bytes(mutate_document(entropy, entropy.pick((ring, roots))))
    verdicts = {_config_error_or(lambda: Keyring.parse(text), Keyring)}
    path = _write(_scratch() / "keys" / "root.json", text)
    verdicts.add(_config_error_or(lambda: Keyring.load(path), Keyring))
    verdicts.add(_config_error_or(lambda: RootKeys.load(path), RootKeys))
    return "accepted" if "accepted" in verdicts else "refused"


def _keyring_seeds():
    drawn = [DRAWN + bytes((i * 29 + n * 7) % 256 for i in range(48)) for n in range(12)]
    return [RAW + _ring(0).to_json(), RAW + b'{"active_key_id":"k","roots":{"k":"AAAA"}}', RAW + b"[[[[", *drawn]


def identity(data):
    """An identity or an authority is read, or is a ConfigError."""
    files = _identity_files()
    entropy = Entropy(data)
    folder, name, content = files[entropy.below(len(files))]
    path = _scratch() / folder / name
    _write(path, _mutated_pem(entropy, content))
    try:
        if folder == "identity":
            return _config_error_or(lambda: Identity.load(path.parent), Identity)
        return _config_error_or(lambda: Authority.load(path.parent), Authority)
    finally:
        _write(path, content)


def _mutated_pem(entropy, content):
    """The file itself, cut or overwritten, or its DER with some bytes changed."""
    if entropy.chance(30):
        return entropy.rest() or content[: len(content) // 2]
    head, *body = content.split(b"-----END")[0].strip().splitlines()
    der = bytearray(base64.b64decode(b"".join(body)))
    for _ in range(entropy.below(4)):
        der[int.from_bytes(entropy.take(2), "little") % len(der)] = entropy.byte()
    label = head.removeprefix(b"-----BEGIN").removesuffix(b"-----")
    return head + b"\n" + base64.encodebytes(bytes(der)) + b"-----END" + label + b"-----\n"


def _identity_seeds():
    return [bytes([i, 99, 1 + n % 3, n, 3 * n % 256, i]) for i in range(6) for n in range(0, 250, 50)] + [
        bytes([i, 0]) for i in (0, 1)
    ]


def settings(data):
    """esper.toml, mesh.toml and the environment are read, or are a ConfigError."""
    text = data[1:] if data[:1] == RAW else _toml(mutate_document(Entropy(data[1:]), _settings())).encode()
    home = Home(_scratch() / "home")
    _write(home.mesh_file, text)
    _write(home.settings_file, text)
    verdicts = {
        _config_error_or(lambda: find_mesh({"ESPER_HOME": str(home.directory)}), object),
        _config_error_or(home.read_mesh, dict),
        _config_error_or(lambda: config.load(RiskConfig, "risk", path=home.settings_file, environ={}), RiskConfig),
        _config_error_or(lambda: config.load(PriorConfig, "prior", path=home.settings_file, environ={}), PriorConfig),
        _from_environment(text),
    }
    return "accepted" if "accepted" in verdicts else "refused"


def _from_environment(text):
    value = text[:64].decode(errors="replace")
    environ = {"ESPER_RISK_LOSS_SPIKE": value}, {"ESPER_PRIOR_WARM_UP_STEPS": value}
    _config_error_or(lambda: config.load(RiskConfig, "risk", path=None, environ=environ[0]), RiskConfig)
    return _config_error_or(lambda: config.load(PriorConfig, "prior", path=None, environ=environ[1]), PriorConfig)


def _settings():
    return {
        "mesh": {"tamiyo": "127.0.0.1:1", "urza": "127.0.0.1:2", "identity": "x"},
        "risk": {"loss_spike": 0.2, "hook_latency_ms": 40.0},
        "prior": {"warm_up_steps": 10, "oscillation": 0.5},
    }


def _toml(value, name=()):
    """Write a document as TOML as far as TOML can say it."""
    if not isinstance(value, dict):
        return f"x = {_toml_value(value)}\n"
    plain = "".join(f"{json.dumps(k)} = {_toml_value(v)}\n" for k, v in value.items() if not isinstance(v, dict))
    tables = [(k, v) for k, v in value.items() if isinstance(v, dict)]
    return plain + "".join(f"[{'.'.join(map(json.dumps, (*name, k)))}]\n{_toml(v, (*name, k))}" for k, v in tables)


def _toml_value(value):
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    return "1979-05-27" if value is None else json.dumps(value).replace("Infinity", "inf").replace("NaN", "nan")


def _settings_seeds():
    assert tomllib.loads(_toml(_settings())) == _settings()
    texts = (
        _toml(_settings()).encode(),
        b"mesh = 1",
        b"[mesh]\ntamiyo = 1",
        b"a = " + b"[" * 64,
        b"\xff",
        b"inf",
        b"1e999",
    )
    return [RAW + text for text in texts] + [DRAWN + bytes((i * 31 + n) % 256 for i in range(48)) for n in range(12)]


# Kernels: a manifest and safetensors become a module, or are refused for a stable reason.


@cache
def _kernels():
    found = []
    for factory in load_factories().values():
        module = factory.build(json.loads(factory.manifest().config_json), factory.example_shape())
        found.append((factory, safetensors.torch.save(dict(module.state_dict()))))
    return found


def kernel(data):
    """A kernel is built within its declared bounds, or is a KernelRejected."""
    entropy = Entropy(data)
    factory, weights = entropy.pick(_kernels())
    manifest = factory.manifest()
    if entropy.chance(30):
        manifest.MergeFrom(message(entropy, KernelManifest.DESCRIPTOR))
    if entropy.chance(50):
        drawn = mutate_document(entropy, json.loads(factory.manifest().config_json))
        manifest.config_json = json_bytes(drawn).decode()
    weights = _mutated_weights(entropy, weights)
    manifest.weights_sha256 = hashlib.sha256(weights).digest() if entropy.chance(70) else b""
    return _built(manifest, factory, weights)


def _built(manifest, factory, weights):
    with contextlib.suppress(KernelRejected), warnings.catch_warnings():
        warnings.simplefilter("error")
        module = instantiate(
            manifest, load_factories(), feature_shape=factory.example_shape(), dtype=torch.float32, weights=weights
        )
        if sum(parameter.numel() for parameter in module.parameters()) > 10**6:
            raise Fault("a manifest made a module beyond the bounds of its factory")
        return "built"
    return "rejected"


def _mutated_weights(entropy, weights):
    size = int.from_bytes(weights[:8], "little")
    kind = entropy.below(4)
    if kind == 0:
        return weights
    if kind == 1:
        mutable = bytearray(weights)
        for _ in range(1 + entropy.below(4)):
            mutable[entropy.below(min(size + 16, len(mutable)))] = entropy.byte()
        return bytes(mutable)
    if kind == 2:
        header = json_bytes(mutate_document(entropy, _retyped(entropy, json.loads(weights[8 : 8 + size]))))
        return len(header).to_bytes(8, "little") + header + weights[8 + size :]
    return entropy.rest() or json_bytes(document(entropy))


def _retyped(entropy, header):
    dtypes = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "F64", "I64", "C64", "U64")
    for entry in header.values():
        entry["dtype"] = entropy.pick(dtypes) if entropy.chance(30) else entry.get("dtype")
    return header


def _kernel_seeds():
    return [
        bytes([i, 99, a, b, c, 0, 1, 7]) for i in range(8) for a, b, c in ((99, 0, 0), (0, 1, 2), (0, 2, 3), (0, 3, 1))
    ]


TARGETS = {
    "envelope": Target(envelope, _envelope_seeds),
    "request": Target(request, _request_seeds),
    "step": Target(step, _step_seeds),
    "topology": Target(topology, _topology_seeds),
    "keyring": Target(keyring, _keyring_seeds),
    "identity": Target(identity, _identity_seeds),
    "settings": Target(settings, _settings_seeds),
    "kernel": Target(kernel, _kernel_seeds),
}
