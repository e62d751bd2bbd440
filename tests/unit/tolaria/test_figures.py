"""The figures of requirements 3.3 to 3.5 stand where nothing else is set."""

from __future__ import annotations

from esper_servers.optim.controller import JOINING_SHARE, LearningRateConfig
from esper_servers.tolaria.aggregation.aggregator import AggregationConfig
from esper_servers.tolaria.aggregation.conflicts import EPSILON
from esper_servers.tolaria.emergency.levels import CONSERVATIVE, ELEVATED, HALT, NOTICE, RESPONSES
from esper_servers.tolaria.metrics.step_metrics import TolariaConfig
from esper_servers.tolaria.rollback.rollback import CONSERVATIVE_SECONDS, RollbackConfig
from esper_servers.tolaria.state.snapshot_cache import CacheConfig
from esper_servers.tolaria.train_step import TrainStepConfig


def test_a_rollback_has_the_budgets_of_the_requirements():
    config = RollbackConfig()
    assert (config.prepare_ms, config.commit_ms, config.confirm_ms) == (150, 250, 100)
    assert (config.full_prepare_ms, config.full_commit_ms, config.full_seconds, config.quorum) == (2000, 5000, 12, 0.66)
    assert CONSERVATIVE_SECONDS == 0.5
    assert CacheConfig().snapshots == 5


def test_each_level_of_an_emergency_is_answered_in_its_time():
    assert [RESPONSES[level].within_ms for level in (NOTICE, ELEVATED, CONSERVATIVE, HALT)] == [5000, 2000, 500, 100]
    assert [level for level, response in RESPONSES.items() if response.halts] == [HALT]
    assert [level for level, response in RESPONSES.items() if response.is_conservative] == [CONSERVATIVE, HALT]


def test_learning_rates_have_the_figures_of_the_requirements():
    config = LearningRateConfig()
    assert (config.least_rate, config.warm_up_epochs, config.warm_up_factor, config.snapshots) == (1e-6, 10, 0.01, 1000)
    assert (config.breaker.failures, JOINING_SHARE) == (3, 0.1)


def test_gradients_conflict_and_are_limited_as_the_requirements_say():
    config = AggregationConfig()
    assert (config.threshold, config.max_norm, EPSILON) == (-0.5, 10.0, 1e-8)
    assert TrainStepConfig().max_gradient_norm == 10.0


def test_a_step_is_enriched_and_a_seed_host_has_five_milliseconds():
    config = TolariaConfig()
    assert (config.step_enrichment_enabled, config.kasmina_budget_ms) == (True, 5.0)
