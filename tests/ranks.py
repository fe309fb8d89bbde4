"""Processes of a gloo group, forked from the test's own: nothing is imported again."""

import os
import pickle
import sys
import time
import traceback

import torch.distributed as dist
from tqdm import tqdm

TIMEOUT = 60.0
tqdm.monitor_interval = 0  # a thread, which no fork has


def run_ranks(size, work, folder):
    """Give what ``work(rank)`` returns in each of so many processes, or the exception it raises."""
    folder.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _live(rank, size, work, folder)
        children.append(child)
    deadline, waiting = time.monotonic() + TIMEOUT, set(children)
    while waiting and time.monotonic() < deadline:
        waiting -= {child for child in waiting if os.waitpid(child, os.WNOHANG)[0]}
        time.sleep(0.005)
    for child in waiting:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert not waiting, f"{len(waiting)} of {size} processes hung"
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(size)]


def _live(rank, size, work, folder):
    try:
        store = dist.FileStore(str(folder / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        try:
            result = work(rank)
        except (Exception, KeyboardInterrupt) as error:
            if not isinstance(error, (ValueError, OSError, KeyboardInterrupt)):
                traceback.print_exc(file=sys.__stderr__)
            result = error
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
        dist.destroy_process_group()
    finally:
        os._exit(0)
