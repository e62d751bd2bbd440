from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

LARGEST = 1000


class Request(Protocol):
    """Asks for a page."""

    page_token: str


class Page(Protocol):
    """An answer that may not be the last."""

    next_page_token: str


Asked = TypeVar("Asked", bound=Request)
Answer = TypeVar("Answer", bound=Page)


async def pages(ask: Callable[[Asked], Awaitable[Answer]], request: Asked) -> list[Answer]:
    """Ask for one page after the other until there are no more."""
    found: list[Answer] = []
    while not found or found[-1].next_page_token:
        request.page_token = found[-1].next_page_token if found else ""
        found.append(await ask(request))
    return found
