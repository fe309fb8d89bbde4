"""Kills, full disks and damaged files at any moment: a resumed run ends as one left alone."""

import errno
import json
import os
import random
import shutil
import signal

import pytest
import torch
from survival import Survivor, assert_same_result, result

from mpsae.sae import TopKConfig, TopKSAE, checkpoint
from mpsae.training import checksums, logging, state

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


@pytest.fixture(scope="module")
def survivor(tiny_models, text_file, tmp_path_factory):
    text = tmp_path_factory.mktemp("short") / "short.txt"
    text.write_text(text_file.read_text()[:6000])
    survivor = Survivor(tiny_models["llama"][0], text)
    yield survivor
    survivor.close()


@pytest.fixture(scope="module")
def finished(survivor, tmp_path_factory):
    """Folder of a run that nothing stopped, and what survivor.py said of it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    said = survivor.train(out)
    assert said["status"] == 0, said["stderr"]
    return out, said


@pytest.fixture(scope="module")
def whole(finished):
    return result(finished[0])


def finish(survivor, out, whole):
    said = survivor.train(out)
    assert said["status"] == 0, said["stderr"]
    assert_same_result(out, whole)


@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_at_a_random_moment_ends_as_if_it_never_was(
    seed, survivor, finished, whole, tmp_path
):
    delay = random.Random(seed).uniform(0, finished[1]["seconds"])
    said = survivor.train(tmp_path / "run", kill_after=delay)
    assert said["status"] in (-signal.SIGKILL, 0)
    finish(survivor, tmp_path / "run", whole)


@pytest.mark.slow  # 20 s
def test_a_run_killed_twenty_times_ends_as_if_it_never_was(survivor, tmp_path):
    longer = ["--max_tokens", str(400 * 64), "--checkpoint_every", "7"]
    said = survivor.train(tmp_path / "whole", *longer)
    draw = random.Random(0)
    kills, rate = 0, said["seconds"] / 400
    while kills < 20:
        delay = draw.uniform(0, 40 * rate)
        kills += survivor.train(tmp_path / "run", *longer, kill_after=delay)["status"] < 0
    assert survivor.train(tmp_path / "run", *longer)["status"] == 0
    assert_same_result(tmp_path / "run", result(tmp_path / "whole"))


def test_a_run_that_dies_as_it_touches_a_file_ends_as_if_it_never_was(
    survivor, finished, whole, tmp_path
):
    for place in random.Random(1).sample(range(1, finished[1]["touches"]), 5):
        out = tmp_path / f"{place}"
        assert survivor.train(out, die_at=place)["status"] == 9
        finish(survivor, out, whole)


@pytest.mark.slow  # 25 s
def test_a_run_that_dies_at_any_touch_of_a_file_ends_as_if_it_never_was(
    survivor, finished, whole, tmp_path
):
    for place in range(1, finished[1]["touches"], 3):
        out = tmp_path / f"{place}"
        assert survivor.train(out, die_at=place)["status"] == 9
        finish(survivor, out, whole)
        shutil.rmtree(out)


def refused(said):
    """The one line of a run that ended on a full disk."""
    assert said["status"] == 2
    assert len(said["stderr"]) == 1, said["stderr"]
    assert said["stderr"][0].startswith("mpsae: error: ")
    return said["stderr"][0]


def test_a_full_disk_ends_a_run_in_one_line_and_loses_nothing(survivor, finished, whole, tmp_path):
    for place in random.Random(2).sample(range(1, finished[1]["writes"]), 5):
        out = tmp_path / f"{place}"
        line = refused(survivor.train(out, full_at=place))
        assert "No space left on device" in line
        left = state.checkpoints(out)
        for folder in left:
            checksums.verify(folder)
        if "no checkpoint of step" in line and left:
            assert line.endswith(f"the run goes on with --resume from {left[-1]}")
        assert not list(out.glob(".checkpoint-*"))
        finish(survivor, out, whole)


@pytest.mark.parametrize("largest", [100, 1500, 4095, 20_000])
def test_no_byte_is_written_where_a_file_cannot_grow(largest, survivor, whole, tmp_path):
    """The system itself refuses, in the middle of any file that is larger."""
    assert "File too large" in refused(survivor.train(tmp_path / "run", largest=largest))
    finish(survivor, tmp_path / "run", whole)


# one checkpoint written again and again, with everything failing once it "died"


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the disk may be slow
    sae = TopKSAE(TopKConfig(d_in=6, d_sae=12, k=2))
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)
    for x in torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)):
        sae(x).loss.backward()
        optimizer.step()
    return {"topk/a": (sae, optimizer)}


PROGRESS = {"tokens": 1, "streams": [{"sequences_read": 2, "sequences_of_pass": 3}]}
BUFFER = {"numbers": torch.arange(4)}


def save(run, step, parts, keep=2, buffer=BUFFER):
    return state.save_checkpoint(run, step, PROGRESS, parts, buffer, keep=keep)


class Fault:
    """Let the n-th call of what writes, syncs, renames or removes raise; and all later, if dead."""

    def __init__(self, patch, number, error, *, dead):
        self.number, self.error, self.dead, self.calls = number, error, dead, 0
        for module, name in [
            (state, "save_file"), (checkpoint, "save_file"), (os, "replace"), (os, "unlink"),
            (os, "fsync"), (os, "mkdir"), (os, "rmdir"), (state.shutil, "rmtree"),
        ]:  # fmt: skip
            patch.setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, real):
        def call(*arguments, **options):
            self.calls += 1
            if self.calls == self.number or (self.dead and self.calls > self.number):
                raise self.error
            return real(*arguments, **options)

        return call


def whole_steps(run):
    for folder in state.checkpoints(run):
        checksums.verify(folder)
    return [int(folder.name.partition("-")[2]) for folder in state.checkpoints(run)]


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("kind", ["new", "drop the buffer"])
def test_a_kill_at_each_call_leaves_whole_checkpoints_only(kind, keep, parts, tmp_path):
    number, done = 0, False
    while not done:
        number += 1
        run = tmp_path / f"{number}"
        for step in (1, 2):
            save(run, step, parts, keep)
        before = whole_steps(run)
        step, buffer = (3, BUFFER) if kind == "new" else (2, None)
        with pytest.MonkeyPatch.context() as patch:
            fault = Fault(patch, number, Killed(), dead=True)
            try:
                save(run, step, parts, keep, buffer)
                done = True
            except Killed:
                pass
        assert fault.calls >= number or done
        found = whole_steps(run)
        assert set(before) <= set(found) or step in found
        state.load_checkpoint(state.checkpoints(run)[-1], parts)
        save(run, 4, parts, keep)
        assert not list(run.glob(".*"))
        assert len(state.checkpoints(run)) == keep
    assert number > (20 if kind == "new" else 5)


def test_a_full_disk_at_each_call_names_the_checkpoint_to_go_on_from(parts, tmp_path):
    number, done = 0, False
    while not done:
        number += 1
        run = tmp_path / f"{number}"
        for step in (1, 2):
            save(run, step, parts)
        with pytest.MonkeyPatch.context() as patch:
            Fault(patch, number, OSError(errno.ENOSPC, "No space left on device"), dead=False)
            try:
                save(run, 3, parts)
                done = True
            except OSError as error:
                found = str(error)
        if done:
            break
        steps = whole_steps(run)
        if steps[-1] == 2:
            assert steps == [1, 2]
            assert "no checkpoint of step 3 could be written ([Errno 28] No space" in found
            assert found.endswith(f"--resume from {run / 'checkpoint-2'}")
        else:  # the new one is in place: only what is old could not be removed
            assert steps[-2:] == [2, 3]
    assert number > 20


def test_the_first_checkpoint_has_none_to_go_back_to(parts, tmp_path, monkeypatch):
    Fault(monkeypatch, 1, OSError(errno.ENOSPC, "No space left on device"), dead=False)
    with pytest.raises(OSError, match=r"no checkpoint of step 3 .*; it is the first"):
        save(tmp_path, 3, parts)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_as_many_checkpoints_are_kept_as_asked_for(keep, parts, tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, parts, keep)
        assert whole_steps(tmp_path) == list(range(max(1, step - keep + 1), step + 1))


# damaged checkpoints


def flips(draw, path):
    whole = path.read_bytes()
    for _ in range(3):
        place = draw.randrange(len(whole))
        yield whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]


def cuts(draw, path):
    whole = path.read_bytes()
    for length in {0, draw.randrange(len(whole)), len(whole) - 1}:
        yield whole[:length]
    yield whole + b"\0"
    yield None


def test_a_damaged_checkpoint_is_refused_with_the_file_and_the_one_before(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint-12"
    draw, refusals = random.Random(3), 0
    files = [p for p in newest.rglob("*") if p.is_file()]
    assert len(files) == 8
    for path in files:
        whole = path.read_bytes()
        for damaged in [*flips(draw, path), *cuts(draw, path)]:
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            with pytest.raises(OSError) as error:
                state.load_checkpoint(newest, {})
            assert str(path) in str(error.value)
            way = f"checkpoint-9 before it is whole: delete {newest} and pass --resume again"
            assert str(error.value).endswith(way)
            refusals += 1
            path.write_bytes(whole)
    state.load_checkpoint(newest, {})
    assert refusals >= 7 * len(files)


def test_the_way_that_is_offered_leads_to_the_same_end(survivor, finished, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    for name in ("checkpoint-12", "checkpoint-9"):
        path = out / name / "batch_topk" / "layers.1" / "training_state.safetensors"
        path.write_bytes(path.read_bytes()[:-7])
    line = refused(survivor.train(out))
    newest, older = out / "checkpoint-12", out / "checkpoint-9"
    assert "checkpoint-12/batch_topk/layers.1/training_state.safetensors is cut short" in line
    assert line.endswith(
        f"checkpoint-6 before it is whole: delete {newest} and {older} and pass --resume again"
    )
    shutil.rmtree(newest)
    shutil.rmtree(older)
    finish(survivor, out, whole)


def test_a_checkpoint_without_checksums_or_a_whole_one_before_it_is_refused(parts, tmp_path):
    folder = save(tmp_path, 1, parts)
    (folder / checksums.FILE).unlink()
    with pytest.raises(OSError, match=r"checksums.json is missing; no checkpoint before it is wh"):
        state.load_checkpoint(folder, parts)


def test_a_checkpoint_that_cannot_be_read_is_named(parts, tmp_path, monkeypatch):
    folder = save(tmp_path, 1, parts)
    real = checksums._describe

    def describe(path):
        if path.name == "progress.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(checksums, "_describe", describe)
    with pytest.raises(OSError, match=r"progress.json cannot be read \(.*Input/output error"):
        state.load_checkpoint(folder, parts)


def test_results_beside_an_sae_of_a_checkpoint_do_no_harm(parts, tmp_path):
    folder = save(tmp_path, 1, parts)
    (folder / "topk" / "a" / "evaluation").mkdir()
    (folder / "topk" / "a" / "evaluation" / "reconstruction.json").write_text("{}")
    assert state.load_checkpoint(folder, parts)["step"] == 1


# lines of metrics


@pytest.mark.parametrize("cut", [1, 2, 9, 30])
def test_a_line_that_was_cut_short_is_taken_out(cut, tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        logging.append(path, {"name": "a", "step": step, "fvu": 0.5})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = logging.kept_lines(path, 3)
    assert [line["step"] for line in kept] == [1, 2]
    logging.append(path, kept[0] | {"step": 3})
    assert path.read_bytes() == whole
    for odd in (b"[3]\n", b"17\n", b'{"step": null}\n', b"\xff\xfe\n", b'{"name": "a"}\n'):
        path.write_bytes(whole + odd)
        assert [line["step"] for line in logging.kept_lines(path, 9)] == [1, 2, 3]
        assert path.read_bytes() == whole
    assert json.loads(whole.splitlines()[0]) == {"name": "a", "step": 1, "fvu": 0.5}
