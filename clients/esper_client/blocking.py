from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from typing import Concatenate, Generic, ParamSpec, Self, TypeVar

from esper_rpc.identity import Identity

from .client import IdentityClient, KasminaClient, MeshClient, TamiyoClient, TolariaClient, UrzaClient
from .event_loop import LoopThread

Client = TypeVar("Client", bound=MeshClient)
Request = TypeVar("Request")
Result = TypeVar("Result")
P = ParamSpec("P")
_END = object()


class BlockingClient(Generic[Client]):
    """An asyncio client for ordinary code: scripts, and notebooks, where a loop runs already.

    Each method is that of the asyncio client, and raises what that raises. What streams is an iterator.
    """

    client: type[Client]

    def __init__(self, address: str, *, identity: Identity) -> None:
        self._thread = LoopThread("esper-blocking")

        async def make() -> Client:
            return self.client(address, identity=identity)

        self._client = self._thread.run(make())

    def close(self) -> None:
        """Close the client and its loop."""
        self._thread.run(self._client.close())
        self._thread.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _iterate(self, open_stream: Callable[[], AsyncIterator[Result]]) -> Iterator[Result]:
        async def make() -> AsyncIterator[Result]:
            return open_stream()

        async def following() -> Result | object:
            return await anext(stream, _END)

        stream = self._thread.run(make())
        try:
            while (item := self._thread.run(following())) is not _END:
                yield item  # type: ignore[misc]  # Not the end, so a result.
        finally:
            self._thread.run(_close(stream))


async def _close(stream: AsyncIterator[object]) -> None:
    if hasattr(stream, "aclose"):
        await stream.aclose()


async def _awaitable(items: Iterable[Request]) -> AsyncIterator[Request]:
    """Read an iterable beside the loop: it may take its time."""
    iterator = iter(items)
    while (item := await asyncio.to_thread(next, iterator, _END)) is not _END:
        yield item  # type: ignore[misc]  # Not the end, so a request.


def _unary(
    method: Callable[Concatenate[Client, P], Coroutine[object, object, Result]],
) -> Callable[Concatenate[BlockingClient[Client], P], Result]:
    @functools.wraps(method)
    def blocking(self: BlockingClient[Client], /, *args: P.args, **kwargs: P.kwargs) -> Result:
        return self._thread.run(method(self._client, *args, **kwargs))

    return blocking


def _streaming(
    method: Callable[Concatenate[Client, P], AsyncIterator[Result]],
) -> Callable[Concatenate[BlockingClient[Client], P], Iterator[Result]]:
    @functools.wraps(method)
    def blocking(self: BlockingClient[Client], /, *args: P.args, **kwargs: P.kwargs) -> Iterator[Result]:
        return self._iterate(lambda: method(self._client, *args, **kwargs))

    return blocking


def _uploading(
    method: Callable[[Client, AsyncIterable[Request]], Coroutine[object, object, Result]],
) -> Callable[[BlockingClient[Client], Iterable[Request]], Result]:
    @functools.wraps(method)
    def blocking(self: BlockingClient[Client], requests: Iterable[Request], /) -> Result:
        return self._thread.run(method(self._client, _awaitable(requests)))

    return blocking


def _conversing(
    method: Callable[[Client, AsyncIterable[Request]], AsyncIterator[Result]],
) -> Callable[[BlockingClient[Client], Iterable[Request]], Iterator[Result]]:
    @functools.wraps(method)
    def blocking(self: BlockingClient[Client], requests: Iterable[Request], /) -> Iterator[Result]:
        return self._iterate(lambda: method(self._client, _awaitable(requests)))

    return blocking


class BlockingIdentityClient(BlockingClient[IdentityClient]):
    """`IdentityClient` without asyncio."""

    client = IdentityClient
    renew_certificate = _unary(IdentityClient.renew_certificate)
    enroll = _unary(IdentityClient.enroll)


class BlockingKasminaClient(BlockingClient[KasminaClient]):
    """`KasminaClient` without asyncio."""

    client = KasminaClient
    apply_command = _unary(KasminaClient.apply_command)
    export_seed_states = _unary(KasminaClient.export_seed_states)
    advance_alpha = _unary(KasminaClient.advance_alpha)
    finalize_step = _unary(KasminaClient.finalize_step)
    update_epoch = _unary(KasminaClient.update_epoch)
    watch_seed_events = _streaming(KasminaClient.watch_seed_events)
    get_status = _unary(KasminaClient.get_status)
    validate_parameters = _unary(KasminaClient.validate_parameters)
    get_rollback_payload = _unary(KasminaClient.get_rollback_payload)
    terminate_seed = _unary(KasminaClient.terminate_seed)
    emergency_cleanup = _unary(KasminaClient.emergency_cleanup)


class BlockingTamiyoClient(BlockingClient[TamiyoClient]):
    """`TamiyoClient` without asyncio."""

    client = TamiyoClient
    open_run = _unary(TamiyoClient.open_run)
    close_run = _unary(TamiyoClient.close_run)
    evaluate_steps = _conversing(TamiyoClient.evaluate_steps)
    evaluate_step = _unary(TamiyoClient.evaluate_step)
    evaluate_epoch = _unary(TamiyoClient.evaluate_epoch)
    ingest_policy_update = _unary(TamiyoClient.ingest_policy_update)
    get_policy = _unary(TamiyoClient.get_policy)
    rollback_policy = _unary(TamiyoClient.rollback_policy)
    request_pause = _unary(TamiyoClient.request_pause)
    list_pause_grants = _unary(TamiyoClient.list_pause_grants)
    set_conservative_mode = _unary(TamiyoClient.set_conservative_mode)
    get_status = _unary(TamiyoClient.get_status)
    ack_field_report = _unary(TamiyoClient.ack_field_report)
    list_field_reports = _unary(TamiyoClient.list_field_reports)
    publish_history = _unary(TamiyoClient.publish_history)
    explain_decision = _unary(TamiyoClient.explain_decision)
    replay_decision = _unary(TamiyoClient.replay_decision)
    list_step_dumps = _unary(TamiyoClient.list_step_dumps)
    list_dumped_steps = _unary(TamiyoClient.list_dumped_steps)


class BlockingTolariaClient(BlockingClient[TolariaClient]):
    """`TolariaClient` without asyncio."""

    client = TolariaClient
    get_status = _unary(TolariaClient.get_status)
    create_checkpoint = _unary(TolariaClient.create_checkpoint)
    rollback = _unary(TolariaClient.rollback)
    signal_emergency = _unary(TolariaClient.signal_emergency)
    watch_emergencies = _streaming(TolariaClient.watch_emergencies)
    watch_metrics = _streaming(TolariaClient.watch_metrics)


class BlockingUrzaClient(BlockingClient[UrzaClient]):
    """`UrzaClient` without asyncio."""

    client = UrzaClient
    get_blueprint = _unary(UrzaClient.get_blueprint)
    get_extras = _unary(UrzaClient.get_extras)
    batch_get_extras = _unary(UrzaClient.batch_get_extras)
    list_blueprints = _unary(UrzaClient.list_blueprints)
    save_blueprint = _unary(UrzaClient.save_blueprint)
    upload_kernel = _uploading(UrzaClient.upload_kernel)
    fetch_kernel = _streaming(UrzaClient.fetch_kernel)
    prefetch = _unary(UrzaClient.prefetch)
    watch_catalog = _streaming(UrzaClient.watch_catalog)
