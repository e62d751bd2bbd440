"""What all plans of a process share of a device: streams, a memory pool for CUDA graphs, and a budget of its memory.

The CPU can be such a device too, without streams and graphs: a plan is checked there where there is no CUDA.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper_rpc.errors import ConfigError

AUTO, CPU, CUDA = "auto", "cpu", "cuda"
MEGABYTE = 1 << 20

Launch = Callable[[], Tensor]
"""Has a device compute; the result may be there only later."""


def find_device(wanted: str) -> torch.device | None:
    """Return the CUDA device to serve on, None for the CPU.

    Raises ConfigError when one is wanted and there is none that computes in bfloat16; CUDA_VISIBLE_DEVICES chooses.
    """
    if wanted == CPU:
        return None
    problem = _lack_of_cuda()
    if not problem:
        return torch.device("cuda", 0)
    if wanted == CUDA:
        raise ConfigError(f"No CUDA device can be used: {problem}.")
    return None


def _lack_of_cuda() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "torch finds none" if built else f"torch {torch.__version__} is built without CUDA"
    return "" if torch.cuda.is_bf16_supported(including_emulation=False) else "it does not compute in bfloat16"


@dataclass(frozen=True, kw_only=True, slots=True)
class VramBudget:
    """How much memory of a device torch may take for this process, in bytes."""

    limit: int
    free: Callable[[], int]
    """How much there is to take, with what was taken already."""
    peak: Callable[[], int]
    """The most that was taken."""

    @classmethod
    def on(cls, device: torch.device, limit: int) -> VramBudget:
        """Hold this process to it: torch raises OutOfMemoryError beyond."""
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        return cls(
            limit=limit,
            free=lambda: torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device),
            peak=lambda: torch.cuda.max_memory_reserved(device),
        )

    def check_room(self) -> None:
        """Raise ConfigError unless all of it can be had."""
        free = self.free()
        if free < self.limit:
            raise ConfigError(f"[plan] vram_mb = {_mb(self.limit)}, and only {_mb(free)} MB of the device are free.")

    def check_peak(self) -> None:
        """Raise ConfigError if more was taken."""
        peak = self.peak()
        if peak > self.limit:
            raise ConfigError(f"[plan] vram_mb = {_mb(self.limit)}, and the plan took {_mb(peak)} MB.")


def _mb(size: int) -> int:
    return round(size / MEGABYTE)


def allow_tf32() -> None:
    """Let float32 products on CUDA use TensorFloat-32; those on the CPU, which replays compare bit for bit, stay."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # From torch 2.9 on.
        matmul.fp32_precision = "tf32"
    else:
        matmul.allow_tf32 = True


class DeviceLane:
    """A device as all plans of this process use it: one evaluation at a time, and captures by a thread beside.

    Shared, since torch deals out a few streams in turn: with some for each plan, one would come to launch into a stream
    that another captures. Captures have one thread, since cuBLAS takes a workspace for each thread and stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.lock = threading.Lock()
        """To be held while something is evaluated: what was captured shares memory, and the marks are the same."""
        self.capturer = ThreadPoolExecutor(1, "cuda-capture")
        self.marks: list[Any] = [_mark(is_cuda=self.is_cuda) for _ in range(4)]
        # A CUDA graph keeps the workspace that cuBLAS has for the stream it was captured in; warm-ups need another.
        self._serving, self._warming, self._capturing = _stream(device), _stream(device), _stream(device)
        self._pool = torch.cuda.graph_pool_handle() if self.is_cuda else None
        self._anchor: Launch | None = None

    def serving(self) -> torch.cuda.StreamContext:
        """Launch evaluations here."""
        return torch.cuda.stream(self._serving)

    def warming(self) -> torch.cuda.StreamContext:
        """Warm up here what is to be captured, while steps are evaluated."""
        return torch.cuda.stream(self._warming)

    def wait(self) -> None:
        """Wait for everything that was launched in the current stream."""
        if self.is_cuda:
            torch.cuda.current_stream(self.device).synchronize()

    def capture(self, launch: Launch) -> Launch:
        """Return a launch that does all of another at once; raises RuntimeError. The CPU has no such thing."""
        if not self.is_cuda:
            return launch
        if self._anchor is None:
            self._anchor = self._drop_anchor()
        return self._capture(launch)

    def _drop_anchor(self) -> Launch:
        """Capture something that stays: a pool without a graph is not captured into again (vllm-project/vllm#28426)."""
        with torch.cuda.stream(self._capturing):
            square = torch.zeros(16, 16, dtype=torch.bfloat16, device=self.device)
            torch.mm(square, square)  # cuBLAS must not be set up within a capture (pytorch/pytorch#187745).
            self.wait()
        return self._capture(lambda: torch.zeros(1, device=self.device))

    def _capture(self, launch: Launch) -> Launch:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(self._capturing),  # A capture that fails would leave its stream to be the current one.
            # Steps go on meanwhile, on another thread and stream.
            torch.cuda.graph(graph, pool=self._pool, stream=self._capturing, capture_error_mode="thread_local"),
        ):
            output = launch()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


@functools.cache
def lane_of(device: torch.device) -> DeviceLane:
    """Return the lane of a device, the same to everyone."""
    return DeviceLane(device)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]  # Of torch.


def _mark(*, is_cuda: bool) -> Any:
    return torch.cuda.Event(enable_timing=True) if is_cuda else _HostMark()  # type: ignore[no-untyped-call]  # As above.


class _HostMark:
    """As a torch.cuda.Event, of what the CPU does at once."""

    def __init__(self) -> None:
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing is left to wait for."""

    def elapsed_time(self, end: _HostMark) -> float:
        return (end._at - self._at) * 1e3
