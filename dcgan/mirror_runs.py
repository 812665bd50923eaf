"""Copies runs from `data.remote`, an s3:// address, when they are looked up, and to it while they change.

<remote>/runs/<name>/    all of a run except its features, which are made again from a checkpoint
"""

import json
import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dcgan import mirror, storage
from dcgan.remote import Remote, RemoteError

log = logging.getLogger(__name__)

EVERY = 30  # seconds between copies of a run that is being trained
PATIENCE = 10  # seconds for the last copy of a run that was interrupted; the same command would resume it
LOCAL = ("features/", ".")  # the parts of a run that stay here


def push_run(run: Path, url: str) -> None:
    """Copy what is new in a run to the remote; only one process at a time does so, the one that holds the run.

    Metrics go before checkpoints, and best.json after them, so that a run resumed from the copy has every line up to
    its checkpoint. Raises RemoteError, also if the remote has a newer checkpoint.
    """
    remote, at = Remote(url), f"runs/{run.name}"
    there = remote.sizes(at)
    newest = max(_steps(_checkpoints(there)), default=-1)
    if newest > max(_here(run), default=-1):
        raise RemoteError(
            f"{url}/{at} has a checkpoint of step {newest}, newer than any here: another machine went on with this "
            "run, and the command that opened it copies what that has made"
        )
    ledger = run / ".remote.json"
    known = json.loads(ledger.read_text()) if ledger.exists() else {}
    # What was sent to another address, or is no longer there, counts as not sent.
    sent = {name: state for name, state in known.get("sent", {}).items() if known["url"] == url and name in there}
    steps = {run / "checkpoints" / str(step) for step in _here(run)}  # one that was set aside as corrupt stays here
    for name, state in sorted(_plain(run).items(), key=lambda item: (item[0] == "checkpoints/best.json", item[0])):
        if name == "checkpoints/best.json":
            for step in sorted(steps):
                mirror.push(remote, step, f"{at}/checkpoints/{step.name}", {})
        if sent.get(name) != state:
            remote.write(f"{at}/{name}", (run / name).read_bytes())
            sent[name] = state
    kept = {step.name for step in steps}
    gone = [name for name in _checkpoints(there) if "/" in name and name.partition("/")[0] not in kept]
    remote.remove(f"{at}/checkpoints/{name}" for name in sorted(gone))  # manifest.json before state.pt
    storage.write_json(ledger, {"url": url, "sent": sent})


def pull_run(run: Path, url: str) -> bool:
    """Copy a run from the remote unless it is here and at least as far; False if there is nothing to copy.

    As far: it has as new a checkpoint, and if that is equally new, every file that was made from it, such as scores.
    Raises RemoteError, or BusyError if it is being trained here while another machine continued it.
    """
    remote, at = Remote(url), f"runs/{run.name}"
    there = remote.sizes(at)
    steps = _steps(_checkpoints(there))
    if "experiment.json" not in there:
        return False
    newest, mine = max(steps, default=-1), max(_here(run), default=-1)
    as_new = (run / "experiment.json").exists() and newest == mine
    missing = [name for name in _unsealed(there) if not (run / name).exists()]
    if (run / "experiment.json").exists() and (newest < mine or (as_new and not missing)):
        return False
    run.mkdir(parents=True, exist_ok=True)
    with storage.hold(run / ".lock", f"run {run.name}"):
        if as_new:  # what is here may be newer, and not there yet
            _pull_unsealed(remote, at, run, missing)
        else:
            _pull_run(remote, at, run, there, steps)
    return True


def _pull_run(remote: Remote, at: str, run: Path, there: Iterable[str], steps: set[int]) -> None:
    """Interrupted at any line, the next call resumes: a run is as far as its newest checkpoint, which comes last.

    Metrics beyond that checkpoint are cut when training resumes. A checkpoint that the remote lacks, or has in another
    version, is no longer part of the run.
    """
    mirror.check_names(remote, at, there)
    _pull_unsealed(remote, at, run, set(_unsealed(there)) - {"experiment.json"})
    for step in sorted(steps | _here(run)):
        own, other = run / "checkpoints" / str(step), f"{at}/checkpoints/{step}"
        manifest = remote.read(f"{other}/{storage.MANIFEST}")
        known = (own / storage.MANIFEST).read_bytes() if own.exists() else None
        if known is not None and known != manifest:
            storage.discard(own)
        if manifest is not None and known != manifest:
            mirror.pull(remote, other, own, manifest)
    _pull_unsealed(remote, at, run, ["experiment.json"])


