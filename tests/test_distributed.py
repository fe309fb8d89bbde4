"""Training on several processes: equal to one process on the same rows, files and errors once."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace as changed
from itertools import chain, product

import pytest
import torch
from ranks import run_ranks
from test_training import lines_of, llama, make, short_text

from mpsae.activations import TextConfig, load_documents, sequences
from mpsae.activations import replace as replaced
from mpsae.cli.main import main
from mpsae.training import TrainConfig, distributed, interrupt, loop, state, train
from mpsae.training.distributed import ALONE, Processes, rows_seen
from mpsae.training.job import Job
from mpsae.training.optimizers import make_optimizer
from mpsae.training.step import take_step

__all__ = ["llama", "make", "short_text"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")

D, N, B, STEPS = 8, 40, 48, 100
# dead latents from the second step on, revived and dying again
AUX = ["dead_after=96", "aux_k=3", "aux_coefficient=0.5"]
CASES = {
    "topk": ["multi_topk=true"],
    "matching_pursuit": ["coselection_coefficient=0.1", "atom_dropout=0.1"],
    "skip_transcoder": [],
    "batch_topk": [],
    "matryoshka": ["prefixes=0.25,1"],
    "batch_matching_pursuit": [],
}
BY_ROW = ["topk", "matching_pursuit", "skip_transcoder"]


def settings(architecture, accumulate=1):
    return TrainConfig(
        architecture=[architecture], k=3, d_sae=N, sae=[*CASES[architecture], *AUX], batch_tokens=B,
        accumulate=accumulate, warmup_steps=5, lr=3e-3, clip_grad_norm=0.5, max_tokens=B * STEPS,
    )  # fmt: skip


def new_job(config):
    (architecture,) = config.architecture
    sae = config.make_sae(architecture, D, D).double()
    optimizer = make_optimizer("adam", sae.parameters(), config.lr, fused=True)
    sae.constrain(optimizer)
    return Job(architecture, "layers.0", sae, optimizer)


def batches(config):
    """fp64 rows whose mean and size change from row to row, so that parts are unlike the whole."""
    width = 2 * D if "transcoder" in config.architecture[0] else D
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(16, width, generator=generator, dtype=torch.float64)
    for _ in range(STEPS):
        code = torch.randn(B, 16, generator=generator, dtype=torch.float64).relu() ** 2
        yield code @ mix + torch.linspace(-2, 3, B, dtype=torch.float64)[:, None]


def trained(config, mine=lambda rows: rows, processes=None):
    """Weights, counters and metrics after all steps on this process's part of the batches."""
    job, metrics = new_job(config), []
    if processes is not None:
        job.spread(processes)
    for step, rows in enumerate(batches(config)):
        rows = mine(rows)
        if step == 0:
            job.initialize(rows)
        metrics.append(take_step(config, job, rows, step, steps=STEPS, logged=True))
    job.collect()
    return [dict(job.sae.state_dict()), job.sae.rows_since_fired, metrics]


def part_of(rows, rank, size, accumulate):
    """Rows of one rank: the p-th parts of all ranks are together the p-th part of the whole."""
    return rows.unflatten(0, (accumulate, size, -1))[:, rank].flatten(0, 1)


def assert_close(found, expected):
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-9, atol=1e-9)
    assert torch.equal(found[1], expected[1])
    for one, other in zip(found[2], expected[2], strict=True):
        assert one == pytest.approx(other, rel=1e-7, abs=1e-12)
    # what the equality is about did happen
    assert sum("aux" in line for line in expected[2]) > STEPS // 4


@pytest.mark.parametrize(
    ("architecture", "size", "accumulate"),
    [
        *product(BY_ROW, [2], [1, 2]),
        ("matching_pursuit", 4, 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in product(["topk"], [4], [1, 2])),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in product(BY_ROW[1:], [4], [2])),
    ],
    ids=str,
)
def test_processes_take_the_steps_of_one_on_all_their_rows(
    architecture, size, accumulate, tmp_path
):
    config = settings(architecture, accumulate)

    def work(rank):
        def mine(rows):
            return part_of(rows, rank, size, accumulate)

        return trained(config, mine, Processes(rank, size))

    found = run_ranks(size, work, tmp_path / "ranks")
    assert_close(found[0], trained(config))
    for other in found[1:]:
        assert all(torch.equal(other[0][name], value) for name, value in found[0][0].items())


@pytest.mark.parametrize("architecture", ["batch_topk", "matryoshka", "batch_matching_pursuit"])
def test_what_shares_a_budget_stays_alike_in_all_processes(architecture, tmp_path):
    config = settings(architecture)

    def work(rank):
        return trained(config, lambda rows: rows.chunk(2)[rank], Processes(rank, 2))

    one, other = run_ranks(2, work, tmp_path / "ranks")
    assert all(torch.equal(other[0][name], value) for name, value in one[0].items())
    assert one[0]["threshold"] > 0
    assert one[2][-1]["fvu"] < 0.6 * one[2][0]["fvu"]
    alone = trained(config)
    assert one[2][-1]["fvu"] == pytest.approx(alone[2][-1]["fvu"], rel=0.3)


