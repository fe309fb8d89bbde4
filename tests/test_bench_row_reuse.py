"""The model of a cache of Gram rows gives what is counted by hand, and its program runs."""

import json

import numpy as np
import pytest
import row_cache
import row_reuse
from row_cache import Cache, Reads, greedy_order, misses, pinned_misses, trace


def reads(rows, steps=None):
    rows = np.array(rows)
    return Reads(rows, np.full(len(rows), rows.shape[1]) if steps is None else np.array(steps), {})


@pytest.mark.parametrize(
    ("rows", "capacity", "missed"),
    [
        ([7] * 50, 1, 1),
        (range(50), 50, 50),
        (list(range(5)) * 10, 5, 5),  # it just fits
        (list(range(6)) * 10, 5, 60),  # one too many: each goes just before it is read again
        ([0, 1, 0, 2, 0, 3, 0], 2, 4),  # what is used stays
    ],
)
def test_misses_of_known_patterns(rows, capacity, missed):
    assert misses(np.array(rows), capacity) == missed


def plain_misses(rows, capacity):
    """A hit has fewer than ``capacity`` other rows since the same row."""
    missed = 0
    for place, row in enumerate(rows):
        before = [p for p in range(place) if rows[p] == row]
        missed += not before or len(set(rows[before[-1] + 1 : place])) >= capacity
    return missed


@pytest.mark.parametrize("capacity", [1, 3, 8, 20])
def test_misses_are_those_of_reuse_distances(capacity):
    rows = np.random.default_rng(0).zipf(1.5, size=400) % 20
    assert misses(rows, capacity) == plain_misses(rows.tolist(), capacity)


def test_pinned_rows_are_those_read_most_often():
    rows = np.array([0, 0, 0, 1, 1, 2, 3, 0])
    assert [pinned_misses(rows, c) for c in (1, 2, 3, 4, 9)] == [5, 4, 4, 4, 4]


def test_programs_start_where_one_has_ended():
    tokens = reads([[10, 11, 12], [20, 0, 0], [30, 31, 0], [40, 0, 0]], steps=[3, 1, 2, 1])
    assert trace(tokens, 1).tolist() == [10, 11, 12, 20, 30, 31, 40]
    assert trace(tokens, 2).tolist() == [10, 20, 11, 30, 12, 31, 40]
    assert trace(tokens, 9).tolist() == [10, 20, 30, 40, 11, 31, 12]


def test_a_row_fetched_by_another_program_in_the_same_step_is_a_hit():
    tokens = reads([[1, 5], [2, 6], [1, 5], [2, 6]])
    assert misses(trace(tokens, 4), 1) == 4
    assert misses(trace(tokens, 1), 1) == 8


def test_a_cache_of_a_smaller_dictionary_holds_the_same_part():
    whole, quarter = (Cache.scaled("sm_90", 16384, 4096, n) for n in (16384, 4096))
    assert whole == (132, round(0.75 * 50e6 / (2 * 16384)), 4096)
    assert quarter == (33, round(whole.rows / 4), 1024)
    assert Cache.scaled("sm_80", 32768, 8, 64) == (1, 1, 1)
    assert row_cache.PROGRAMS.keys() == {4096, 8192, 16384, 32768}


def test_the_greedy_order_takes_who_shares_most_with_those_that_run():
    tokens = reads(np.random.default_rng(0).integers(30, size=(40, 6)))
    order = greedy_order(tokens, resident=3).tolist()
    assert sorted(order) == list(range(40))
    for place, taken in enumerate(order):
        running = set(tokens.rows[order[max(0, place - 3) : place]].ravel())
        shared = {t: len(running & set(tokens.rows[t])) for t in sorted(order[place:])}
        assert taken == max(shared, key=shared.get), place


def test_the_program_runs_and_its_shares_are_in_order(tmp_path, capsys):
    call = f"-n 256 -k 3 6 --max_tokens 2048 --tokens 512 4096 --out {tmp_path}"
    assert row_reuse.main(call.split()) == 0
    (file,) = tmp_path.glob("row-reuse-256-2048.json")
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 2 * 2 * 4 * 2
    for row in rows:
        found = row["to_memory"]
        for name in ("as drawn", "first atom", "two atoms", "sketch", "greedy", "pinned"):
            assert 0 < found["each once"] <= found[name] <= 1
    *_, last, _ = capsys.readouterr().out.splitlines()
    assert last == row_reuse.table(rows)[-1]
