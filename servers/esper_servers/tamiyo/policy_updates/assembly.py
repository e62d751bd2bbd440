from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from esper_rpc.envelope import Keyring
from esper_servers.policy import checkpoint
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import PriorConfig
from esper_servers.tamiyo.aside import Aside
from esper_servers.tamiyo.breakers import POLICY_UPDATES
from esper_servers.tamiyo.giving_way import giving_way
from esper_servers.tamiyo.pipeline import StepPipeline
from esper_servers.tamiyo.plan_switch import PlanSwitch

from .shadow import Shadow
from .store import Entry, Lineage, PolicyStore
from .updates import Admission, PolicyUpdates
from .verification import number_of


def updates_of(
    pipeline: StepPipeline,
    *,
    directory: Path,
    journal: Path,
    keyring: Keyring,
    prior: PriorConfig,
    plans: PlanSwitch,
    aside: Aside,
    registries: Callable[[], Mapping[str, str]] = dict,
) -> PolicyUpdates:
    """Let the policy of a pipeline be updated; files of policies are kept in the directory."""
    shipped = pipeline.policy

    def load(path: Path | None) -> Policy:
        with giving_way():
            policy = plans.fit(checkpoint.load(path, prior) if path else shipped)
            for run in pipeline.runs.all():
                policy.warm_up(run.graph.inputs)
        return policy

    def take_up(policy: Policy) -> None:
        plans.follow(policy)
        pipeline.take_up(policy)

    start = Lineage((Entry(shipped.version),), number_of(shipped.version))
    updates = PolicyUpdates(
        store=PolicyStore(directory, start),
        admission=Admission(
            keyring=keyring, clock_ns=pipeline.clock_ns, journal=journal, registries=registries, prior=prior
        ),
        aside=aside,
        shadow=Shadow(aside, prior),
        load=load,
        take_up=take_up,
        breaker=pipeline.breakers[POLICY_UPDATES],
    )
    pipeline.shadow, pipeline.on_inference_lost = updates.shadow, updates.distrust
    return updates
