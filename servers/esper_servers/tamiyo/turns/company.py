from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from .finishing import finished

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Company(Generic[Question, Answer]):
    """Steps that share a turn: what they ask is answered at once, when every member has asked or left.

    Nobody waits for a member that leaves without asking, whatever the reason; each asks once at most. Used on one event
    loop.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._present = size
        self._asked: dict[asyncio.Future[Answer], Question] = {}
        self._answer: Callable[[Sequence[Question]], Sequence[Answer | Exception]]
        self._blamed: set[object] = set()

    async def ask(
        self, question: Question, answer: Callable[[Sequence[Question]], Sequence[Answer | Exception]]
    ) -> Answer:
        """Wait for the others, and then for the answer, which the last member to ask computes for all of them.

        Raises what stands in place of this one's answer. Who asked stays to the end though its caller goes away.
        """
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asked[answered] = question
        self._answer = answer
        self._answer_if_complete()
        try:
            return await finished(answered)
        finally:
            self._asked.pop(answered, None)

    def leave(self) -> bool:
        """Go; returns whether nobody is left."""
        self._present -= 1
        self._answer_if_complete()
        return self._present == 0

    def is_first_to_blame(self, blamed: object) -> bool:
        """Whether no other member said so of the same: what fails for all of them failed once."""
        is_first = blamed not in self._blamed
        self._blamed.add(blamed)
        return is_first

    def _answer_if_complete(self) -> None:
        if not self._asked or len(self._asked) < self._present:
            return
        asked, self._asked = self._asked, {}
        try:
            answers = self._answer(list(asked.values()))
        except Exception as error:  # noqa: BLE001  # Whatever happens, nobody is to wait for ever.
            answers = [error] * len(asked)
        for answered, answer in zip(asked, answers, strict=True):
            if isinstance(answer, Exception):
                answered.set_exception(answer)
            else:
                answered.set_result(answer)
