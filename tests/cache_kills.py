"""Kill `mpsae cache` at random moments, from one warm process: a program for test_cache_faults.

    python cache_kills.py FOLDER MODEL TEXT KILLS SEED

Each process is forked from this one, which has imported everything by writing a cache itself. After
every kill what the index names must be whole; whenever a process ends by itself, the folder must be
the uninterrupted one byte for byte, and a new one is begun.
"""

import os
import random
import shutil
import signal
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from tqdm import tqdm

from mpsae.activations import CacheSource, read_index, text
from mpsae.cli.main import main


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cache(out, model, text):
    argv = ["cache", model, text, "--out", str(out), "--hookpoints", "layers.1", "layers.0.mlp"]
    argv += ["--context", "24", "--model_batch", "4", "--shard_tokens", "90", "--dtype", "fp32"]
    with redirect_stdout(StringIO()):
        return main(argv)


def start(*arguments):
    child = os.fork()
    if child == 0:
        os._exit(cache(*arguments))
    return child


def check_whole(folder):
    """Open and compare every shard that the index names; how many there are."""
    if not (folder / "index.json").exists() or not read_index(folder).tokens:
        return 0
    source = CacheSource(folder)
    assert sum(found.lengths[0] for found in source.rows(0, 0)) == source.index.tokens
    return len(source.index.shards)


def kill(folder, model, document, kills, seed):
    chance = random.Random(seed)
    whole, out = folder / "whole", folder / "out"
    assert cache(whole, model, document) == 0  # in this process, so that the others start warm
    assert check_whole(whole) > 20
    assert len(os.listdir("/proc/self/task")) == 1, "a thread is left"
    expected, started = contents(whole), time.monotonic()
    assert os.waitpid(start(out, model, document), 0)[1] == 0
    taken = time.monotonic() - started
    assert contents(out) == expected
    shutil.rmtree(out)
    killed, finished, seen = 0, 0, set()
    while killed < kills or not finished:
        child = start(out, model, document)
        if killed < kills:
            time.sleep(chance.uniform(0.2, 1.0) * taken)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            killed += 1
            seen.add(check_whole(out))
            continue
        assert status == 0, status
        finished += 1
        assert contents(out) == expected
        shutil.rmtree(out)
    sys.stdout.write(f"{killed} killed, {finished} finished, shards {sorted(seen)}\n")


if __name__ == "__main__":
    # a fork has none of the other threads, and waits for ever for a lock that one of them held
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0
    text.load_documents = lambda config, *_, **__: [Path(config.dataset).read_text()]
    kill(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
