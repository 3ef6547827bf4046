"""Runs side by side, against scores of really resampled sessions; predictions in a table and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import UserError
from training.compare import COMPARED, compare
from training.gate import Decisions, Gate, Thresholds, teacher_trace
from training.matched import BAG_OF_WORDS
from training.metrics import score
from training.sweep import best_gap, spaced
from training.trace_table import read_decisions, read_traces, write_traces
from training.traces import Rejection, Trace, Track

WORDS = ("attach the wheel", "attach the roof", "well done")


def random_track(rng: np.random.Generator, ticks: int, steps: int) -> Track:
    speak = rng.random(ticks) < 0.3
    state = np.sort(rng.integers(0, 3, size=(ticks, steps)), axis=0).astype(np.int8)
    responses = tuple(str(rng.choice(WORDS)) if speaks else None for speaks in speak)
    return Track(speak, rng.random(ticks) < 0.4, state, responses)


@pytest.fixture
def first() -> list[Trace]:
    """Seven sessions on four videos; one has no scores."""
    rng = np.random.default_rng(0)
    return [
        Trace(
            session_id=f"s{number}",
            tick_hz=2.0,
            first_tick=3 * number,
            step_names=tuple(f"step {k}" for k in range(number % 3)),
            truth=random_track(rng, 20 + number, number % 3),
            predicted=random_track(rng, 20 + number, number % 3),
            speak_score=None if number == 2 else rng.random(20 + number).astype(np.float32),
            update_score=rng.random(20 + number).astype(np.float32),
            proposed_transitions=9,
            rejections=(Rejection(2, 0, 1), Rejection(2, 1, 2), Rejection(7, 0, 0)) if number == 5 else (),
            source="wtag",
            video_id=f"v{number}",
            recording_id=f"v{number % 4}",
            goal="a «goal»",
            heard=((0, "hello"), (4, "what\nnow?"), (4, "well?")),
        )
        for number in range(7)
    ]


@pytest.fixture
def second(first: list[Trace]) -> list[Trace]:
    """A run that is right more often."""
    rng = np.random.default_rng(1)
    better = []
    for trace in first:
        speak = np.where(rng.random(trace.truth.num_ticks) < 0.7, trace.truth.speak, trace.predicted.speak)
        says = [trace.truth.responses[t] or WORDS[0] if speak[t] else None for t in range(len(speak))]
        better.append(replace(trace, predicted=replace(trace.predicted, speak=speak, responses=tuple(says))))
    return better


def values(traces: list[Trace]) -> list[float]:
    found = score(traces)
    return [
        found[path[0]][path[1]] if len(path) == 2 else found[path[0]][path[1]][path[2]]
        for path in COMPARED.values()
    ]


def test_intervals_are_those_of_really_resampled_videos(first: list[Trace], second: list[Trace]) -> None:
    rows = compare(first, second, BAG_OF_WORDS, samples=60, seed=5)
    assert [row.name for row in rows] == list(COMPARED)
    assert [row.first for row in rows] == pytest.approx(values(first))
    assert [row.second for row in rows] == pytest.approx(values(second))
    rng, differences = np.random.default_rng(5), []
    for draw in rng.integers(4, size=(60, 4)):
        picked = [
            [t for video in draw for t in run if t.recording_id == f"v{video}"] for run in (first, second)
        ]
        differences.append(np.subtract(values(picked[1]), values(picked[0])))
    ordered = np.sort(differences, axis=0)
    place = 0.025 * 59  # between the second and the third of sixty
    low = ordered[1] + (place - 1) * (ordered[2] - ordered[1])
    high = ordered[58] - (place - 1) * (ordered[58] - ordered[57])
    np.testing.assert_allclose([row.low for row in rows], low, atol=1e-12)
    np.testing.assert_allclose([row.high for row in rows], high, atol=1e-12)
    by_name = {row.name: row for row in rows}
    assert by_name["speak F1"].is_sure
    assert not by_name["joint"].is_sure  # nothing differs there
    assert rows == compare(first, second, BAG_OF_WORDS, samples=60, seed=5)


def test_what_cannot_be_compared_is_refused(first: list[Trace], second: list[Trace]) -> None:
    with pytest.raises(UserError, match="7 sessions, the other on 6"):
        compare(first, second[:6], BAG_OF_WORDS)
    with pytest.raises(UserError, match="session s0, the other on s1"):
        compare(first, second[1:], BAG_OF_WORDS)
    other = [replace(second[0], truth=second[0].predicted), *second[1:]]
    with pytest.raises(UserError, match="labels of session s0"):
        compare(first, other, BAG_OF_WORDS)
    with pytest.raises(UserError, match="all sessions are of the recording 'v0'"):
        compare(first[:1], second[:1], BAG_OF_WORDS)


def test_a_table_gives_back_what_was_written(tmp_path: Path, first: list[Trace]) -> None:
    path = tmp_path / "predictions.parquet"
    write_traces(path, first, {"split": "test"})
    once = path.read_bytes()
    found, about = read_traces(path)
    assert about == {"split": "test"}
    assert len(found) == len(first)
    for one, other in zip(first, found, strict=True):
        for track in ("truth", "predicted"):
            a, b = getattr(one, track), getattr(other, track)
            assert a.responses == b.responses
            for name in ("speak", "dst_update", "state"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
                assert getattr(a, name).dtype == getattr(b, name).dtype
        for name in ("speak_score", "update_score"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None) == (b is None)
            assert a is None or (a == b).all()
        for name in (
            "session_id",
            "tick_hz",
            "first_tick",
            "step_names",
            "proposed_transitions",
            "rejections",
        ):
            assert getattr(one, name) == getattr(other, name)
        for name in ("source", "video_id", "recording_id", "goal", "heard"):
            assert getattr(one, name) == getattr(other, name)
    write_traces(path, found, about)
    assert path.read_bytes() == once


def test_the_table_reads_with_polars(tmp_path: Path, first: list[Trace]) -> None:
    write_traces(tmp_path / "predictions.parquet", first, {})
    table = pl.read_parquet(tmp_path / "predictions.parquet")
    assert len(table) == sum(trace.truth.num_ticks for trace in first)
    row = table.filter(pl.col("session_id") == "s5").row(7, named=True)
    assert (row["tick"], row["t_s"]) == (22, 11.0)
    assert row["rejected"] == [{"step": 0, "state": 0}]
    assert row["dst_state_true"] == first[5].truth.state[7].tolist()
    assert row["response"] == first[5].predicted.responses[7]
    hits = table.filter(pl.col("speak") & pl.col("speak_true")).height
    said, meant = table["speak"].sum(), table["speak_true"].sum()
    assert score(first)["speaking"]["f1"] == pytest.approx(2 * hits / (said + meant))


def test_a_file_that_is_no_table_of_predictions(tmp_path: Path, first: list[Trace]) -> None:
    path = tmp_path / "predictions.parquet"
    with pytest.raises(UserError, match="is not there"):
        read_traces(path)
    path.write_text(json.dumps({}))
    with pytest.raises(UserError, match="not a table of predictions"):
        read_traces(path)
    pl.DataFrame({"tick": [1]}).write_parquet(path)
    with pytest.raises(UserError, match="other columns"):
        read_traces(path)


def test_logits_come_back_and_give_the_same_decisions(tmp_path: Path, first: list[Trace]) -> None:
    rng = np.random.default_rng(4)
    traces = first[1:3]
    decisions = []
    for trace in traces:
        ends = [9, trace.truth.num_ticks]
        shapes = [(ends[0], trace.truth.num_steps), (ends[1] - ends[0], trace.truth.num_steps)]
        decisions.append(
            [
                Decisions(*(rng.normal(size=size).astype(np.float32) for size in ((t, 2), (t, 2), (t, k, 3))))
                for t, k in shapes
            ]
        )
    path = tmp_path / "teacher.parquet"
    kept = Thresholds(0.4, 0.6, 3)
    gated = [teacher_trace(t, d, 24, kept) for t, d in zip(traces, decisions, strict=True)]
    write_traces(path, gated, {}, decisions)
    found, _ = read_traces(path)
    again = read_decisions(path)
    for windows, others in zip(decisions, again, strict=True):
        for one, other in zip(windows, others, strict=True):
            for name in ("speaking_logits", "dst_update_logits", "state_logits"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for trace, meant, windows in zip(found, gated, again, strict=True):
        assert trace.predicted.speak.tolist() == meant.predicted.speak.tolist()
        # any thresholds can be tried on what was read: the first window begins before anything, the second from truth
        other = teacher_trace(trace, windows, 24, Thresholds(0.0, 2.0))
        assert not other.predicted.transitions().any()  # what is given is no prediction
        assert (trace.predicted.transitions() == meant.predicted.transitions()).all()
        assert other.predicted.speak.all()
        assert (other.predicted.state[:9] == 0).all()
        assert (other.predicted.state[9:] == trace.truth.state[8]).all()
    table = pl.read_parquet(path)
    row = table.filter(pl.col("session_id") == "s2").row(12, named=True)
    assert row["window_first_tick"] == traces[1].first_tick + 9
    odds = row["speaking_logits"][1] - row["speaking_logits"][0]
    assert row["speak_score"] == pytest.approx(1 / (1 + np.exp(-odds)), rel=1e-5)
    write_traces(path, gated, {})
    with pytest.raises(UserError, match="holds no logits"):
        read_decisions(path)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 6))
def test_two_utterances_keep_their_distance(fires: list[bool], gap: int) -> None:
    gate = Gate(np.zeros(1, dtype=np.int8), Thresholds(0.5, 0.5, gap))
    said = [tick for tick, fire in enumerate(fires) if gate.speaks(tick, 0.9 if fire else 0.1)]
    wanted: list[int] = []
    for tick in [tick for tick, fire in enumerate(fires) if fire]:
        if all(tick - earlier >= gap for earlier in wanted):
            wanted.append(tick)
    assert said == wanted == spaced([tick for tick, fire in enumerate(fires) if fire], gap)


def test_the_gap_that_gives_the_best_events_is_chosen() -> None:
    # It speaks twice for each word that is meant, a second apart, at 2 Hz: a gap of more than a second is right.
    truth, scores = np.zeros(60, dtype=np.bool_), np.zeros(60)
    truth[[10, 30, 50]] = True
    scores[[10, 12, 30, 32, 50, 52]] = 0.9
    assert best_gap([(scores, truth)], 0.5, 2.0) == 4
    assert best_gap([(np.where(truth, 0.9, 0.0), truth)], 0.5, 2.0) == 0
