from __future__ import annotations

import copy
from typing import Any, Self

from torch import nn

from esper_servers.kasmina.learning_rate import LearningRateAuthority


class DetachedSession:
    """What a loop gets when there is no mesh: the same calls, and nothing happens but what the loop asked for."""

    is_connected = False
    halted = False
    epoch = 0

    def __init__(self, model: nn.Module, learning_rate: LearningRateAuthority | None = None) -> None:
        self._model = model
        self._learning_rate = learning_rate

    def hold(self, timeout: float | None = None) -> bool:
        """Go on at once: nobody halts it."""
        return True

    def step(self, *_: Any, **__: Any) -> list[Any]:
        """Let schedules go on."""
        return self.finish_step()

    def end_epoch(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def begin_step(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def finish_step(self) -> list[Any]:
        """Let schedules go on."""
        if self._learning_rate is not None:
            self._learning_rate.step()
        return []

    def start_epoch(self, epoch: int) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return where schedules are."""
        return {} if self._learning_rate is None else {"host": {"learning_rate": self._learning_rate.state_dict()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore where schedules were."""
        if self._learning_rate is not None and state:
            self._learning_rate.load_state_dict(state["host"]["learning_rate"])

    def export(self) -> nn.Module:
        """Return a copy of the model."""
        return copy.deepcopy(self._model)

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
