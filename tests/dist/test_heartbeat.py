"""A rank that is done and gone is not lost, however slowly the others hear of it."""

import json
import subprocess
import time

import torch
import torch.distributed as dist

from helpers.ranks import run_ranks
from rwkv_clip.dist import World
from rwkv_clip.training.faults import watchdog


def watch_one_that_is_done() -> None:
    peer = subprocess.Popen(["sleep", "60"])
    store = dist.HashStore()
    sign = {"count": 1, "step": 7, "state": watchdog.TRAINING, "place": "", "signal": 0}
    sign |= {"failed": False, "cause": "", "error": ""}
    sign |= {"host": "here", "pid": peer.pid, "where": watchdog.own_host(), "began": watchdog.start_time(peer.pid)}
    store.set("beat/1", json.dumps(sign))
    heart = watchdog.Heartbeat(World(0, 2, torch.device("cpu"), store), timeout=60)
    while 1 not in heart._seen:
        time.sleep(0.01)
    # Between two of our beats it says that it is done, and ends; /proc tells us of the end first.
    store.set("beat/1", json.dumps(sign | {"count": 2, "state": watchdog.LEFT}))
    peer.kill()
    peer.wait()
    time.sleep(4)  # lost, it would end this process with code 5
    assert not heart.cause
    heart.leave(None)


def test_a_rank_that_is_done_is_not_lost(tmp_path):
    run_ranks(1, tmp_path, watch_one_that_is_done)
