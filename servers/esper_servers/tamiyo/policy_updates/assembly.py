from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from esper_rpc.envelope import Keyring
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import PriorConfig
from esper_servers.tamiyo.aside import Aside
from esper_servers.tamiyo.breakers import POLICY_UPDATES
from esper_servers.tamiyo.live_policy import LivePolicy
from esper_servers.tamiyo.pipeline import StepPipeline
from esper_servers.tamiyo.plans.plan_switch import PlanSwitch

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
    on_taken_up: Callable[[], None] = lambda: None,
) -> PolicyUpdates:
    """Let the policy of a pipeline be updated; files of policies are kept in the directory.

    `on_taken_up` is called when another policy has become the live one.
    """
    live, shipped = LivePolicy(pipeline, plans, prior), pipeline.policy

    def take_up(policy: Policy) -> None:
        live.take_up(policy)
        on_taken_up()

    start = Lineage((Entry(shipped.version),), number_of(shipped.version))
    updates = PolicyUpdates(
        store=PolicyStore(directory, start),
        admission=Admission(
            keyring=keyring, clock_ns=pipeline.clock_ns, journal=journal, registries=registries, prior=prior
        ),
        aside=aside,
        shadow=Shadow(aside, prior),
        load=live.load,
        take_up=take_up,
        breaker=pipeline.breakers[POLICY_UPDATES],
    )
    pipeline.shadow, pipeline.on_inference_lost = updates.shadow, updates.distrust
    return updates
