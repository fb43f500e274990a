"""A rank that is done and gone is not lost, however slowly the others hear of it."""

import json
import subprocess
import time
from dataclasses import asdict, replace

import torch
import torch.distributed as dist

from helpers.ranks import run_ranks
from rwkv_clip.dist import World
from rwkv_clip.training.faults.peers import LEFT, TRAINING, Sign
from rwkv_clip.training.faults.process import Process, start_time
from rwkv_clip.training.faults.signals import Preemption
from rwkv_clip.training.faults.watchdog import PeerWatchdog


def watch_one_that_is_done() -> None:
    peer = subprocess.Popen(["sleep", "60"])
    store = dist.HashStore()
    process = replace(Process.own(), pid=peer.pid, began=start_time(peer.pid))
    sign = Sign(process, 1, 7, TRAINING, "", in_collective=False, signal=0, failed=False, cause="", error="")
    store.set("watchdog/1", json.dumps(asdict(sign)))
    dog = PeerWatchdog(World(0, 2, torch.device("cpu"), store), 60, Preemption())
    dog.start()
    while 1 not in dog.peers.heard:
        time.sleep(0.01)
    # Between two of our signs it says that it is done, and ends; /proc shows the end first.
    store.set("watchdog/1", json.dumps(asdict(replace(sign, count=2, state=LEFT))))
    peer.kill()
    peer.wait()
    time.sleep(4)  # lost, it would end this process with code 5
    assert not dog.cause
    dog.leave(None)


def test_a_rank_that_is_done_is_not_lost(tmp_path):
    run_ranks(1, tmp_path, watch_one_that_is_done)
