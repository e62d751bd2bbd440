"""One trace from a trainer's step through Tamiyo, Kasmina and Urza, at a real OTLP receiver."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from esper_rpc.errors import ConfigError
from esper_rpc.telemetry.tracing import configure_tracing, context_of, current_traceparent
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor

# It attaches to an empty library, so that the kernel of the first germination is fetched while the step is traced.
TRAINING = """
import subprocess, sys, time, torch
from torch import nn
import esper_client

torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
x, y = torch.randn(16, 8), torch.randint(0, 2, (16,))
with esper_client.attach(model, optimizer, step_budget_ms=200) as session:
    def step():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        session.step(loss)
        time.sleep(0.002)
    while session.reasons["nominal"] < 3:
        step()
    subprocess.run([sys.executable, "-m", "esper_servers.cli", "urza", "seed"], check=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(seed.blueprint_id for seed in session.host.describe().seeds) and time.monotonic() < deadline:
        step()
    print(session.reasons, file=sys.stderr)
"""


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps spans by trace, as (service, name)."""

    def __init__(self):
        self.traces = defaultdict(set)

    def Export(self, request, context):
        for resource in request.resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                self.traces[span.trace_id].add((service, span.name.rpartition("/")[2]))
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def receiver():
    server = grpc.server(ThreadPoolExecutor(4))
    received = Receiver()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(received, server)
    received.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield received
    server.stop(None).wait()


def test_a_germination_is_one_trace_through_every_process(receiver, tmp_path):
    home = Home(tmp_path / "mesh")
    home.prepare()
    environ = {
        **os.environ,
        "ESPER_HOME": str(home.directory),
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}",
        "OTEL_TRACES_SAMPLER_ARG": "1.0",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "ESPER_PRIOR_WARM_UP_STEPS": "5",
    }
    with Supervisor(home, environ):
        trained = subprocess.run(
            [sys.executable, "-c", TRAINING], env=environ, capture_output=True, text=True, timeout=150
        )
        assert trained.returncode == 0, trained.stderr[-2000:]
    expected = {
        ("trainer", "esper.step"), ("tamiyo", "tamiyo.evaluate"), ("trainer", "kasmina.apply"), ("urza", "GetBlueprint"),
    }  # fmt: skip
    assert any(expected <= spans for spans in receiver.traces.values()), trained.stderr[-500:]


def test_without_an_endpoint_nothing_is_traced():
    configure_tracing("trainer", {})()
    assert current_traceparent() == ""


def test_a_share_out_of_range_is_named():
    with pytest.raises(ConfigError, match="OTEL_TRACES_SAMPLER_ARG = 2 is out of range; allowed is 0 to 1"):
        configure_tracing("x", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_SAMPLER_ARG": "2"})


@pytest.mark.parametrize(
    "text", ["", "nonsense", "00-00-00-00", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "\u2028" * 50]
)
def test_a_traceparent_that_is_nonsense_is_no_parent(text):
    from opentelemetry import trace

    assert not trace.get_current_span(context_of(text)).get_span_context().is_valid
