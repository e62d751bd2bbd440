"""Building the compiled plan: an AOTInductor package for any number of nodes, made beside the serving process.

`python -m esper_servers.policy.plan_package --output FILE` builds one. It is native code: it is built
where it is served, kept below the mesh's directory, and never taken from the wire.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import BlueprintDescriptor

from . import sample, schema
from .compiled_plan import plan_inputs
from .dense_plan import DensePlan
from .edge_scores import EdgeScores
from .graph import BlueprintCandidate, GraphInputs, RunGraph
from .native_package import NativePackage
from .network import PolicyNetwork

FORM = 4
"""Of DensePlan: a package of another form is not looked at."""
MOST_NODES = 1024
NICENESS = 19
_OPTIONS = {
    # Made for later builds, 140 MB each, and kept where others can guess whatever the cache directory is.
    "aot_inductor.precompile_headers": False,
    "cpp_cache_precompile_headers": False,
}


def package_name() -> str:
    """Name the file for this machine: torch and the CPU decide about the code. Any policy's weights fit into it."""
    machine = f"{FORM} {torch.__version__} {torch.backends.cpu.get_cpu_capability()} {_cpu_flags()}"
    return f"{hashlib.sha256(machine.encode()).hexdigest()[:32]}.pt2"


def has_compiler() -> bool:
    """Whether this machine can build a package."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def build(output: Path) -> None:
    """Compile the plan of a network and write its package; a minute or two of one core."""
    from torch._inductor import aoti_compile_and_package

    torch.set_num_threads(1)  # As it is served: the code holds no parallel loops then.
    with torch.no_grad():
        network = PolicyNetwork().eval()
        example, shapes = (plan_inputs(_example(), EdgeScores(network)),), (_dynamic_shapes(),)
        program = torch.export.export(DensePlan(network), example, dynamic_shapes=shapes, strict=False)
    # AOTInductor wants this ending.
    scratch = output.with_suffix(f".{os.getpid()}.pt2")
    aoti_compile_and_package(program, package_path=str(scratch), inductor_configs={**_OPTIONS})
    scratch.replace(output)


def load(path: Path, network: PolicyNetwork) -> NativePackage:
    """Load a package and give it these weights, in some 30 ms; raises ConfigError when it is none."""
    # torch._inductor.aoti_load_package would start compilers to name the CPU again, for a second and a half.
    try:
        return NativePackage(path, DensePlan(network).state_dict())
    except (zipfile.BadZipFile, AttributeError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{path} is not a compiled plan: {error}; remove it.") from error


def _example() -> GraphInputs:
    """A graph with different numbers of nodes, of which none is special."""
    sites = sample.sample_sites()
    blueprints = [BlueprintCandidate(blueprint_id=f"b{i}", descriptor=BlueprintDescriptor()) for i in range(5)]
    return RunGraph(sample.sample_topology(), sites, sample.sample_seeds(), blueprints).inputs


def _dynamic_shapes() -> list[dict[int, Any]]:
    nodes = {k: Dim(f"{k}_nodes", min=2, max=MOST_NODES) for k in schema.NODE_TYPES if k != "global"}
    features = [{0: nodes[kind]} if kind in nodes else {} for kind in schema.NODE_TYPES]
    matrices = [
        {i: nodes[kind] for i, kind in enumerate((target, source)) if kind in nodes}
        for source, _, target in schema.ORDERED_RELATIONS
    ]
    told = [{1: nodes[target], 2: nodes[source]} for source, _, target in schema.EDGE_ATTRIBUTES] * 2
    return [*features, *matrices, *matrices, *told, {1: nodes["layer"]}]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def main() -> None:
    """Build the package of this machine."""
    parser = argparse.ArgumentParser(description="Compile the plan of the policy's network.")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    os.nice(NICENESS)
    build(arguments.output)


if __name__ == "__main__":
    main()
