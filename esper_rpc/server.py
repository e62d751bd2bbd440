from __future__ import annotations

import asyncio
import contextlib
import json
import math
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import structlog

from . import channel, config, rules
from .audit import AuditLog
from .concurrency import ConcurrencyConfig, ConcurrencyLimit
from .errors import ConfigError, InvalidRequest, Unimplemented
from .identity import Identity, SpiffeId
from .identity.authorisation import TABLE, rows_for
from .identity.authority import utc_now
from .identity.deny_list import DenyList
from .identity.peer import CURRENT_PEER, Peer, PeerTrust
from .quota import QuotaConfig, Quotas

import grpc  # isort: skip  # After channel, which sets how grpc behaves around forks.
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from .interceptors import IdentityInterceptor, server_interceptors
from .status import abort

log = structlog.get_logger(__name__)

CHORE_SECONDS = 1.0
READ_OUT_SECONDS = 2.0
LEAST_GRPC = (1, 85)
CERTIFICATE_MARGIN_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """How a service is run."""

    address: str = "127.0.0.1:0"
    drain_seconds: Annotated[float, config.Range(0, 300)] = 5.0
    stream_age_seconds: Annotated[float, config.Range(1, 86_400)] = 3600.0
    """After this a stream is asked to go elsewhere; sooner when a certificate ends."""
    shares_port: bool = False
    """Whether other processes of this user may listen at the same address, and get a share of the connections."""
    deny_list: Path | None = None
    """Names that are refused although their certificates are valid; read again when it changes."""
    audit_log: Path | None = None
    """Where refusals and admin calls are written, besides the log."""
    quota: QuotaConfig = field(default_factory=QuotaConfig)
    concurrency: ConcurrencyConfig = field(default_factory=ConcurrencyConfig)

    def __post_init__(self) -> None:
        config.validate(self)


class Call:
    """What a servicer knows of a call, besides its request."""

    def __init__(
        self, method: str, peer: SpiffeId, context: Any = None, *, seconds_until_leaving: float = math.inf
    ) -> None:
        self.method = method
        self.peer = peer
        self.seconds_until_leaving = seconds_until_leaving
        """After this a stream of this peer should have gone elsewhere."""
        self._context = context

    def time_remaining(self) -> float | None:
        """Seconds until the caller gives up, None without a deadline."""
        return self._context.time_remaining() if self._context is not None else None

    @property
    def traceparent(self) -> str:
        """The caller's W3C trace context, empty when the call is not traced."""
        metadata = dict(self._context.invocation_metadata() or ()) if self._context is not None else {}
        return str(metadata.get("traceparent", ""))


CallOf = Callable[[Any], Call]
Parse = Callable[[bytes], Any]
"""Bytes to a message that keeps its field rules; raises InvalidRequest."""


