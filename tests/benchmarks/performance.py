"""Our training beside the eager loop on the machine at hand, into docs/performance.md: make bench

Runs bench_step.py's and bench_system.py's measurements, keeps them as docs/performance/<processor>.json and draws the
page's table and plot from all that is kept. What stands outside the page's marks stays.
"""

import argparse
import json
import re
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bench_step
import bench_system
import matplotlib.pyplot as plt
import torch

from dcgan import environment, storage
from dcgan.config import Train
from dcgan.numerics import numerics

BEGIN, END = "<!-- measured: written by `make bench`, changed by hand in vain -->", "<!-- end of measured -->"
WORKERS = "ray::RayTrainWorker", "ray::_Worker"  # what Ray calls a worker's process, until eac9029 and since
DOCS = Path(__file__).parents[2] / "docs"


def measure(device: torch.device, sizes: list[int], pairs: int, steps: int) -> dict[str, Any]:
    """All that the page shows of one machine. `steps`: of a run with the whole system around it; 0 leaves it out."""
    around = environment.describe()
    chosen = numerics(Train(steps=1), device)
    found: dict[str, Any] = {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else around["cpu"],
        "torch": torch.__version__,
        "commit": environment.commit_of(around),
        "date": datetime.now(UTC).date().isoformat(),
        "numerics": f"{chosen.dtype}, {chosen.memory_format}".replace("torch.", ""),
        "product": bench_step.peak(chosen.dtype, device),
        "step": [],
    }
    for size in sizes:
        row = bench_step.compare(size, 128, device, pairs, 4.0, ["ours"])
        inputs = bench_step.compare_inputs(size, 128, device, pairs, 4.0)
        found["step"].append({"size": size, **row, "inputs": inputs})
        print(json.dumps(found["step"][-1]), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        bench_system.make_store(home, sizes[0], 50_000)
        run = bench_system.open_run(home, sizes[0], 1000, 10**6, device.type)
        found["stages"] = list((bench_system.stages(run) | bench_system.parts(run)).items())  # in order
        print(json.dumps(found["stages"]), flush=True)
        if steps:
            found["system"] = bench_system.compare(home, sizes[0], steps, device.type)
    return found


def spread(row: dict[str, float]) -> str:
    return f"**{row['ratio']:.2f}** ({row['lowest']:.2f} to {row['highest']:.2f})"


def tables(records: list[dict[str, Any]]) -> str:
    lines = [
        "| machine | computes in | image | eager, ms | ours, ms | ours, images/s | of a matrix product's rate "
        "| eager / ours | each with its own input |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        for row in record["step"]:
            ours = row["ours"]
            share = ours["operations_per_second"] / record["product"]
            lines.append(
                f"| {record['hardware']} | {record['numerics']} | {row['size']} px | {row['eager']['ms']:.1f} "
                f"| {ours['ms']:.1f} | {ours['images_per_second']:,.0f} | {share:.0%} of "
                f"{record['product'] / 1e12:.2f} Top/s | {spread(ours)} | {spread(row['inputs'])} |"
            )
    lines += ["", "![Images a second](performance.svg)", ""]
    lines += [f"Milliseconds of a run's stages, {records[0]['step'][0]['size']} px, batch 128:", ""]
    stages = [dict(record["stages"]) for record in records]
    lines.append("| stage | " + " | ".join(record["hardware"] for record in records) + " |")
    lines.append("|---|" + "---:|" * len(records))
    for name in dict.fromkeys(name for each in stages for name in each):
        lines.append(f"| {name} | " + " | ".join(f"{each[name]:.2f}" if name in each else "" for each in stages) + " |")
    lines.append("")
    for record in records:
        origin = f"torch {record['torch']}; commit {record['commit']}; {record['date']}"
        lines.append(f"- {record['hardware']}: {origin}{system(record)}")
    return "\n".join(lines)


def system(record: dict[str, Any]) -> str:
    if "system" not in record:
        return ""
    share, error = bench_system.added(record["system"])
    beside = record["system"]["beside"]
    others = sum(value for name, value in beside.items() if not name.startswith(WORKERS))
    return (
        f"; the whole system around {record['system']['steps']:,} steps in a Ray Train worker adds "
        f"{100 * share:.1f} ± {100 * error:.1f} %, its other processes take {100 * others:.1f} % of a processor"
    )


def plot(records: list[dict[str, Any]], file: Path) -> None:
    """Images a second of both, a group for each machine, a panel for each size."""
    sizes = sorted({row["size"] for record in records for row in record["step"]})
    plt.rcParams["svg.hashsalt"] = "performance"
    shape = {"figsize": (2 + 3.5 * len(sizes), 1.3 + 0.6 * len(records)), "layout": "constrained", "squeeze": False}
    figure, panels = plt.subplots(1, len(sizes), sharey=True, **shape)
    for size, axes in zip(sizes, panels[0], strict=True):
        rows = [(place, row) for place, each in enumerate(records) for row in each["step"] if row["size"] == size]
        for offset, name, colour in ((0.2, "eager", "#9aa5b1"), (-0.2, "ours", "#1f6feb")):
            rates = [row[name]["images_per_second"] for _, row in rows]
            bars = axes.barh([place + offset for place, _ in rows], rates, 0.38, label=name, color=colour)
            axes.bar_label(bars, [f"{rate:,.0f} {name}" for rate in rates], padding=3)
        axes.set_yticks(range(len(records)), [record["hardware"] for record in records])
        axes.margins(x=0.5)  # for the labels
        axes.set_xlabel(f"images a second, {size} px, batch 128")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


def write_page(docs: Path) -> None:
    records = [json.loads(file.read_text()) for file in sorted((docs / "performance").glob("*.json"))]
    plot(records, docs / "performance.svg")
    page = docs / "performance.md"
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    storage.write_bytes(page, f"{before}{BEGIN}\n\n{tables(records)}\n\n{END}{after}".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000, help="of a run with the system around it; 0: none")
    chosen = parser.parse_args()
    found = measure(torch.device(chosen.device), chosen.size, chosen.pairs, chosen.steps)
    name = re.sub(r"\W+", "-", found["hardware"]).strip("-").lower()
    storage.write_json(DOCS / "performance" / f"{name}.json", found)
    write_page(DOCS)
    print(DOCS / "performance.md")


if __name__ == "__main__":
    main()