def test_rows_are_gathered_as_each_mode_says(tmp_path):
    owners = {"a": 1, "b": 0}

    def work(rank):
        batch = {"a": torch.full((2, 3), float(rank)), "b": torch.full((2, 1), 10.0 + rank)}
        return [
            rows_seen(Processes(rank, 2), batch, how, owners) for how in ("own", "owner", "all")
        ]

    both = run_ranks(2, work, tmp_path / "ranks")
    for rank, (own, owned, everything) in enumerate(both):
        assert own["a"].tolist() == [[rank] * 3] * 2
        assert list(owned) == ["ba"[rank]]
        assert everything["b"].flatten().tolist() == [10, 10, 11, 11]
        for name, rows in owned.items():
            assert torch.equal(rows, everything[name])
    batch = {"a": torch.ones(2, 3)}
    assert rows_seen(ALONE, batch, "all", {})["a"] is batch["a"]


def at_work(config, models, look=None):
    """Train in a process of the group: names, weights and counters of its jobs."""

    def work(rank):
        jobs = train(config, **models) if look is None else look(rank)
        return [(job.name, dict(job.sae.state_dict()), job.sae.rows_since_fired) for job in jobs]

    return work


def untimed(config):
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines_of(config)]


def weights(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.safetensors")
            if "buffer" not in p.name}  # fmt: skip


BOTH = ["matching_pursuit", "batch_topk"]


@pytest.mark.parametrize("spread", [False, True], ids=["own rows", "own hookpoints"])
def test_resumed_processes_go_on_bit_for_bit(spread, make, llama, tmp_path):
    options = {
        "architecture": BOTH, "hookpoints": ["layers.1", "layers.0.mlp"], "sae": ["dead_after=128"],
        "distribute_modules": spread,
    }  # fmt: skip
    whole = make(**options)
    run_ranks(2, at_work(whole, llama), tmp_path / "whole")
    config = make(out=tmp_path / "again", **options)

    def stopped(rank):
        real = loop.take_step

        def take_step(config, job, rows, step, **known):
            if step == 5 and rank == 1:
                for sent in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # as torchrun does
                    os.kill(os.getpid(), sent)
            return real(config, job, rows, step, **known)

        loop.take_step = take_step
        return train(config, **llama)

    ends = run_ranks(2, at_work(config, llama, stopped), tmp_path / "stopped")
    assert [type(end) for end in ends] == [interrupt.Stopped] * 2
    assert [p.name for p in state.checkpoints(config.out)] == ["checkpoint-4", "checkpoint-6"]
    run_ranks(2, at_work(changed(config, resume=True), llama), tmp_path / "resumed")
    assert weights(config.out) == weights(whole.out)
    assert untimed(config) == untimed(whole)
    names = [f"{a}/{h}" for a in BOTH for h in whole.hookpoints]
    assert [line["name"] for line in lines_of(whole)] == names * 12
    assert not list(config.out.glob(".checkpoint-*"))
    # another number of processes goes on too, with empty buffers
    progress = json.loads((whole.out / "checkpoint-12" / "progress.json").read_text())
    jobs = train(changed(whole, resume=True, max_tokens=14 * 64, distribute_modules=False), **llama)
    assert len(jobs) == 4
    assert lines_of(whole)[-1]["tokens"] == 14 * 64
    assert len(progress["streams"]) == 2


def test_owners_of_hookpoints_take_the_steps_of_one_process(make, llama, tmp_path, monkeypatch):
    config = make(
        architecture=["topk", "matching_pursuit", "batch_topk"],
        hookpoints=["layers.1", "layers.1.mlp:input", "layers.1.mlp"], distribute_modules=True,
        sae=["dead_after=128"],
    )  # fmt: skip

    def noting(rank):
        seen, real = [], loop.take_step

        def take_step(config, job, rows, step, **known):
            seen.append((job.name, step, rows))
            return real(config, job, rows, step, **known)

        loop.take_step = take_step
        jobs = train(config, **llama)
        return [
            (job.name, dict(job.sae.state_dict()), job.sae.rows_since_fired) for job in jobs
        ], seen

    found = run_ranks(2, noting, tmp_path / "ranks")
    rows = {(name, step): rows for _, seen in found for name, step, rows in seen}
    real = loop.take_step

    def on_these(config, job, _, step, **known):
        return real(config, job, rows[job.name, step], step, **known)

    monkeypatch.setattr(loop, "take_step", on_these)
    monkeypatch.setattr(
        loop.Job, "initialize",
        lambda job, _: job.sae.initialize_b_dec_(*job.split(rows[job.name, 0])),
    )  # fmt: skip
    alone = changed(config, distribute_modules=False, out=tmp_path / "alone")
    train(alone, **llama)
    assert weights(config.out / "checkpoint-12") == weights(alone.out / "checkpoint-12")
    assert untimed(config) == untimed(alone)
    assert [len(jobs) for jobs, _ in found] == [6, 3]


