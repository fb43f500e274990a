"""Choice of device and autocast dtype; freed memory stays with the process (page faults, counted in a new one)."""

import platform
import subprocess
import sys

import pytest
import torch

from rwkv_clip.device import autocast_dtype, choose_device

SCRIPT = """
import resource, sys, torch
from rwkv_clip.device import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        a, b = torch.ones(4 << 20), torch.ones(8 << 20)  # 16 and 32 MiB
        del a, b
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(20):
    faults()  # every part of what the process keeps has been touched once
print(kept, faults())
"""


def test_a_device_by_name_or_the_best_present():
    assert choose_device("cpu") == torch.device("cpu") and choose_device().type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match=r"device: 'toaster' cannot be used here \(.+\); leave it out for the best"):
        choose_device("toaster")


def test_precision_names():
    device = torch.device("cpu")
    assert autocast_dtype("fp32", device) is None
    assert autocast_dtype("bf16", device) == torch.bfloat16
    assert autocast_dtype("auto", device) in (None, torch.bfloat16)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_not_faulted_in_again():
    def run(mode):
        return subprocess.run(
            [sys.executable, "-c", SCRIPT, mode], check=True, capture_output=True, text=True
        ).stdout.split()

    kept, faults = run("keep")
    assert kept == "True" and int(faults) < 20
    assert int(run("default")[1]) > 40  # else this test sees nothing; pages may be huge