class MeshServer:
    """Runs services under mutual TLS with authorisation, field rules, health and reflection."""

    def __init__(self, *, config: ServerConfig, identity: Identity, admits_strangers: bool = False) -> None:
        _check_grpc_version()
        self.config = config
        self.identity = identity
        self.address = ""
        self.audit = AuditLog(config.audit_log)
        self.limit = ConcurrencyLimit(config.concurrency)
        self._admits_strangers = admits_strangers
        self._trust = PeerTrust(DenyList(config.deny_list))
        self._identities = IdentityInterceptor(self._trust, self.audit, admits_strangers=admits_strangers)
        self._rows = dict(TABLE)
        self._servicers: dict[str, Any] = {}
        self._chores: list[asyncio.Task[None]] = []
        self._health = HealthServicer()
        self._server = grpc.aio.server(
            interceptors=server_interceptors(
                self._identities, self._rows, Quotas(config.quota), self.limit, self.audit
            ),
            options=[
                ("grpc.so_reuseport", int(config.shares_port)),
                *channel.KEEPALIVE_OPTIONS,
                *channel.MESSAGE_OPTIONS,
            ],
        )

    def add_service(
        self,
        descriptor: ServiceDescriptor,
        servicer: object,
        *,
        raw_methods: frozenset[str] = frozenset(),
        roles: Mapping[str, AbstractSet[str]] | None = None,
    ) -> None:
        """Offer a service: each RPC goes to the servicer's method of the same name as `(request, call)`.

        Methods in `raw_methods` get and return bytes, and check them by themselves. `roles` says by method who may
        call a service of your own; what it does not name is denied. Raises ConfigError for a service of the mesh.
        """
        if roles is not None:
            self._rows |= rows_for(descriptor.full_name, descriptor.methods_by_name, roles)
        age = self.config.stream_age_seconds
        handlers = {m.name: _handler(m, servicer, age, raw=m.name in raw_methods) for m in descriptor.methods}
        generic = grpc.method_handlers_generic_handler(descriptor.full_name, handlers)
        self._server.add_generic_rpc_handlers((generic,))
        self._servicers[descriptor.full_name] = servicer

    async def start(self) -> str:
        """Bind and serve; returns `host:port`. Raises ConfigError when the address cannot be bound."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            [*self._servicers, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME],
            self._server,
        )
        try:
            port = self._server.add_secure_port(self.config.address, self._credentials())
        except RuntimeError as error:
            raise ConfigError(f"Cannot listen on {self.config.address}: is the port taken?") from error
        await self._server.start()
        self.address = f"{self.config.address.rpartition(':')[0]}:{port}"
        await self._report_health()
        self.every(CHORE_SECONDS, self._renew_trust)
        self.every(CHORE_SECONDS, self._report_health)
        return self.address

    def every(self, seconds: float, work: Callable[[], Awaitable[object]]) -> None:
        """Do something again and again until the server ends; what it raises is logged."""
        self._chores.append(asyncio.create_task(_repeat(seconds, work)))

    def _credentials(self) -> grpc.ServerCredentials:
        return self.identity.server_credentials(admits_strangers=self._admits_strangers)

    async def _renew_trust(self) -> None:
        self._trust.refresh()
        self._identities.end_untrusted_streams()

    async def _report_health(self) -> None:
        able = {name: await _is_able(servicer) for name, servicer in self._servicers.items()}
        for name, is_able in able.items():
            await self.set_serving(name, is_able)
        await self.set_serving("", all(able.values()))

    async def set_serving(self, service: str, is_serving: bool) -> None:
        """Tell health checks whether a service can do its job."""
        states = health_pb2.HealthCheckResponse
        await self._health.set(service, states.SERVING if is_serving else states.NOT_SERVING)

    async def drain(self) -> None:
        """Stop in order: say NOT_SERVING, tell the streams, finish what is in flight, end."""
        await self._health.enter_graceful_shutdown()
        for chore in self._chores:
            chore.cancel()
        for servicer in self._servicers.values():
            if hasattr(servicer, "begin_drain"):
                servicer.begin_drain()
        await self._server.stop(self.config.drain_seconds)
        self.audit.close()

    async def run_until_signal(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await stop.wait()
        await self.drain()


def _check_grpc_version() -> None:
    if tuple(int(part) for part in grpc.__version__.split(".")[:2]) < LEAST_GRPC:
        raise ConfigError(
            f"Serving needs grpcio 1.85 or newer, this is {grpc.__version__}: older ones do not tell the TLS version of"
            " a connection. Run: pip install 'grpcio>=1.85'."
        )


async def _is_able(servicer: Any) -> bool:
    """Ask a servicer that can tell; one that fails to answer is not able."""
    if not hasattr(servicer, "is_able_to_serve"):
        return True
    try:
        return bool(await servicer.is_able_to_serve())
    except Exception as error:  # Whatever it is, it is not health.
        log.error("health_unknown", servicer=type(servicer).__name__, exc_info=error)
        return False


async def _repeat(seconds: float, work: Callable[[], Awaitable[object]]) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except Exception as error:  # A chore that fails once is done again.
            log.error("chore_failed", chore=getattr(work, "__qualname__", repr(work)), exc_info=error)


def _handler(method: MethodDescriptor, servicer: object, stream_age_seconds: float, *, raw: bool) -> Any:
    behaviour = getattr(servicer, method.name, None) or _not_offered(method)
    path = f"/{method.containing_service.full_name}/{method.name}"
    kind = ("stream" if method.client_streaming else "unary") + "_" + ("stream" if method.server_streaming else "unary")
    adapt = _adapt_stream if method.server_streaming else _adapt_unary
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    parse = None if raw or not hasattr(servicer, method.name) else _parser(method)
    response = None if raw else GetMessageClass(method.output_type).SerializeToString

    def call_of(context: Any) -> Call:
        peer = CURRENT_PEER.get()
        left = _seconds_until_leaving(peer, stream_age_seconds) if method.server_streaming else math.inf
        return Call(path, peer.spiffe_id, context, seconds_until_leaving=left)

    return make(adapt(behaviour, call_of, parse, method.client_streaming), None, response)


def _seconds_until_leaving(peer: Peer, stream_age_seconds: float) -> float:
    """A stream has a greatest age, and should have moved well before its peer's certificate ends."""
    if peer.not_after is None:
        return stream_age_seconds
    left = (peer.not_after - utc_now()).total_seconds()
    return max(0.0, min(stream_age_seconds, left - min(CERTIFICATE_MARGIN_SECONDS, 0.2 * left)))