def sequence_rows(config, tokenizer, share=(0, 1), side="train"):
    found = sequences(tokenizer, config, side, batch=4, share=share)
    return [tuple(row) for part in found for row in part.ids.tolist()]


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_text_and_leave_the_held_out_part(size, short_text, llama, tmp_path):
    tokenizer = llama["tokenizer"]
    config = TextConfig(dataset=str(short_text), context=24)
    parts = [sequence_rows(config, tokenizer, (rank, size)) for rank in range(size)]
    assert sorted(chain(*parts)) == sorted(sequence_rows(config, tokenizer))
    held_out = set(sequence_rows(config, tokenizer, side="heldout"))
    assert held_out
    assert not held_out & set(chain(*parts))
    # where the held-out text is apart, documents are shared out
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20)))
    for streaming in (False, True):
        apart = TextConfig(dataset=str(file), heldout_split="train", streaming=streaming)
        own = [list(load_documents(apart, "train", (rank, size))) for rank in range(size)]
        assert sorted(chain(*own)) == sorted(f"text {i}" for i in range(20))
        assert min(map(len, own)) >= 20 // size
    stdlib = [load_documents(TextConfig(), "train", (rank, size)) for rank in range(size)]
    assert sum(map(len, stdlib)) == len(load_documents(TextConfig()))


def test_text_ends_for_all_where_it_ends_for_one(make, llama, tmp_path):
    config = make(max_tokens=None, batch_tokens=66)
    found = run_ranks(3, at_work(config, llama), tmp_path / "ranks")
    assert all(torch.equal(f[0][1]["dictionary"], found[0][0][1]["dictionary"]) for f in found)
    lines = lines_of(config)
    assert [line["tokens"] for line in lines] == [66 * n for n in range(1, len(lines) + 1)]
    assert len(lines) > 10
    assert (config.out / "finished.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hookpoints": ["layers.9"]}, "no module 'layers.9' in LlamaForCausalLM"),
        ({"batch_tokens": 33}, "batch_tokens=33 is no multiple of 2 processes"),
        ({"accumulate": 17}, "fewer than two rows to each of accumulate=17 parts in each of 2"),
        ({"distribute_modules": True}, "a hookpoint for each of 2 processes, and there are 1"),
        ({"device": "meta"}, "device='meta' is one for all processes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_of_settings_are_the_same_in_all_processes(options, message, make, llama, tmp_path):
    config = make(**options)
    for error in run_ranks(2, at_work(config, llama), tmp_path / "ranks"):
        assert isinstance(error, ValueError)
        assert message in str(error)
        assert "rank" not in str(error)
    assert not config.out.exists()


def test_error_of_one_process_ends_all_with_its_message(make, llama, tmp_path):
    config = make()

    def spoilt(rank):
        passes = []

        def spoil(x):
            passes.append(0)
            return x * float("nan") if rank == 1 and len(passes) == 5 else x

        with replaced(llama["model"], {"layers.1": spoil}):
            return train(config, **llama)

    started = time.monotonic()
    errors = run_ranks(2, spoilt, tmp_path / "ranks")
    assert time.monotonic() - started < 20
    assert str(errors[0]) == str(errors[1])
    assert "rank 1: hookpoint 'layers.1', batch 3 of the model, holds nan" in str(errors[0])
    assert state.checkpoints(config.out)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [*TORCHRUN, "-m", "mpsae", "train", *map(str, arguments)], env=environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_torchrun_speaks_once_and_leaves_the_files_of_one_process(make, tiny_models, short_text):
    config = make()
    options = [
        tiny_models["llama"][0], short_text, "--hookpoints", "layers.1", "--k", 3, "--d_sae", 64,
        "--max_tokens", 640, "--batch_tokens", 64, "--context", 24, "--buffer_tokens", 256,
        "--checkpoint_every", 5, "--log_every", 1, "--out", config.out,
    ]  # fmt: skip
    done = torchrun(*options)
    assert done.returncode == 0, done.stderr
    folder = config.out / "matching_pursuit/layers.1"
    assert done.stdout == f"{folder}\njudge it with: mpsae eval {config.out}\n"
    assert "warn" not in done.stderr.lower()
    assert [line["step"] for line in lines_of(config)] == list(range(1, 11))
    names = sorted(p.name for p in config.out.iterdir())
    assert names == ["checkpoint-10", "checkpoint-5", "config.json", "finished.json",
                     "matching_pursuit", "metrics.jsonl"]  # fmt: skip
    again = torchrun(*options)
    assert again.returncode == 1
    message = f"mpsae: error: {config.out} holds a run already; pass --resume or another --out"
    assert again.stderr.count("mpsae: error:") == again.stderr.count(message) == 1


@pytest.mark.parametrize("wrong", [["--lr", "0"], ["--nosuch"]], ids=" ".join)
def test_error_of_the_command_line_is_reported_by_the_first_process(wrong, monkeypatch, capfd):
    monkeypatch.setattr(distributed, "_PATIENCE", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["train", *wrong]) == 2
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    with contextlib.suppress(SystemExit):  # of the parser
        assert main(["train", *wrong]) == 2
    assert capfd.readouterr().err.count("error:") == 1
