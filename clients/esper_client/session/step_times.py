from __future__ import annotations

from dataclasses import dataclass

from esper_rpc.ledger import StepTiming


@dataclass(slots=True)
class StepTimes:
    """When the parts of a step were done, in seconds of one clock."""

    begun: float
    built: float = 0.0
    sent: float = 0.0
    resumed: float = 0.0
    answered: float = 0.0
    verified: float = 0.0
    ended: float = 0.0

    @property
    def hook_seconds(self) -> float:
        """What the step cost the loop."""
        return self.ended - self.begun - self._away

    @property
    def exchange_seconds(self) -> float:
        """How long the step waited for its answer."""
        return self.answered - self.built - self._away

    @property
    def apply_seconds(self) -> float:
        """How long the model was worked on."""
        return self.ended - self.answered

    def timing(self, server_us: float) -> StepTiming:
        """Account for the step; `server_us` is what Tamiyo says that it took."""
        return StepTiming(
            build=(self.built - self.begun) * 1e6,
            exchange=self.exchange_seconds * 1e6,
            server=server_us,
            verify=(self.verified - self.answered) * 1e6,
            apply=(self.ended - self.verified) * 1e6,
            total=self.hook_seconds * 1e6,
        )

    @property
    def _away(self) -> float:
        # What the loop did between the halves of a step is its own.
        return self.resumed - self.sent