def _not_offered(method: MethodDescriptor) -> Callable[..., Any]:
    error = Unimplemented(f"{method.name} is not offered yet by {method.containing_service.name} in this version.")

    async def refuse(_request: Any, _call: Call) -> Any:
        raise error

    async def refuse_stream(_request: Any, _call: Call) -> AsyncIterator[Any]:
        raise error
        yield

    return refuse_stream if method.server_streaming else refuse


def _adapt_unary(behaviour: Any, call_of: CallOf, parse: Parse | None, streaming: bool) -> Any:
    async def handle(request: Any, context: Any) -> Any:
        try:
            return await behaviour(_admitted(request, parse, streaming), call_of(context))
        except Exception as error:  # noqa: BLE001  # The edge: whatever it is becomes a status.
            if streaming:
                await _read_out(request)
            await abort(context, error)

    return handle


def _adapt_stream(behaviour: Any, call_of: CallOf, parse: Parse | None, streaming: bool) -> Any:
    async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            responses = behaviour(_admitted(request, parse, streaming), call_of(context))
            async for response in responses:
                yield response
        except Exception as error:  # noqa: BLE001  # The edge: whatever it is becomes a status.
            await abort(context, error)

    return handle


async def _read_out(requests: AsyncIterator[Any]) -> None:
    """Take what a refused client still sends: a write that fails there would hide why it was refused."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READ_OUT_SECONDS):
            async for _ in requests:
                pass


def _admitted(request: Any, parse: Parse | None, streaming: bool) -> Any:
    if parse is None:
        return request
    return _parsed(request, parse) if streaming else parse(request)


async def _parsed(requests: AsyncIterator[bytes], parse: Parse) -> AsyncIterator[Any]:
    async for raw in requests:
        yield parse(raw)


def _parser(method: MethodDescriptor) -> Parse:
    """Parse here and not in gRPC, which would answer UNKNOWN for bytes that are no message."""
    message_class = GetMessageClass(method.input_type)

    def parse(raw: bytes) -> Any:
        try:
            request = message_class.FromString(raw)
        except DecodeError as error:
            raise InvalidRequest(f"These bytes are no {method.input_type.full_name}.") from error
        rules.check(request)
        return request

    return parse


def announce(service: str, address: str) -> None:
    """Tell whoever started this process, on its standard output, that it serves and where."""
    sys.stdout.write(json.dumps({"event": "serving", "service": service, "address": address}) + "\n")
    sys.stdout.flush()
