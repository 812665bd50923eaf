"""What OpenMP's threads do while they wait, alone and where runs share the cores: bench_waiting.py [--help]

Milliseconds a step of the preset cifar10, 32 px, batch 128, with OMP_WAIT_POLICY left alone (threads that wait keep
their core) and PASSIVE (they give it up): one process at a time, then three at once, both policies in turn.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_system import loop, make_store, open_run

POLICIES: dict[str, dict[str, str]] = {"keep their core": {}, "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}}


def play(home: Path, steps: int) -> None:
    steps_done, ends = loop(open_run(home, 32, 1000, 0, "cpu")), []
    for step in range(steps + 2):
        next(steps_done)
        if step == 0:  # all begin together
            print("ready", flush=True)
            sys.stdin.readline()
        ends.append(time.perf_counter())
    print(*(1e3 * (after - before) for before, after in itertools.pairwise(ends[1:])))


def together(home: Path, processes: int, steps: int, policy: dict[str, str]) -> list[float]:
    """Milliseconds of each step of this many processes that play at once."""
    command = [sys.executable, __file__, "--home", str(home), "--steps", str(steps)]
    started = [
        subprocess.Popen(command, env=os.environ | policy, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    for process in started:
        assert process.stdout
        process.stdout.readline()
    for process in started:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    return [float(word) for process in started for word in process.communicate()[0].split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="of each process (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of both policies in turn (default %(default)s)")
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)  # a process that plays
    chosen = parser.parse_args()
    if chosen.home:
        play(chosen.home, chosen.steps)
        return
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        make_store(home, 32, 4000)
        open_run(home, 32, 1000, 0, "cpu")
        for processes in (1, 3):
            found: dict[str, list[float]] = {name: [] for name in POLICIES}
            for _ in range(chosen.rounds):
                for name, policy in POLICIES.items():
                    found[name] += together(home, processes, chosen.steps, policy)
            for name, times in found.items():
                middle, low, high = statistics.median(times), min(times), max(times)
                print(f"{processes} at once, {name}: {middle:.0f} ms a step ({low:.0f} to {high:.0f})", flush=True)


if __name__ == "__main__":
    main()
