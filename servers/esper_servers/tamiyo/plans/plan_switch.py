from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from esper_rpc.config import Range, validate
from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import TelemetryLevel
from esper_rpc.telemetry.events import tell_event
from esper_rpc.telemetry.metrics import PLAN_COMPILED, PLAN_FALLBACKS
from esper_servers.policy import plan_package
from esper_servers.policy.compiled_plan import Package
from esper_servers.policy.cuda_device import AUTO, CPU, CUDA
from esper_servers.policy.policy import COMPILED, Policy
from esper_servers.tamiyo.risk.events import SOURCE

from .cuda_switch import CudaSwitch
from .plan_check import check_heads

TOLERANCE = 1e-4
_LAST_WORDS = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """How the policy's network is served."""

    compile: bool = True
    """Build a compiled plan beside the serving process and serve it; otherwise, and until then, the eager one."""
    device: str = CPU
    """Where graphs are computed that are prepared: cpu, cuda, or cuda where there is one (auto)."""
    vram_mb: Annotated[int, Range(64, 1_000_000)] = 2048
    """The most memory of that device that one step process takes, in MiB, beside what CUDA itself does."""

    def __post_init__(self) -> None:
        validate(self)
        if self.device not in (AUTO, CPU, CUDA):
            raise ConfigError(f"device = {self.device!r} is unknown; choose auto, cpu or cuda.")


class PlanSwitch:
    """Serves the eager plan until a compiled one is at hand, and says once why when there is none.

    A package is built by a process of its own, never by the one that serves, and kept for the next start. On top of it,
    a CUDA device serves where one is wanted.
    """

    def __init__(self, policy: Policy, directory: Path, config: PlanConfig, cuda: CudaSwitch | None = None) -> None:
        self._policy = policy
        self._directory = directory
        self._is_wanted = config.compile
        self._cuda = cuda or CudaSwitch(config.device, config.vram_mb)
        self.problem = ""
        """Why the eager plan is served although a compiled one is wanted."""

    @property
    def package(self) -> Path:
        """Where the package for this machine lies."""
        return self._directory / plan_package.package_name()

    @property
    def served(self) -> Path | None:
        """The package that is served beside or without a device, None while the eager plan is."""
        return self.package if self._policy.has_compiled else None

    def prepare(self) -> None:
        """Serve the package of an earlier start and the device, before the first step."""
        self._prepare_package()
        self._give_device(self._policy)

    def _prepare_package(self) -> None:
        if not self._is_wanted:
            return
        if not plan_package.has_compiler():
            self._fall_back("there is no C++ compiler")
            return
        if self.package.exists():
            self._take_up()

    def fit(self, policy: Policy) -> Policy:
        """Give a policy that is not served yet the plan that would be; takes some 50 ms, on a thread."""
        is_wanted = self._is_wanted and not self.problem and not policy.has_compiled
        if is_wanted and self.package.exists():
            try:
                self._load(policy)
            except (ConfigError, RuntimeError) as error:
                self._fall_back(str(error))
        self._give_device(policy)
        return policy

    def follow(self, policy: Policy) -> None:
        """Keep this policy's plan from now on."""
        self._policy = policy

    async def build(self) -> None:
        """Build the package if there is none, and serve it from the next step on."""
        if not self._is_wanted or self.problem or self.package.exists():
            return
        try:
            await build_beside(self.package)
        except (ConfigError, OSError) as error:
            self._fall_back(str(error))
            return
        await asyncio.to_thread(self._take_up)

    def _take_up(self) -> None:
        try:
            self._load(self._policy)
        except (ConfigError, RuntimeError) as error:
            self.package.unlink(missing_ok=True)
            self._fall_back(str(error))
            return
        PLAN_COMPILED.set(1)
        level = TelemetryLevel.TELEMETRY_LEVEL_INFO
        tell_event(SOURCE, "plan_compiled", level, reason="package_taken_up", package=self.package.name)

    def _load(self, policy: Policy) -> None:
        package = plan_package.load(self.package, policy.network)
        _check(policy, package)
        policy.serve_compiled(package)

    def _give_device(self, policy: Policy) -> None:
        self._cuda.give(policy)
        self._tell_problem(policy)

    def _tell_problem(self, policy: Policy) -> None:
        policy.plan_problem = " ".join(filter(None, (self.problem, self._cuda.problem)))

    def _fall_back(self, problem: str) -> None:
        self.problem = problem
        self._tell_problem(self._policy)
        PLAN_FALLBACKS.inc()
        level = TelemetryLevel.TELEMETRY_LEVEL_WARNING
        tell_event(SOURCE, "plan_fallback", level, reason=problem, plan=self._policy.plan)


async def build_beside(package: Path) -> None:
    """Build a package in a process of its own, which is killed when this is cancelled; raises ConfigError."""
    package.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=package.parent, prefix="build-") as scratch:
        # Inductor would keep native code in a directory of /tmp that others can guess.
        environ = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor", "OMP_NUM_THREADS": "1"}
        await _run_builder(package, environ)
    for other in package.parent.glob("*.pt2"):
        if other != package:
            other.unlink()


async def _run_builder(package: Path, environ: dict[str, str]) -> None:
    builder = await asyncio.create_subprocess_exec(
        sys.executable, "-m", plan_package.__name__, "--output", str(package),
        env=environ, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        _, errors = await builder.communicate()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(builder.pid, 9)  # The compiler too.
        await builder.wait()
        raise
    if builder.returncode:
        raise ConfigError(f"The plan was not built: {errors.decode(errors='replace').strip()[-_LAST_WORDS:]}")


def _check(policy: Policy, package: Package) -> None:
    check_heads(policy, lambda inputs: policy.compute(inputs, package), COMPILED, TOLERANCE)
