"""What is freed is kept: asking for the same memory again makes no page faults."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from dcgan import memory
{call}
for number in range(30):
    if number == 20:  # by then what is kept has pieces that fit
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.zeros(2**23) for _ in range(4)]
    del parts
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call):
    return int(
        subprocess.run([sys.executable, "-c", PROGRAM.format(call=call)], check=True, stdout=subprocess.PIPE).stdout
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another than glibc")
def test_freed_memory_is_kept():
    given_back = faults("")
    assert given_back > 300_000  # 10 times 128 MiB are 327,680 pages; glibc maps what is so large anew
    assert faults("memory.keep()") < given_back / 10


def test_another_c_library_is_left_alone(monkeypatch):
    from dcgan import memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("asked for the C library"))
    memory.keep()
