"""Runs whose latents are spread over processes, against a single process on the same rows."""

import os
import signal
from dataclasses import replace as changed

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from test_distributed import untimed, weights
from test_training import llama, make, short_text

from mpsae import MatchingPursuitSAE
from mpsae.cli.main import main
from mpsae.training import interrupt, loop, state, train

__all__ = ["llama", "make", "short_text"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")
# dead latents from the third step on
AUX = ["dead_after=128", "aux_coefficient=0.5", "aux_k=3"]


@pytest.fixture
def spread(make):
    def settings(**options):
        settings = {"hookpoints": ["layers.1", "layers.0.mlp"], "dictionary_parallel": True}
        return make(architecture=["matching_pursuit"], **settings | {"sae": AUX} | options)

    return settings


def in_fp64(patch, rows_of=None):
    """Let the loop compute in fp64, on given rows if there are any; the rows that it saw."""
    real_jobs, real_step, seen = loop.make_jobs, loop.take_step, {}

    def make_jobs(*arguments, **known):
        jobs = real_jobs(*arguments, **known)
        for job in jobs:
            job.sae.double()
        return jobs

    def take_step(config, job, rows, step, **known):
        rows = rows.double() if rows_of is None else rows_of[job.name, step]
        seen[job.name, step] = rows
        return real_step(config, job, rows, step, **known)

    patch.setattr(loop, "make_jobs", make_jobs)
    patch.setattr(loop, "take_step", take_step)
    return seen


def at_work(config, models, stop_at=None):
    """Train in a process of the group, in fp64; what the loop saw."""

    def work(rank):
        with pytest.MonkeyPatch.context() as patch:
            seen = in_fp64(patch)
            real = loop.take_step

            def take_step(config, job, rows, step, **known):
                if step == stop_at and rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return real(config, job, rows, step, **known)

            patch.setattr(loop, "take_step", take_step)
            train(config, **models)
        return seen

    return work


def tensors(folder):
    return {f"{path.relative_to(folder)}: {name}": tensor
            for path in folder.rglob("*.safetensors") if "buffer" not in path.name
            for name, tensor in load_file(path).items()}  # fmt: skip


@pytest.mark.parametrize(("size", "tied"), [(2, True), (2, False), (4, True)], ids=str)
def test_latents_spread_over_processes_take_the_steps_of_one(
    size, tied, spread, llama, tmp_path, monkeypatch
):
    config = spread(sae=[*AUX, f"tied={tied}"])
    found = run_ranks(size, at_work(config, llama), tmp_path / "ranks")
    for other in found[1:]:
        assert all(torch.equal(other[key], rows) for key, rows in found[0].items())
    in_fp64(monkeypatch, found[0])
    monkeypatch.setattr(
        loop.Job, "initialize",
        lambda job, _: job.sae.initialize_b_dec_(found[0][job.name, 0].float()),
    )  # fmt: skip
    alone = changed(config, dictionary_parallel=False, out=tmp_path / "alone")
    train(alone, **llama)
    expected = tensors(alone.out / "checkpoint-12")
    written = tensors(config.out / "checkpoint-12")
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9, msg=name)
    for line, whole in zip(untimed(config), untimed(alone), strict=True):
        assert line.pop("name") == whole.pop("name")
        assert line == pytest.approx(whole, rel=1e-7, abs=1e-12)
    # what the equality is about did happen
    assert any("aux" in line for line in untimed(alone))
    sae = MatchingPursuitSAE.from_pretrained(config.out / "matching_pursuit" / "layers.1")
    assert sae.config.d_sae == len(sae.dictionary)
    assert sae.metadata["training_tokens"] == 12 * 64


def test_a_stopped_run_goes_on_bit_for_bit_and_alone(spread, llama, tmp_path):
    whole = spread()
    run_ranks(2, at_work(whole, llama), tmp_path / "whole")
    config = spread(out=tmp_path / "again")
    ends = run_ranks(2, at_work(config, llama, stop_at=5), tmp_path / "stopped")
    assert [type(end) for end in ends] == [interrupt.Stopped] * 2
    assert [p.name for p in state.checkpoints(config.out)] == ["checkpoint-4", "checkpoint-6"]
    run_ranks(2, at_work(changed(config, resume=True), llama), tmp_path / "resumed")
    assert weights(config.out) == weights(whole.out)
    assert untimed(config) == untimed(whole)
    assert not list(config.out.glob(".checkpoint-*"))
    # the files are those of a whole SAE, so one process can go on too
    alone = changed(whole, dictionary_parallel=False, resume=True, max_tokens=14 * 64)
    (first, _) = train(alone, **llama)
    assert len(first.sae.dictionary) == first.sae.config.d_sae


def test_a_single_process_has_all_latents(spread, llama):
    jobs = train(spread(), **llama)
    assert [type(job.sae) for job in jobs] == [MatchingPursuitSAE] * 2


def test_a_disk_that_is_full_ends_all_processes(spread, llama, tmp_path):
    config = spread(checkpoint_every=4)

    def work(rank):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                real = state.save_file

                def full(tensors, path):
                    if "checkpoint-8" in str(path):
                        raise OSError(28, "No space left on device")
                    real(tensors, path)

                patch.setattr(state, "save_file", full)
            return at_work(config, llama)(rank)

    errors = run_ranks(2, work, tmp_path / "ranks")
    assert [type(error) for error in errors] == [OSError] * 2
    for error in errors:
        assert "no checkpoint of step 8 could be written" in str(error)
        assert f"--resume from {config.out / 'checkpoint-4'}" in str(error)
    assert [p.name for p in state.checkpoints(config.out)] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--architecture", "topk"], "for architecture matching_pursuit alone, not topk"),
        (["--distribute_modules"], "do not go together"),
        (["--optimizer", "muon"], "an optimizer other than muon"),
        (["--turn_on_mp_step", "3"], "turn_on_mp_step=3 does not go"),
    ],
)
def test_what_cannot_be_spread_is_refused(options, said, tmp_path, capsys):
    assert main(["train", "--dictionary_parallel", "--out", str(tmp_path / "run"), *options]) == 2
    assert said in capsys.readouterr().err


def test_settings_that_shares_do_not_have_are_refused_by_all(spread, llama, tmp_path):
    config = spread(sae=["coselection_coefficient=1.0"])
    errors = run_ranks(2, at_work(config, llama), tmp_path / "ranks")
    assert str(errors[0]) == str(errors[1])
    assert "coselection_coefficient=1.0" in str(errors[0])
    assert not config.out.exists()
