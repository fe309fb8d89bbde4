import itertools
import json
import os
import random
import shutil
import signal
from dataclasses import replace as changed

import pytest
import torch
from test_training import assert_same_state, lines_of, llama, make, short_text

from mpsae.activations import BufferConfig, TextConfig
from mpsae.activations import replace as replaced
from mpsae.training import loop, state, train
from mpsae.training.interrupt import Stopped

__all__ = ["llama", "make", "short_text"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = ["matching_pursuit", "batch_topk"]


class Killed(BaseException):
    """Stands for a power cut: nothing in the package catches it."""


def stop_at(monkeypatch, step, error):
    """Let the given step (from 1) end in an exception, half-way through the SAEs."""
    real = loop.take_step

    def take_step(config, job, rows, number, **known):
        if number + 1 == step and job.name.startswith(config.architecture[-1]):
            raise error
        return real(config, job, rows, number, **known)

    monkeypatch.setattr(loop, "take_step", take_step)


def kill(config, step, models, error=Killed):
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step, error())
        with pytest.raises(error):
            train(config, **models)


@pytest.fixture(scope="module")
def untouched(tiny_models, short_text, tmp_path_factory, llama):
    """Jobs and lines of a run that nothing interrupts."""
    config = make.__wrapped__(tiny_models, short_text, tmp_path_factory.mktemp("whole"))(
        architecture=BOTH
    )
    return train(config, **llama), lines_of(config)


def names(config):
    return sorted(p.name for p in config.out.iterdir())


@pytest.mark.parametrize("step", [5, 9, 12])
def test_resumed_run_equals_an_uninterrupted_one(step, make, llama, untouched):
    config = make(architecture=BOTH)
    kill(config, step, llama)
    jobs = train(changed(config, resume=True), **llama)
    assert_same_state(jobs, untouched[0])
    for line, whole in zip(lines_of(config), untouched[1], strict=True):
        assert {k: v for k, v in line.items() if k != "tokens_per_s"} == {
            k: v for k, v in whole.items() if k != "tokens_per_s"
        }


def test_resumed_run_equals_an_uninterrupted_one_over_several_passes(make, llama):
    """The text is read three times, and the buffer is drawn down between checkpoints."""
    options = {"max_tokens": 110 * 64, "checkpoint_every": 13, "log_every": 50}
    whole = train(make(**options), **llama)
    config = make(out=make().out / "again", **options)
    for step in (14, 40, 41, 107):
        kill(config, step, llama)
        config = changed(config, resume=True)
    assert_same_state(train(config, **llama), whole)


def test_one_pass_resumed_reads_the_rest_only(make, llama):
    whole = train(make(max_tokens=None), **llama)
    config = make(max_tokens=None, out=make().out / "again")
    kill(config, 10, llama)
    jobs = train(changed(config, resume=True), **llama)
    assert_same_state(jobs, whole)


def test_killed_run_keeps_its_last_two_checkpoints(make, llama):
    config = make()
    kill(config, 3, llama)
    assert names(config) == ["config.json", "metrics.jsonl"]
    kill(config, 12, llama)  # nothing was there to be lost
    assert names(config) == ["checkpoint-4", "checkpoint-8", "config.json", "metrics.jsonl"]
    assert [line["step"] for line in lines_of(config)] == list(range(1, 12))
    assert state.checkpoints(config.out)[-1].name == "checkpoint-8"
    with pytest.raises(ValueError, match="holds a run already; pass --resume or another --out"):
        train(config, **llama)
    train(changed(config, resume=True), **llama)
    assert [p.name for p in state.checkpoints(config.out)] == ["checkpoint-8", "checkpoint-12"]
    with pytest.raises(ValueError, match="holds a run already"):
        train(config, **llama)