def _pull_unsealed(remote: Remote, at: str, run: Path, names: Iterable[str]) -> None:
    """Copy files that are not part of a sealed directory, and record that they are as new here: not to be sent back."""
    mirror.check_names(remote, at, names)
    ledger = run / ".remote.json"
    known = json.loads(ledger.read_text()) if ledger.exists() else {}
    sent = known["sent"] if known.get("url") == remote.url else {}
    for name in names:
        content = remote.read(f"{at}/{name}")
        if name == "mlflow.json" and content is not None:
            content = copied_ledger(content, run / name)
        if content is not None:
            storage.write_bytes(run / name, content)
            sent[name] = _state(run / name)
    storage.write_json(ledger, {"url": remote.url, "sent": sent})


def copied_ledger(content: bytes, here: Path) -> bytes | None:
    """What another machine delivered to MLflow, as far as was copied here: it may have delivered more since.

    here: the ledger of this machine. None if that is of another server: then this machine goes on with its own.
    """
    ledger = json.loads(content)
    if here.is_file() and json.loads(here.read_bytes()).get("server") != ledger.get("server"):
        return None
    return json.dumps({**ledger, "copied": True}).encode()


@contextmanager
def follow(run: Path, url: str | None) -> Iterator[None]:
    """Copy a run to the remote while it is trained, and once more at the end. Training never waits for it.

    An unreachable remote is a warning meanwhile; at the end it is a RemoteError, and the same command tries again.
    """
    if url is None:
        yield
        return
    stop, interrupted = threading.Event(), threading.Event()

    def copy() -> None:
        try:
            push_run(run, url)
        except (OSError, storage.CorruptError) as error:
            # The remote is away, or a checkpoint was removed while it was read: the next round copies what is new.
            log.warning("the run is not copied for now: %s", error)

    def watch() -> None:
        while not stop.wait(EVERY):
            copy()
        if interrupted.is_set():
            copy()

    thread = threading.Thread(target=watch, name="mirror", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:  # the user waits to hear of this, not for a remote that may be away
        interrupted.set()
        stop.set()
        thread.join(PATIENCE)
        raise
    stop.set()
    thread.join()
    push_run(run, url)


def _plain(run: Path) -> dict[str, list[int]]:
    """The run's files that are not part of a sealed directory: name to size and modification time."""
    found = {}
    for path in run.rglob("*"):
        name = path.relative_to(run).as_posix()
        sealed = name.startswith("checkpoints/") and name != "checkpoints/best.json"
        if path.is_file() and not sealed and not name.startswith(LOCAL) and not path.name.startswith("."):
            found[name] = _state(path)
    return found


def _state(path: Path) -> list[int]:
    """What tells a file from a later version of it."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _here(run: Path) -> set[int]:
    """The steps of a run's checkpoints."""
    return _steps(f"{path.parent.name}/{path.name}" for path in run.glob(f"checkpoints/*/{storage.MANIFEST}"))


def _checkpoints(names: Iterable[str]) -> list[str]:
    """The names of a run's files that lie below checkpoints/, relative to it."""
    return [name.removeprefix("checkpoints/") for name in names if name.startswith("checkpoints/")]


def _unsealed(names: Iterable[str]) -> list[str]:
    """The names of a run's files that are not part of a sealed directory."""
    return [name for name in names if not name.startswith("checkpoints/") or name == "checkpoints/best.json"]


def _steps(names: Iterable[str]) -> set[int]:
    """The steps with a manifest among files below checkpoints/."""
    found = (name.split("/") for name in names)
    return {int(parts[0]) for parts in found if parts[0].isdigit() and parts[-1] == storage.MANIFEST}
