from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

from google.rpc import error_details_pb2, status_pb2

from esper_rpc.proto import leyline
from esper_rpc.proto.leyline import v1 as leyline_v1
from esper_rpc.proto.tamiyo.v1 import EvaluateStepRequest, EvaluateStepsRequest, Step, StepStatus

GOLDEN = Path(__file__).parent / "leyline_numbers.json"


def leyline_files():
    names = [m.name for m in pkgutil.iter_modules(leyline_v1.__path__) if m.name.endswith("_pb2")]
    return [importlib.import_module(f"{leyline.__name__}.v1.{name}").DESCRIPTOR for name in names]


def field_facts(field):
    kind = field.message_type or field.enum_type
    return [field.name, field.type, kind.full_name if kind else "", bool(field.is_repeated)]


def numbers():
    messages, enums = {}, {}
    for file in leyline_files():
        for name, message in file.message_types_by_name.items():
            messages[name] = {str(f.number): field_facts(f) for f in message.fields}
            enums |= {f"{name}.{e.name}": {v.name: v.number for v in e.values} for e in message.enum_types}
        enums |= {name: {v.name: v.number for v in e.values} for name, e in file.enum_types_by_name.items()}
    return {"messages": messages, "enums": enums}


def test_no_number_name_or_type_of_leyline_has_changed():
    assert numbers() == json.loads(GOLDEN.read_text())


def test_every_enum_begins_with_an_unspecified_zero():
    zeros = {name: [v for v, n in values.items() if n == 0] for name, values in numbers()["enums"].items()}
    assert all(len(names) == 1 and names[0].endswith("_UNSPECIFIED") for names in zeros.values()), zeros


def test_a_step_has_the_same_bytes_on_the_stream_and_in_the_unary_call():
    step = Step(run_id="r", sequence=7, budget_us=5000)
    assert EvaluateStepRequest(step=step).SerializeToString() == EvaluateStepsRequest(step=step).SerializeToString()


def test_the_in_band_status_reads_as_a_google_rpc_status():
    theirs = status_pb2.Status(code=3, message="no")
    theirs.details.add().Pack(error_details_pb2.ErrorInfo(reason="R", domain="esper"))
    ours = StepStatus.FromString(theirs.SerializeToString())
    assert (ours.code, ours.message, ours.details[0].type_url) == (3, "no", "type.googleapis.com/google.rpc.ErrorInfo")
    assert status_pb2.Status.FromString(ours.SerializeToString()) == theirs
