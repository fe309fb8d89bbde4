"""A warm process whose forked children train, and are killed or meet a full disk.

Each line on stdin is an object: ``arguments`` of `mpsae`, and one of ``kill_after`` (seconds),
``die_at`` (the n-th touch of a file below ``watched``), ``full_at`` (the n-th such touch that
writes) and ``largest`` (bytes, beyond which no file grows). The answer is a line with the child's
``status`` (negative: the signal), ``seconds``, ``touches`` and the last lines of its ``stderr``.
"""

import errno
import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

WRITES = {"os.rename", "os.mkdir", "mpsae.fsync"}


def touched(event, arguments, watched):
    """Whether a file below a folder is opened, renamed, removed or synced; and for writing."""
    if event not in {"open", "os.remove", "os.rmdir", *WRITES} or not arguments:
        return False, False
    if watched not in str(arguments[0]):
        return False, False
    writes = event in WRITES
    if event == "open":
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR))
    return True, writes


def child(order, report):
    from mpsae.cli.main import main
    from mpsae.sae import checkpoint

    watched, counts = order.get("watched"), {"touches": 0, "writes": 0}

    def hook(event, arguments):
        touch, write = touched(event, arguments, watched)
        counts["touches"] += touch
        counts["writes"] += write
        if touch and counts["touches"] == order.get("die_at"):
            os._exit(9)
        if write and counts["writes"] == order.get("full_at"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    real = checkpoint.sync

    def sync(path):  # without waiting for the disk: the machine stays on
        sys.audit("mpsae.fsync", path)

    if watched is not None:
        for module in list(sys.modules.values()):
            if getattr(module, "sync", None) is real:
                module.sync = sync
        sys.addaudithook(hook)
    if "largest" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest"],) * 2)
    status = main(order["arguments"])
    os.write(report, json.dumps(counts).encode())
    return status


def serve(order):
    readable, report = os.pipe()
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.dup2(errors.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                status = child(order, report)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(report)
        if "kill_after" in order:
            time.sleep(order["kill_after"])
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        seconds = time.perf_counter() - started
        counts = json.loads(os.read(readable, 1000) or b"{}")
        os.close(readable)
        errors.seek(0)
        lines = errors.read().decode().splitlines()
    return {"status": status, "seconds": seconds, "stderr": lines[-30:], **counts}


def warm_up(arguments):
    """Do all of a training once, so that what the children do is the work alone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    from tqdm import tqdm

    from mpsae.activations import text
    from mpsae.cli.main import main
    from mpsae.training import stream

    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # a thread, which no fork survives
    # one document without the package datasets, which has threads too
    text.load_documents = lambda config, side="train", share=(0, 1): [
        Path(config.dataset).read_text()
    ]
    real, loaded = stream.load_language_model, {}

    def load(name, **options):
        if name not in loaded:
            loaded[name] = real(name, **options)
        return loaded[name]

    stream.load_language_model = load
    with tempfile.TemporaryDirectory() as out, open(os.devnull, "w") as nowhere:
        sys.stdout, kept = nowhere, sys.stdout
        main([*arguments, "--out", out])
        sys.stdout = kept
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("a thread is left, and a fork would lose it")


if __name__ == "__main__":
    warm_up(sys.argv[1:])
    for line in sys.stdin:
        sys.stdout.write(json.dumps(serve(json.loads(line))) + "\n")
        sys.stdout.flush()
