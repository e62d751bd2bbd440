"""What a telemetry packet says, as gauges of the process."""

from __future__ import annotations

import itertools

from prometheus_client import REGISTRY

from esper_rpc.proto.leyline.v1 import MetricPoint, TelemetryPacket
from esper_rpc.telemetry import record_packets

NAME = "packets.as_metrics"
GAUGE = "esper_packets_as_metrics"


def record(value, name=NAME, **attributes):
    record_packets([TelemetryPacket(metrics=[MetricPoint(name=name, value=value, attributes=attributes)])])


def shown(name=GAUGE, **labels):
    return REGISTRY.get_sample_value(name, labels)


def test_each_set_of_attributes_shows_its_newest_value():
    for value in (1.0, 2.0):
        record(value, seed_id="seed-0")
        record(value + 10, seed_id="seed-1")
        record(value + 20, name="packets.alone")
    assert (shown(seed_id="seed-0"), shown(seed_id="seed-1"), shown("esper_packets_alone")) == (2.0, 12.0, 22.0)


def test_a_seed_that_is_told_of_no_more_keeps_its_last_value():
    record(3.0, seed_id="gone")
    record(4.0, seed_id="stays")
    assert shown(seed_id="gone") == 3.0


def test_attributes_in_any_order_are_those_of_one_gauge():
    values = dict(zip("abcdefgh", "ijklmnop", strict=True))
    # A map of that many comes in another order when it was filled in another one.
    orders = list(itertools.islice(itertools.permutations(values), 200))
    for number, order in enumerate(orders):
        record(number, name="packets.many", **{name: values[name] for name in order})
    assert shown("esper_packets_many", **values) == len(orders) - 1