def test_failing_write_leaves_no_half_checkpoint(make, llama, monkeypatch):
    real, calls = state.save_file, []

    def full_disk(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:  # two files a checkpoint: the second half of the second one
            raise OSError("no space left on device")
        return real(*args, **kwargs)

    config = make()
    monkeypatch.setattr(state, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        train(config, **llama)
    assert names(config) == ["checkpoint-4", "config.json", "metrics.jsonl"]


def test_what_a_killed_run_was_writing_is_cleared(make, llama, untouched):
    config = make(architecture=BOTH)
    kill(config, 6, llama)
    good = config.out / "checkpoint-4"
    shutil.copytree(good, config.out / ".checkpoint-8.4711")
    shutil.copytree(good, config.out / "checkpoint-of-mine")
    (config.out / ".metrics.jsonl.4711").write_text("half")
    (config.out / ".mine.4711").write_text("kept")
    assert state.checkpoints(config.out) == [good]
    assert_same_state(train(changed(config, resume=True), **llama), untouched[0])
    assert [p.name for p in config.out.glob(".*")] == [".mine.4711"]
    assert (config.out / "checkpoint-of-mine").exists()


SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_interrupt_ends_with_a_checkpoint_of_a_whole_step(
    number, step, make, llama, untouched, monkeypatch, capsys
):
    real = loop.take_step

    def take_step(config, job, rows, taken, **known):
        if taken + 1 == step and job.name.startswith(config.architecture[0]):
            os.kill(os.getpid(), number)
        return real(config, job, rows, taken, **known)

    config = make(architecture=BOTH)
    before = [signal.getsignal(n) for n in SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", take_step)
        with pytest.raises(Stopped) as stopped:
            train(config, **llama)
    assert stopped.value.signal == number
    assert [signal.getsignal(n) for n in SIGNALS] == before
    folder = config.out / f"checkpoint-{step}"
    said = f"stopped by {number.name}; go on with --resume from {folder}"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert_same_state(train(changed(config, resume=True), **llama), untouched[0])


@pytest.mark.parametrize("second", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("first", SIGNALS, ids=lambda number: number.name)
def test_second_interrupt_stops_at_once_without_a_torn_checkpoint(
    first, second, make, llama, monkeypatch
):
    def take_step(*_, **known):
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), second)
        raise AssertionError("went on after two interrupts")

    def stop(*_):
        raise Killed

    config = make()
    monkeypatch.setattr(loop, "take_step", take_step)
    before = [signal.signal(number, stop) for number in SIGNALS]
    try:
        with pytest.raises(Killed):
            train(config, **llama)
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
    assert state.checkpoints(config.out) == []


def test_a_signal_that_is_ignored_stays_ignored(make, llama, monkeypatch):
    real = loop.take_step

    def take_step(*arguments, **known):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **known)

    monkeypatch.setattr(loop, "take_step", take_step)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a shell's background jobs
    try:
        assert train(make(max_tokens=128), **llama)
    finally:
        signal.signal(signal.SIGINT, before)


def test_activations_that_turn_nan_keep_the_checkpoint_and_the_run(make, llama, untouched):
    passes = []

    def spoil(x):
        passes.append(len(x))
        return x * float("nan") if len(passes) == 7 else x  # the first one asks for the width

    config = make(architecture=BOTH)
    with (
        replaced(llama["model"], {"layers.1": spoil}),
        pytest.raises(ValueError, match=r"hookpoint 'layers.1', batch 5 of the model, holds nan"),
    ):
        train(config, **llama)
    assert state.checkpoints(config.out)
    assert_same_state(train(changed(config, resume=True), **llama), untouched[0])


def test_gradient_that_is_not_finite_leaves_the_sae_as_it_was(make, llama, monkeypatch):
    config = make(buffer=BufferConfig(buffer_tokens=512, model_batch=8, check_finite=False))
    real = loop.take_step

    def take_step(config, job, rows, step, **known):
        if step == 5:
            before = {name: p.clone() for name, p in job.sae.state_dict().items()}
            with pytest.raises(ValueError, match=r"gradient of matching_pursuit/layers.1 is nan"):
                real(config, job, rows * float("nan"), step, **known)
            assert all(torch.equal(p, before[n]) for n, p in job.sae.state_dict().items())
            raise Killed
        return real(config, job, rows, step, **known)

    monkeypatch.setattr(loop, "take_step", take_step)
    with pytest.raises(Killed):
        train(config, **llama)


@pytest.mark.parametrize(
    "options",
    [{"k": 4}, {"lr": 1e-4}, {"architecture": ["topk"]}, {"architecture": ["matching_pursuit"]},
     {"hookpoints": ["layers.0"]}, {"seed": 1}, {"text": TextConfig(context=32)},
     {"sae": ["aux_k=3"]}, {"batch_tokens": 32}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_resuming_with_other_settings_is_refused_before_anything_is_lost(options, make, llama):
    config = make(architecture=BOTH)
    kill(config, 6, llama)
    before = {p: p.read_bytes() for p in config.out.rglob("*") if p.is_file()}
    other = make(**{"architecture": BOTH, "resume": True} | options)
    with pytest.raises(ValueError, match=f"has {next(iter(options))}=.* but now asked for is"):
        train(other, **llama)
    assert {p: p.read_bytes() for p in config.out.rglob("*") if p.is_file()} == before


def test_what_may_change_on_resuming_changes(make, llama):
    config = make()
    train(config, **llama)
    longer = make(resume=True, max_tokens=15 * 64, checkpoint_every=1, log_every=2)
    train(longer, **llama)
    assert [p.name for p in state.checkpoints(config.out)] == ["checkpoint-14", "checkpoint-15"]
    assert [line["step"] for line in lines_of(config)] == [*range(1, 13), 14]
    assert json.loads((config.out / "finished.json").read_text()) == {"step": 15}


def test_nothing_to_resume_is_an_error(make, llama):
    with pytest.raises(ValueError, match="nothing to resume: no checkpoint in"):
        train(make(resume=True), **llama)


NAME = "checkpoint-4/matching_pursuit/layers.1"


@pytest.mark.parametrize(
    "file",
    ["checkpoint-4/progress.json", "checkpoint-4/buffer.safetensors", "config.json",
     f"{NAME}/cfg.json", f"{NAME}/sae_weights.safetensors", f"{NAME}/training_state.safetensors"],
    ids=lambda file: file.rpartition("/")[2],
)  # fmt: skip
def test_damaged_checkpoint_names_the_file(file, make, llama):
    config = make()
    kill(config, 6, llama)
    path = config.out / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match=str(path)):
        train(changed(config, resume=True), **llama)
    path.unlink()
    with pytest.raises(OSError, match=path.name):
        train(changed(config, resume=True), **llama)


def test_nothing_depends_on_the_global_generators(make, llama, untouched, monkeypatch):
    """So their state need not be in a checkpoint."""
    real, seeds = loop.take_step, iter(range(100))

    def take_step(*arguments, **known):
        seed = next(seeds)
        torch.manual_seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), random.getstate()
        found = real(*arguments, **known)
        after = torch.get_rng_state(), random.getstate()
        assert torch.equal(before[0], after[0])
        assert before[1] == after[1]
        return found

    monkeypatch.setattr(loop, "take_step", take_step)
    assert_same_state(train(make(architecture=BOTH), **llama), untouched[0])
    assert train(make(out=make().out / "drops", sae=["atom_dropout=0.5"]), **llama)


def test_rate_after_a_resume_is_of_what_was_done_since(make, llama, monkeypatch):
    config = make()
    now = itertools.count()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(now))
    kill(config, 7, llama)
    (job,) = train(changed(config, resume=True), **llama)
    assert [line["tokens_per_s"] for line in lines_of(config)] == [64.0] * 12
    assert (job.tokens, job.seconds) == (8 * 64, 8)
