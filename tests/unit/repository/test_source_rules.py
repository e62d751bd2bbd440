from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from esper_rpc.proto.leyline.v1 import MessagePriority

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = [ROOT / "esper_rpc", ROOT / "clients" / "esper_client", ROOT / "servers" / "esper_servers"]
SOURCES = sorted(
    path for package in PACKAGES for path in package.rglob("*.py") if "proto" not in path.relative_to(package).parts
)
ENUM_BASES = {"Enum", "IntEnum", "StrEnum", "Flag", "IntFlag"}


def local_enums(source: str) -> list[str]:
    classes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef))
    return [cls.name for cls in classes if any(ast.unparse(base).split(".")[-1] in ENUM_BASES for base in cls.bases)]


def test_the_enum_guard_sees_a_local_enum():
    assert local_enums("import enum\nclass Stage(enum.IntEnum):\n    A = 1") == ["Stage"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_local_enum_stands_in_for_a_leyline_enum(path):
    assert local_enums(path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_arrives_can_be_unpickled(path):
    names = {name for node in ast.walk(ast.parse(path.read_text())) for name in imported_names(node)}
    assert not names & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_priority_is_one_of_leyline(path):
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    told = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "priority"]
    names = {value.value for value in told if isinstance(value, ast.Constant)}
    assert {f"MESSAGE_PRIORITY_{name}" for name in names} <= set(MessagePriority.keys())


def imported_names(node):
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [node.module.split(".")[0]] if isinstance(node, ast.ImportFrom) and node.module else []


def test_the_runtime_floor_accepts_the_generated_code():
    stamp = re.search(r"Protobuf Python Version: (\S+)", (ROOT / "esper_rpc/proto/tamiyo/v1/step_pb2.py").read_text())
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    floor = next(re.search(r">=([\d.]+)", line)[1] for line in dependencies if line.startswith("protobuf"))
    assert tuple(map(int, floor.split("."))) >= tuple(map(int, stamp[1].split(".")))


def test_importing_the_sdk_loads_no_torch():
    script = "import sys, esper_client; print(sorted(m for m in ('torch', 'sqlalchemy', 'typer') if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
