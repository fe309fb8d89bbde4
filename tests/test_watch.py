"""What goes wrong in a run: skipped, said once, kept in events.jsonl, and the same when resumed."""

import json
from dataclasses import replace as changed

import pytest
import torch
from test_resume import kill
from test_training import assert_same_state, lines_of, llama, make, short_text

from mpsae.activations import replace as replaced
from mpsae.training import loop, train, watch
from mpsae.training.step import NotFinite, take_step

__all__ = ["llama", "make", "short_text"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = ["matching_pursuit", "batch_topk"]
SECOND = "batch_topk/layers.1"


def events_of(config):
    path = config.out / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def brief(config):
    return [(e["name"], e["step"], e["kind"], e["done"]) for e in events_of(config)]


def poison(monkeypatch, steps, value=float("nan")):
    """Spoil the rows that the second SAE gets in some steps (from 1)."""
    real = loop.take_step

    def spoilt(config, job, rows, step, **known):
        if step + 1 in steps and job.name == SECOND:
            rows = rows.clone()
            rows[3, 2] = value
        return real(config, job, rows, step, **known)

    monkeypatch.setattr(loop, "take_step", spoilt)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize(
    "architecture",
    ["matching_pursuit", "batch_matching_pursuit", "topk", "batch_topk", "matryoshka"],
)
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(
    architecture, value, make, llama, monkeypatch
):
    real = loop.take_step

    def look(config, job, rows, step, **known):
        if step != 5:
            return real(config, job, rows, step, **known)
        before = [t.clone() for t in (*job.sae.parameters(), *job.sae.buffers())]
        moments = [t.clone() for s in job.optimizer.state.values() for t in s.values()]
        with pytest.raises(NotFinite, match=f"of {architecture}/layers.1 is (nan|inf) at step 6"):
            take_step(config, job, rows.index_fill(0, torch.tensor([3]), value), step, **known)
        after = [*job.sae.parameters(), *job.sae.buffers()]
        assert all(map(torch.equal, before, after))
        assert all(p.grad is None for p in job.sae.parameters())
        later = [t for s in job.optimizer.state.values() for t in s.values()]
        assert moments
        assert all(map(torch.equal, moments, later))
        return real(config, job, rows, step, **known)

    monkeypatch.setattr(loop, "take_step", look)
    train(make(architecture=[architecture], d_sae=64, max_tokens=7 * 64), **llama)


def test_a_loss_that_is_not_finite_is_seen_though_its_gradient_is(make, llama, monkeypatch):
    from mpsae.sae import MatchingPursuitSAE

    def forward(self, x):
        output = real(self, x)
        losses = {n: v * 0 + float("inf") for n, v in output.losses.items()}
        return output._replace(losses={n: v.detach() + 0 * self.b_dec.sum() for n, v in
                                       losses.items()})  # fmt: skip

    real = MatchingPursuitSAE.forward
    monkeypatch.setattr(MatchingPursuitSAE, "forward", forward)
    with pytest.raises(
        ValueError, match=r"loss of matching_pursuit/layers.1 is (nan|inf) at step 1"
    ):
        train(make(), **llama)


def test_by_default_it_stops_and_the_run_can_go_on(make, llama, monkeypatch):
    whole = train(make(architecture=BOTH), **llama)
    config = make(architecture=BOTH, out=make().out / "again")
    with monkeypatch.context() as patch:
        poison(patch, {6})
        with pytest.raises(ValueError, match=rf"gradient of {SECOND} is nan at step 6"):
            train(config, **llama)
    assert brief(config) == [(SECOND, 6, "gradient", "stopped")]
    assert_same_state(train(changed(config, resume=True), **llama), whole)
    assert events_of(config) == []


def test_skipped_steps_are_said_once_and_harm_no_other_sae(make, llama, monkeypatch, capsys):
    alone = train(make(architecture=BOTH[:1], out=make().out / "alone"), **llama)
    config = make(architecture=BOTH, on_nonfinite="skip")
    poison(monkeypatch, {3, 4, 5, 6, 10})
    jobs = train(config, **llama)
    assert_same_state(jobs[:1], alone)
    assert all(torch.isfinite(p).all() for job in jobs for p in job.sae.parameters())
    assert brief(config) == [
        (SECOND, 3, "gradient", "skipped"), (SECOND, 7, "gradient", "over"),
        (SECOND, 10, "gradient", "skipped"), (SECOND, 11, "gradient", "over"),
    ]  # fmt: skip
    assert [e["hookpoint"] for e in events_of(config)] == ["layers.1"] * 4
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mpsae: ")]
    assert len(said) == 4
    assert said[0].startswith(f"mpsae: {SECOND}, step 3: gradient skipped: gradient of {SECOND} is")
    assert said[1] == f"mpsae: {SECOND}, step 7: gradient over: it lasted from step 3"
    steps = [line["step"] for line in lines_of(config) if line["name"] == SECOND]
    assert steps == [1, 2, 7, 8, 9, 11, 12]


def test_a_resumed_run_skips_and_says_the_same(make, llama, monkeypatch):
    poison(monkeypatch, {3, 4, 5, 6, 10})
    whole = make(architecture=BOTH, on_nonfinite="skip")
    jobs = train(whole, **llama)
    config = changed(whole, out=whole.out / "again")
    for step in (6, 8, 11):  # in the middle of what is skipped, behind it, and in another one
        kill(config, step, llama)
        config = changed(config, resume=step < 12 and any(config.out.glob("checkpoint-*")))
    assert_same_state(train(config, **llama), jobs)
    assert events_of(config) == events_of(whole)


def spoil_passes(numbers):
    passes = []

    def spoil(x):
        passes.append(len(x))
        if len(passes) - 2 not in numbers:  # the first two ask for the width
            return x
        x = x.clone()
        x[1:3, 5] = float("nan")
        return x

    return spoil


def test_rows_that_are_not_finite_are_left_out(make, llama):
    hookpoints = ["layers.1", "layers.0.mlp"]
    config = make(hookpoints=hookpoints, on_nonfinite="skip", max_tokens=40 * 64)
    with replaced(llama["model"], {"layers.1": spoil_passes({2, 3, 6})}):
        jobs = train(config, **llama)
    assert all(torch.isfinite(p).all() for job in jobs for p in job.sae.parameters())
    found = [(e["name"], e["kind"], e["done"]) for e in events_of(config)]
    both = [("layers.1", "activations", "skipped"), ("layers.1", "activations", "over")]
    assert found == both * 2
    assert "holds nan at row" in events_of(config)[0]["said"]
    assert "2 of " in events_of(config)[0]["said"]
    assert {line["step"] for line in lines_of(config)} == set(range(1, 41))


def test_a_dictionary_that_collapses_is_said_once(make, llama, capsys):
    config = make(k=1, d_sae=1024, sae=["dead_after=1"])
    train(config, **llama)
    name = "matching_pursuit/layers.1"
    assert brief(config) == [(name, 1, "collapse", "warned")]
    assert events_of(config)[0]["said"].endswith("of the latents are dead, more than 0.9")
    assert capsys.readouterr().err.count("mpsae: ") == 1
    stopped = changed(config, out=config.out / "stopped", on_divergence="stop")
    with pytest.raises(ValueError, match=rf"{name} at step 1: .* dead, more than 0.9 \(on_diver"):
        train(stopped, **llama)
    assert brief(stopped) == [(name, 1, "collapse", "stopped")]


def test_before_dead_after_allows_nothing_has_collapsed(make, llama):
    config = make(k=1, d_sae=1024, sae=["dead_after=320"])
    train(config, **llama)
    assert [step for _, step, _, _ in brief(config)] == [5]


def test_atoms_that_explode_are_said_only_where_norms_are_free(make, llama):
    free = ["normalize_atoms=false"]
    topk = {"architecture": ["topk"]}
    config = make(lr=50.0, sae=free, out=make().out / "free", **topk)
    train(config, **llama)
    assert ("topk/layers.1", "atoms", "warned") in [
        (e["name"], e["kind"], e["done"]) for e in events_of(config)
    ]
    for out, options in [("kept", {"lr": 50.0}), ("slow", {"sae": free})]:
        quiet = make(out=make().out / out, **options, **topk)
        train(quiet, **llama)
        assert "atoms" not in {e["kind"] for e in events_of(quiet)}


def test_what_recovers_is_said_too(make, llama, monkeypatch):
    norms = iter([1.0, 200.0, 300.0, 5.0, 400.0, *[1.0] * 20])
    monkeypatch.setattr(watch, "largest_norm", lambda job: next(norms))
    config = make()
    train(config, **llama)
    assert [(step, done) for _, step, _, done in brief(config)] == [
        (2, "warned"), (4, "over"), (5, "warned"), (6, "over"),
    ]  # fmt: skip


def test_the_watch_costs_unlogged_steps_one_wait(make, llama, monkeypatch):
    """Numbers that the host asks for in a step that is not logged: dead.any(), and the watch's."""
    from torch.overrides import TorchFunctionMode

    asking = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__float__}

    class Asked(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            counts[-1] += function in asking
            return function(*args, **(kwargs or {}))

    counts, real = [], loop.take_step

    def counted(*arguments, **known):
        counts.append(0)
        with Asked():
            return real(*arguments, **known)

    monkeypatch.setattr(loop, "take_step", counted)
    config = make(log_every=100, architecture=["topk"])
    train(config, **llama)
    assert counts[1:] == [2] * 11
