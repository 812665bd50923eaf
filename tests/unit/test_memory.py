"""What is freed is kept: asking for the same memory again makes no page faults."""

import platform
import subprocess
import sys

import pytest

from dcgan import memory

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


class OlderLibrary:
    """Refuses a threshold of more than half a heap, as glibc did once."""

    def __init__(self, most):
        self.most, self.kept = most, {}

    def mallopt(self, parameter, value):
        if parameter == memory.M_MMAP_THRESHOLD and value > self.most:
            return 0
        self.kept[parameter] = value
        return 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another than glibc")
def test_an_older_library_keeps_what_it_can(monkeypatch, caplog):
    library = OlderLibrary(2**25)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    memory.keep()
    assert library.kept == {memory.M_TRIM_THRESHOLD: 2**30, memory.M_TOP_PAD: 2**30, memory.M_MMAP_THRESHOLD: 2**25}
    assert not caplog.text
    library.most = 0
    memory.keep()
    assert "does not keep freed memory: mallopt refused 1073741824 for -3" in caplog.text


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("asked for the C library"))
    memory.keep()
