from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Generic, TypeVar

from .client import MeshClient
from .event_loop import LoopThread

Client = TypeVar("Client", bound=MeshClient)
Result = TypeVar("Result")


class Blocking(Generic[Client]):
    """Calls an asyncio client from ordinary code, for scripts and notebooks.

    `with Blocking(lambda: UrzaClient(address, identity=me)) as urza: urza.call(lambda c: c.get_extras(request))`
    """

    def __init__(self, open_client: Callable[[], Client]) -> None:
        self._thread = LoopThread("esper-blocking")

        async def make() -> Client:
            return open_client()

        self._client = self._thread.run(make())

    def call(self, use: Callable[[Client], Coroutine[Any, Any, Result]]) -> Result:
        """Await one call; raises what the client raises."""
        return self._thread.run(use(self._client))

    def iterate(self, use: Callable[[Client], Any]) -> Iterator[Any]:
        """Yield from a streaming call."""
        stream = use(self._client).__aiter__()
        while True:
            try:
                yield self._thread.run(stream.__anext__())
            except StopAsyncIteration:
                return

    def close(self) -> None:
        """Close the client and its loop."""
        self._thread.run(self._client.close())
        self._thread.stop()

    def __enter__(self) -> Blocking[Client]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
