"""Where and with what this process runs: Python, packages, processors, and the commit of the code."""

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

CODE = (":/dcgan", ":/flows", ":/constraints.txt")  # git pathspecs of what decides a result
COMMAND_SECONDS = 30
CPUINFO = Path("/proc/cpuinfo")
INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}  # widest first
PACKAGES = ("torch", "numpy", "scikit-learn", "prefect", "ray", "mlflow")


def describe() -> dict[str, Any]:
    """Where and with what this process runs: Python, packages, CPU, GPUs, and the commit if in a git checkout."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": f"{cpus()} x {_cpu()}",
        "gpu": _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]).splitlines(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        **_git(),
    }


def cpus() -> int:
    """The processors that this process may use: what its affinity and its container's quota leave of the machine's.

    LOKY_MAX_CPU_COUNT, joblib's own variable, may lower it.
    """
    from joblib import cpu_count

    return int(cpu_count())


def commit() -> str:
    """The commit of the running code, and whether the code differs from it; "" outside a git checkout."""
    return commit_of(_git())


def hardware(found: dict[str, Any]) -> str:
    """The processors of what `describe` found, in one line."""
    return "; ".join([found["cpu"], *found["gpu"]])


def commit_of(found: dict[str, Any]) -> str:
    return found["git_commit"][:12] + (" (changed)" if found["git_changed"] else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # training alone does not need all of them


def _cpu() -> str:
    """The processor's name, and the widest instructions that decide how fast it multiplies."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    flags = values.get("flags", "").split()
    widest = next((f" ({name})" for flag, name in INSTRUCTIONS.items() if flag in flags), "")
    return values.get("model name", platform.machine()) + widest


def _git() -> dict[str, Any]:
    git = ["git", "-C", str(Path(__file__).parent)]
    if not _output([*git, "ls-files", Path(__file__).name]):
        return {"git_commit": "", "git_changed": False}  # installed, perhaps inside another project's checkout
    return {
        "git_commit": _output([*git, "rev-parse", "HEAD"]),
        "git_changed": bool(_output([*git, "status", "--porcelain", "--untracked-files=no", "--", *CODE])),
    }


def _output(command: list[str]) -> str:
    """What a command prints, or "" if it is not installed, fails, or hangs, as one for a faulty device may."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
