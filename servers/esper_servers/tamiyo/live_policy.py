from __future__ import annotations

from pathlib import Path

from esper_servers.policy import checkpoint
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import PriorConfig

from .giving_way import giving_way
from .pipeline import StepPipeline
from .plans.plan_switch import PlanSwitch


class LivePolicy:
    """How another policy comes in the place of the one that steps are decided by."""

    def __init__(self, pipeline: StepPipeline, plans: PlanSwitch, prior: PriorConfig) -> None:
        self._pipeline = pipeline
        self._plans = plans
        self._prior = prior
        self._shipped = pipeline.policy

    def load(self, path: Path | None) -> Policy:
        """Make a policy fit to serve, without a path the shipped one; takes some 50 ms, on a thread.

        Raises CheckpointRejected and OSError.
        """
        with giving_way():
            policy = self._plans.fit(checkpoint.load(path, self._prior) if path else self._shipped)
            for run in self._pipeline.runs.all():
                policy.warm_up(run.graph.inputs)
        return policy

    def take_up(self, policy: Policy) -> None:
        """Serve it from the next step on; call it on the loop."""
        self._plans.follow(policy)
        self._pipeline.take_up(policy)
