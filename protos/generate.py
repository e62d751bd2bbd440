"""Generate esper_rpc/proto from protos/. With --check, say whether the checked-in code is what protos/ gives.

Run it with the pinned generator only (`make proto`): the generated code carries the generator's version.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
TARGET = ROOT / "esper_rpc" / "proto"


def compile_protos(out: Path) -> None:
    """Run protoc over every file below protos/esper."""
    well_known = resources.files("grpc_tools") / "_proto"
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("esper/**/*.proto"))
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", f"-I{well_known}", *outputs, *sources]
    plugins = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, check=True, env={**os.environ, "PATH": plugins})


def rewrite_imports(text: str) -> str:
    """Move the Python import root from esper to esper_rpc.proto; wire and descriptor names stay."""
    text = re.sub(r"\b(from|import) esper\.", r"\1 esper_rpc.proto.", text)
    text = re.sub(r"(BuildTopDescriptorsAndMessages\(DESCRIPTOR, ')esper\.", r"\1esper_rpc.proto.", text)
    text = re.sub(r"^import esper_rpc\.proto\.([\w.]+)$", r"import esper_rpc.proto.\1", text, flags=re.MULTILINE)
    return re.sub(r"(?<![\w.\"'/])esper\.(\w+\.v1\.\w+_pb2)", r"esper_rpc.proto.\1", text)


def is_empty_service_module(path: Path) -> bool:
    """Tell whether a _pb2_grpc file belongs to a proto without a service."""
    return "_pb2_grpc.py" in path.name and "Stub" not in path.read_text()


def reexports(package: Path) -> str:
    """Write the __init__ that re-exports the public names of a package's modules."""
    lines = []
    for stub in sorted(package.glob("*_pb2.pyi")):
        names = re.findall(
            r"^class (?!_)(\w+)\(|^(\w+): (?:\w+\.ValueType|_extension)", stub.read_text(), flags=re.MULTILINE
        )
        classes = [first for first, _ in names if first]
        body = "\n".join(f"    {name} as {name}," for name in sorted(set(classes)))
        if body:
            lines.append(f"from .{stub.stem} import (\n{body}\n)")
    return '"""Generated. Do not edit."""\n\n' + "\n".join(lines) + "\n"


def generate(out: Path) -> None:
    """Fill `out` with the packages."""
    with tempfile.TemporaryDirectory() as scratch:
        compile_protos(Path(scratch))
        for path in sorted((Path(scratch) / "esper").glob("**/*.py*")):
            if is_empty_service_module(path):
                continue
            target = out / path.relative_to(Path(scratch) / "esper")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(rewrite_imports(path.read_text()))
    for package in sorted(out.glob("*/v1")):
        (package / "__init__.py").write_text(reexports(package))
        (package.parent / "__init__.py").write_text("")
    (out / "__init__.py").write_text('"""Generated from protos/. Do not edit."""\n')


def differences(left: Path, right: Path) -> list[str]:
    """Name the files that are not the same in both folders."""
    names = {
        p.relative_to(base) for base in (left, right) for p in base.glob("**/*.py*") if "__pycache__" not in p.parts
    }
    return sorted(str(n) for n in names if _content(left / n) != _content(right / n))


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def main() -> int:
    """Generate, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 when something differs")
    if not parser.parse_args().check:
        shutil.rmtree(TARGET, ignore_errors=True)
        generate(TARGET)
        return 0
    with tempfile.TemporaryDirectory() as fresh:
        generate(Path(fresh))
        stale = differences(Path(fresh), TARGET)
    for name in stale:
        print(f"stale: esper_rpc/proto/{name}; run `make proto`")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
