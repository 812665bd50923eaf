"""What Ray Train takes to start a worker, and beside a worker that does nothing: python tests/benchmarks/bench_ray.py

Seconds from `launch` to the first line of the worker's function, the processor seconds of all processes until then, and
afterwards the share of a processor that each takes. The second start has everything in the page cache.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_system import processor_seconds

from dcgan import cluster_train
from dcgan.config import Compute


def idle(began: str, seconds: float) -> None:
    Path(began).touch()
    time.sleep(seconds)


def start(home: Path, seconds: float) -> tuple[float, float, dict[str, float]]:
    """Seconds to the first line, processor seconds to there, and the share of a processor of each process after it."""
    began, before = home / "began", time.perf_counter()
    command = [sys.executable, __file__, "--home", str(home), "--seconds", str(seconds + 15)]
    process = subprocess.Popen(command)
    while not began.exists():
        if process.poll() is not None:
            raise RuntimeError(f"Ray's driver ended with {process.returncode} before its worker began")
        time.sleep(0.02)
    waited, spent = time.perf_counter() - before, sum(processor_seconds(process.pid).values())
    time.sleep(5)  # what is left of starting
    first, clock = processor_seconds(process.pid), time.perf_counter()
    time.sleep(seconds)
    last, passed = processor_seconds(process.pid), time.perf_counter() - clock
    process.wait()
    return waited, spent, {name: (last[name] - first.get(name, 0.0)) / passed for name in last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40, help="of doing nothing (default %(default)s)")
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)  # Ray's driver
    chosen = parser.parse_args()
    if chosen.home:
        arguments = (str(chosen.home / "began"), chosen.seconds)
        cluster_train.launch(idle, arguments, Compute(workers=1, device="cpu"), chosen.home, "idle")
        return
    for number in (1, 2):
        with tempfile.TemporaryDirectory() as home:
            waited, spent, shares = start(Path(home), chosen.seconds)
        print(f"start {number}: {waited:.1f} s, {spent:.1f} processor seconds", flush=True)
    for name, share in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"{name}: {100 * share:.2f} % of a processor")
    print(f"together: {100 * sum(shares.values()):.2f} %")


if __name__ == "__main__":
    main()
