"""What is freed is kept: asking for the same memory again makes no page faults."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, threading, torch
from dcgan import memory

def faults():
    {call}
    for number in range(30):
        if number == 20:  # by then what is kept has pieces that fit
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        parts = [torch.zeros(count) for count in (2**23, 2**22, 2**23, 2**23, 2**20, 2**22)]
        del parts
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

{start}
"""
START = {"main": "faults()", "another": "thread = threading.Thread(target=faults); thread.start(); thread.join()"}


def faults(call, thread):
    program = PROGRAM.format(call=call, start=START[thread])
    return int(subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another than glibc")
@pytest.mark.parametrize("thread", START)
def test_freed_memory_is_kept(thread):
    given_back = faults("", thread)
    assert given_back > 100_000  # of 10 times 132 MiB, 337,920 pages
    assert faults("memory.keep()", thread) < 10_000


def test_another_c_library_is_left_alone(monkeypatch):
    from dcgan import memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("asked for the C library"))
    memory.keep()
