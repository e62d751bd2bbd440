from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import structlog
import torch
from torch.profiler import ProfilerActivity, profile

log = structlog.get_logger(__name__)

MOST_STEPS = 1000


class StepProfiler:
    """Traces training steps with torch.profiler when it is asked to, and costs nothing otherwise.

    Traces are Chrome traces (chrome://tracing, Perfetto). A trace that cannot be made or written is logged, and the
    training goes on.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._wanted: tuple[int, Path] | None = None
        self._running: profile | None = None
        self._steps_left = 0
        self._path = directory

    @property
    def is_tracing(self) -> bool:
        """Whether steps are being traced."""
        return self._running is not None

    def request(self, *, steps: int = 5, name: str = "steps") -> Path:
        """Trace the next steps; returns where the trace will lie. From any thread; the last request counts.

        Raises:
            ValueError: For a number of steps that is not between 1 and 1000, or a name that is a path.
        """
        if not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"steps is {steps}; choose 1 to {MOST_STEPS}.")
        path = self._directory / f"{name}.trace.json"
        if path.parent != self._directory:
            raise ValueError(f"name is {name!r}; choose a name of a file without a folder.")
        with self._lock:
            self._wanted = (steps, path)
        return path

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Put it around one training step, on the training thread."""
        if self._wanted is not None and self._running is None:
            self._start()
        try:
            yield
        finally:
            if self._running is not None:
                self._end_step(self._running)

    def next_step(self) -> None:
        """End one training step and begin the next: for a loop that can put nothing around its steps."""
        if self._running is not None:
            self._end_step(self._running)
        if self._wanted is not None and self._running is None:
            self._start()

    def close(self) -> None:
        """Write what was traced so far."""
        if self._running is not None:
            self._write(self._running)

    def _start(self) -> None:
        with self._lock:
            wanted, self._wanted = self._wanted, None
        if wanted is None:
            return
        self._steps_left, self._path = wanted
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        running = profile(activities=activities)
        try:
            running.start()
        except RuntimeError as error:  # Another profiler of the user's may be running.
            log.warning("trace_not_started", error=str(error))
            return
        self._running = running

    def _end_step(self, running: profile) -> None:
        self._steps_left -= 1
        if self._steps_left <= 0:
            self._write(running)

    def _write(self, running: profile) -> None:
        self._running = None
        part = self._path.with_suffix(".part")
        try:
            running.stop()
            self._directory.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(part))
            part.replace(self._path)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                part.unlink()
            log.warning("trace_not_written", path=str(self._path), error=str(error))
