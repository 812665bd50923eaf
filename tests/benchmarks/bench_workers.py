"""Several workers: what a step sends, and two workers of one thread beside one of two: bench_workers.py [--help]

The bytes are counted by a hook in front of each all-reduce. Speeds are those of torchrun's processes on this machine,
with gloo on the loopback; runs take turns. A model of a step's time stands beside what it can be compared with here,
and `--model` prints what it says of up to 64 GPUs. That is worked out, not measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def work(size: int, batch: int, steps: int) -> None:
    """One rank: plays steps, and rank 0 prints their seconds, the bytes of a step and the seconds of all-reduces."""
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    import torch
    import torch.distributed as dist
    from bench_step import batches
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    from dcgan import distributed, memory, models
    from dcgan.config import Model, Train
    from dcgan.distributed import share
    from dcgan.player import Player
    from dcgan.step import Game

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with distributed.join("cpu") as place:
        nets = models.build(Model(kernel=4, width=64, z="normal"), 3, 0, size, seed=0)
        memory.keep()
        play = Player(Game(*nets, Train(steps=10**9, batch_size=batch), place), True)
        sent = [0]

        def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            sent[0] += bucket.buffer().nbytes
            return default_hooks.allreduce_hook(None, bucket)  # type: ignore[arg-type]

        data = batches(size, share(batch, place.world), place.device, 4)
        if place.world > 1:
            for net in (play.game.wrapped_generator, play.game.wrapped_discriminator):
                net.register_comm_hook(None, count)
        for step in range(3):
            play.play(step, data[step % 4])
        sent[0] = 0
        began = time.perf_counter()
        for step in range(steps):
            play.play(step, data[step % 4])
        seconds = (time.perf_counter() - began) / steps
        alone = 0.0
        if place.world > 1:  # the same bytes with nothing to compute beside
            buffers = [torch.zeros(sum(p.numel() for p in net.parameters())) for net in nets]
            for _ in range(3):
                dist.barrier()
                began = time.perf_counter()
                for buffer in buffers:
                    dist.all_reduce(buffer)
                alone = time.perf_counter() - began
        if place.first:
            print(json.dumps({"seconds": seconds, "bytes": sent[0] / steps, "alone": alone}), flush=True)
    os._exit(0)  # with a hook in Python, PyTorch 2.15 aborts one process in three as the interpreter ends


# (name, bytes a second that a worker sends, seconds that a message takes besides); nominal, assumed
LINKS = (("NVLink, 450 GB/s", 450e9, 5e-6), ("100 Gbit/s", 12.5e9, 2e-5), ("25 Gbit/s", 3.125e9, 2e-5))
SUSTAINED = 100e12  # operations a second of one GPU: an assumption, a tenth of an H100's dense bfloat16 peak


def exchange(workers: int, size: int, rate: float, latency: float) -> float:
    """Seconds in which `workers` in a ring average `size` bytes: each sends 2 (n - 1) / n of them in as many messages.

    Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.
    """
    return 2 * (workers - 1) * (size / workers / rate + latency)


def model() -> None:
    """A table of the share of the speed of n single GPUs that n together keep, 128 images each."""
    from bench_step import operations

    from dcgan import models
    from dcgan.config import Model

    print("| image, width | MB a step | step alone, ms | link | " + " | ".join(f"{n} GPUs" for n in (2, 8, 64)) + " |")
    print("|---|---:|---:|---|---:|---:|---:|")
    for size, width in ((32, 64), (64, 64), (64, 128), (128, 128)):
        nets = models.build(Model(kernel=4, width=width, z="normal"), 3, 0, size, seed=0)
        sent = 4 * sum(p.numel() for net in nets for p in net.parameters())
        alone = operations(size, 128, width) / SUSTAINED
        for where, rate, latency in LINKS:
            kept = [alone / (alone + exchange(n, sent, rate, latency)) for n in (2, 8, 64)]
            cells = " | ".join(f"{share:.0%}" for share in kept)
            print(f"| {size} px, {width} | {sent / 1e6:.1f} | {1e3 * alone:.2f} | {where} | {cells} |")


def run(workers: int, threads: int, size: int, batch: int, steps: int) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers), "--standalone"]
    command += [__file__, "--work", str(size), str(batch), str(steps)]
    around = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=around, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--batch", type=int, default=128, help="over all workers (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8, help="of a run, about (default %(default)s)")
    parser.add_argument("--model", action="store_true", help="print the table for GPUs, and time nothing")
    parser.add_argument("--work", type=int, nargs=3, metavar=("SIZE", "BATCH", "STEPS"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        work(*chosen.work)
        return
    if chosen.model:
        model()
        return
    from dcgan import environment

    cores = environment.cpus()
    if cores % 2:
        raise ValueError(f"{cores} processors can't be divided between two workers")
    for size in chosen.size:
        steps = max(5, int(chosen.seconds / run(1, cores, size, chosen.batch, 5)["seconds"]))
        ones, twos, halves = [], [], []
        for _ in range(chosen.pairs):
            ones.append(run(1, cores, size, chosen.batch, steps))
            twos.append(run(2, cores // 2, size, chosen.batch, steps))
            halves.append(run(1, cores // 2, size, chosen.batch // 2, steps))
        ratios = sorted(a["seconds"] / b["seconds"] for a, b in zip(ones, twos, strict=True))
        alone = statistics.median(two["alone"] for two in twos)
        one, two, half = (1e3 * statistics.median(each["seconds"] for each in runs) for runs in (ones, twos, halves))
        print(
            f"{size} px, batch {chosen.batch}: {twos[0]['bytes'] / 1e6:.2f} MB a step and worker; 1 worker of {cores} "
            f"threads {one:.1f} ms, 2 workers of {cores // 2} {two:.1f} ms: "
            f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
            f"the exchange alone {1e3 * alone:.1f} ms, half the batch on {cores // 2} threads alone {half:.1f} ms: "
            f"together {half + 1e3 * alone:.1f} ms by the model",
            flush=True,
        )


if __name__ == "__main__":
    main()
