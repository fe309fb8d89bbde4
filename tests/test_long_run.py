"""The memory of a long run stays what it was."""

import ctypes
import gc
import os
from pathlib import Path

import pytest
from test_training import llama, make, short_text

from mpsae.training import loop, train

__all__ = ["llama", "make", "short_text"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")


def resident():
    """Bytes of memory that are really taken."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")
@pytest.mark.parametrize("steps", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_memory_of_a_long_run_is_flat(steps, make, llama, monkeypatch):
    real, found = loop.take_step, []

    def look(config, job, rows, step, **known):
        if step % (steps // 20) == 0 and job.name.startswith("matching"):
            found.append(resident())
        return real(config, job, rows, step, **known)

    monkeypatch.setattr(loop, "take_step", look)
    both = ["matching_pursuit", "batch_topk"]
    config = make(architecture=both, max_tokens=steps * 64, checkpoint_every=steps // 40)
    train(config, **llama)
    warm = found[4]  # a fifth of the run
    curve = [round(n / 2**20, 1) for n in found]
    assert max(found[4:]) < 1.05 * warm, curve
    assert max(found[4:]) - warm < 5 * 2**20, curve
