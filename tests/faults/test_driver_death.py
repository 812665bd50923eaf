"""However the process that started Ray ends, nothing of it is left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_survives_its_driver_and_nothing_is_written_to_the_users_home(
    tmp_path: Path, sent: signal.Signals
) -> None:
    script = f"""
        import signal, time
        from pathlib import Path
        from dcgan import cluster_train
        from dcgan.config import Compute

        def work(file):
            Path(file).touch()
            time.sleep(600)

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
        home = Path({str(tmp_path)!r})
        cluster_train.launch(work, (str(home / "working"),), Compute(device="cpu"), home, "long")
    """
    (tmp_path / "user").mkdir()
    marker = f"DCGAN_TEST_MARKER={tmp_path}"
    environment = {**os.environ, "HOME": str(tmp_path / "user"), "DCGAN_TEST_MARKER": str(tmp_path)}
    environment.pop("RAY_AUTH_MODE", None)
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    _until((tmp_path / "working").exists, 300)
    assert len(_processes(marker)) > 3

    try:
        driver.send_signal(sent)
        _, said = driver.communicate(timeout=60)
        assert driver.returncode != 0
        # SIGTERM is like Ctrl-C: an exception that closes what is open, and no stack of machine code.
        assert (b"KeyboardInterrupt" in said) == (sent != signal.SIGKILL)
        assert b"*** SIG" not in said
        deadline = time.monotonic() + 120
        while survivors := _processes(marker):
            assert time.monotonic() < deadline, f"not gone within 120 s: {survivors}"
            time.sleep(0.2)
    finally:
        driver.kill()
    assert list((tmp_path / "user").iterdir()) == []


def _processes(marker: str) -> list[str]:
    """The command lines of the living processes that have inherited the marker."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (directory / "environ").read_bytes().split(b"\0"):
                found.append((directory / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return [command for command in found if command]


def _until(condition: object, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)
