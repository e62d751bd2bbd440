from __future__ import annotations

import copy
from typing import Any

from torch import nn

from esper_client.quiet_session import QuietSession
from esper_client.session.state import read_state, write_state
from esper_servers.kasmina.learning_rate import LearningRateAuthority


class DetachedSession(QuietSession):
    """What a loop gets when there is no mesh: the same calls, and nothing happens but what the loop asked for."""

    def __init__(self, model: nn.Module, learning_rate: LearningRateAuthority | None = None, run_id: str = "") -> None:
        super().__init__(run_id)
        self._model = model
        self._learning_rate = learning_rate
        self._is_in_step = False

    def step(self, *_: Any, **__: Any) -> list[Any]:
        """Let schedules go on."""
        self.begin_step()
        return self.finish_step()

    def end_epoch(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def begin_step(self, *_: Any, **__: Any) -> None:
        """Note that a step ends."""
        if self._is_in_step:
            self.finish_step()
        self._is_in_step = True

    def finish_step(self) -> list[Any]:
        """Let schedules go on."""
        if self._is_in_step:
            self._is_in_step = False
            self.global_step += 1
            if self._learning_rate is not None:
                self._learning_rate.step()
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return where the run and its schedules are; a session with a mesh goes on from it too."""
        rates = {} if self._learning_rate is None else {"learning_rate": self._learning_rate.state_dict()}
        return write_state(self, rates)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore where the run and its schedules were."""
        read_state(self, _Rates(self._learning_rate), state)

    def export(self) -> nn.Module:
        """Return a copy of the model."""
        return copy.deepcopy(self._model)


class _Rates:
    """What is left of a seed host without seeds."""

    def __init__(self, learning_rate: LearningRateAuthority | None) -> None:
        self._learning_rate = learning_rate

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._learning_rate is not None and "learning_rate" in state:
            self._learning_rate.load_state_dict(state["learning_rate"])
