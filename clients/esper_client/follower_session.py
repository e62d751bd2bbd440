from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from esper_rpc.proto.leyline.v1 import CommandOutcome

from .quiet_session import QuietSession
from .session import Loss, read_loss
from .session.state import read_state, write_state


class FollowingHost(Protocol):
    """The seeds of a rank that does as the first one did."""

    def step(self, loss: float, global_step: int) -> None:
        """End a training step together with the other ranks; raises OutOfStep."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return seeds, stages, alphas and optimizers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...

    def export(self) -> Any:
        """Return the model without the mesh."""
        ...


class FollowerSession(QuietSession):
    """The session of every rank but the first: the same calls, and no connection. Every rank must call `step`.

    What became of commands only the first rank tells.
    """

    def __init__(self, host: FollowingHost, run_id: str) -> None:
        super().__init__(run_id)
        self.host = host
        self._loss: Loss | None = None
        self.on_close: Callable[[], None] = lambda: None
        """Called when the session is closed."""

    def step(self, loss: Loss, **options: Any) -> list[CommandOutcome]:
        """End a training step as the first rank does; raises OutOfStep when the ranks have come apart."""
        self.begin_step(loss, **options)
        return self.finish_step()

    def begin_step(
        self,
        loss: Loss,
        *,
        samples: int | None = None,
        gradient_norm: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Keep the loss until `finish_step`."""
        if self._loss is not None:
            self.finish_step()
        self._loss = loss

    def finish_step(self) -> list[CommandOutcome]:
        """End the step that was begun."""
        loss, self._loss = self._loss, None
        if loss is None:
            return []
        self.global_step += 1
        number = math.nan
        # Whatever was given for a loss, the other ranks wait.
        with contextlib.suppress(Exception):
            number = read_loss(loss)
        self.host.step(number, self.global_step)
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside the model and its optimizer: the same on every rank."""
        return write_state(self, self.host.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; every rank must."""
        read_state(self, self.host, state)

    def export(self) -> Any:
        """Return the model without the mesh."""
        return self.host.export()

    def close(self) -> None:
        """Follow the first rank no more. The model stays as it is."""
        self.on_close()
