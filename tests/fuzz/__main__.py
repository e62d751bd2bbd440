"""Fuzz the product: `make fuzz`, or with `PYTHONPATH=tests` `python -m fuzz --seconds 60 envelope step`."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import random
import resource
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import structlog

HERE = Path(__file__).parent
OUTPUT = HERE.parents[1] / "var" / "fuzz"
MEMORY_BYTES = 8 * 2**30
MAX_INPUT = 4096
NAMES = ("envelope", "request", "step", "topology", "keyring", "identity", "settings", "kernel")


class Harness:
    """Runs one target, and keeps what it did: the search goes on after a crash."""

    def __init__(self, name: str) -> None:
        from fuzz.targets import TARGETS

        # A refusal is logged once per receiver, and every input makes a receiver.
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        self.name = name
        self.target = TARGETS[name]
        self.directory = OUTPUT / name
        self.directory.mkdir(parents=True, exist_ok=True)
        self.executions = 0
        self.outcomes: Counter[str] = Counter()
        self.crashes: dict[str, str] = {}
        self._began = self._written = time.monotonic()

    def __call__(self, data: bytes) -> None:
        self.executions += 1
        try:
            self.outcomes[self.target.run(data)] += 1
        except Exception as error:  # noqa: BLE001  # Whatever it is, it is what we look for.
            self._keep(data, error)
        if time.monotonic() - self._written > 1:
            self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        summary = {
            "target": self.name, "executions": self.executions, "seconds": round(self._written - self._began, 1),
            "outcomes": dict(self.outcomes), "crashes": self.crashes,
        }  # fmt: skip
        scratch = self.directory / "summary.part"
        scratch.write_text(json.dumps(summary, indent=1))
        scratch.replace(self.directory / "summary.json")

    def _keep(self, data: bytes, error: Exception) -> None:
        frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
        ours = [f for f in frames if "fuzz" not in f.filename] or frames
        place = f"{type(error.__cause__ or error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
        self.outcomes["CRASH"] += 1
        if place not in self.crashes:
            digest = hashlib.sha256(data).hexdigest()[:16]
            self.crashes[place] = f"{error} (var/fuzz/{self.name}/crash-{digest})"
            (self.directory / f"crash-{digest}").write_bytes(data)
            self.write()


def run_plain(harness: Harness, seconds: float, seed: int) -> None:
    """Mutate the corpus blindly: what there is without atheris."""
    from fuzz.entropy import mutate_bytes

    chance, corpus, end = random.Random(seed), harness.target.seeds(), time.monotonic() + seconds
    for data in corpus:
        harness(data)
    while time.monotonic() < end:
        harness(mutate_bytes(chance, chance.choice(corpus), corpus))


def run_atheris(harness: Harness, seconds: float, seed: int) -> None:
    """Search guided by coverage."""
    import atheris
    from fuzz.entropy import mutate_bytes

    corpus, seeds = harness.directory / "corpus", harness.target.seeds()
    corpus.mkdir(exist_ok=True)
    for data in seeds:
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)

    def mutate(data: bytes, max_size: int, chosen: int) -> bytes:
        # Coverage does not see into protobuf, so that the search alone would forget most of the corpus.
        chance = random.Random(chosen)
        if chance.random() < 0.5:
            return bytes(atheris.Mutate(data, max_size))
        return mutate_bytes(chance, chance.choice((data, chance.choice(seeds))), seeds, max_size)

    flags = [f"-max_total_time={int(seconds)}", f"-seed={seed}", f"-max_len={MAX_INPUT}", "-rss_limit_mb=8192"]
    flags += [
        "-len_control=0",
        "-timeout=20",
        "-print_final_stats=1",
        f"-artifact_prefix={harness.directory}/",
        str(corpus),
    ]
    atheris.Setup([sys.argv[0], *flags], harness, custom_mutator=mutate)
    atheris.Fuzz()


def fuzz_one(name: str, seconds: float, seed: int, *, plain: bool) -> None:
    """Fuzz one target in this process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES * 4, MEMORY_BYTES * 4))
    if plain:
        harness = Harness(name)
        run_plain(harness, seconds, seed)
        harness.write()
        return
    import atheris

    with atheris.instrument_imports(include=["esper_rpc", "esper_client", "esper_servers"]):
        import fuzz.targets  # noqa: F401  # Imported here to be instrumented.
    run_atheris(Harness(name), seconds, seed)


def fuzz_all(names: list[str], seconds: float, seed: int, *, plain: bool) -> int:
    """Fuzz each target in a process of its own; returns how many kinds of crash there are."""
    share, found = seconds / len(names), 0
    for name in names:
        command = [sys.executable, "-m", "fuzz", "--one", name, "--seconds", str(share), "--seed", str(seed)]
        (OUTPUT / name).mkdir(parents=True, exist_ok=True)
        (OUTPUT / name / "summary.json").unlink(missing_ok=True)
        with (OUTPUT / name / "log").open("wb") as log:
            status = subprocess.run([*command, *(["--plain"] if plain else [])], stdout=log, stderr=log, check=False)
        found += report(name, status.returncode)
    return found


def report(name: str, status: int) -> int:
    """Print what a target did; an end that is not its own counts as a crash."""
    path = OUTPUT / name / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {"executions": 0, "outcomes": {}, "crashes": {}}
    print(f"{name}: {summary['executions']} executions, {summary['outcomes']}", flush=True)
    for place, words in summary["crashes"].items():
        print(f"  CRASH {place}: {words}", flush=True)
    if status:
        print(f"  ENDED with {status}, see var/fuzz/{name}/log", flush=True)
    return len(summary["crashes"]) + bool(status)


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(NAMES), metavar="TARGET", help=", ".join(NAMES))
    parser.add_argument("--seconds", type=float, default=600.0, help="for all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="blind mutation, without atheris")
    parser.add_argument("--one", metavar="TARGET", help=argparse.SUPPRESS)
    parser.add_argument("--input", type=Path, help="run one kept input through the one target named")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    plain = options.plain or importlib.util.find_spec("atheris") is None
    if options.input:
        from fuzz.targets import TARGETS

        print(TARGETS[options.targets[0]].run(options.input.read_bytes()))
        return 0
    if options.one:
        fuzz_one(options.one, options.seconds, options.seed, plain=plain)
        return 0
    return 1 if fuzz_all(options.targets, options.seconds, options.seed, plain=plain) else 0


if __name__ == "__main__":
    sys.exit(main())
