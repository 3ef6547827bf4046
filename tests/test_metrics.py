"""Scores against independent readings: scikit-learn, brute force, and cases worked by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as sk

from training.baselines import (
    BASELINES,
    always_speak,
    copy_initial,
    never_update,
    score_baselines,
    uniform_clock,
)
from training.metrics import score
from training.sweep import average_precision, best_threshold, precision_recall
from training.tally import match_events
from training.traces import Rejection, Trace, Track


def random_track(rng: np.random.Generator, ticks: int, steps: int) -> Track:
    speak = rng.random(ticks) < 0.3
    state = np.sort(rng.integers(0, 3, size=(ticks, steps)), axis=0).astype(np.int8)
    responses = tuple(str(rng.integers(3)) if speaks else None for speaks in speak)
    return Track(speak, rng.random(ticks) < 0.4, state, responses)


def random_traces(seed: int) -> list[Trace]:
    rng = np.random.default_rng(seed)
    return [
        Trace(
            f"s{number}",
            2.0,
            0,
            tuple(f"step {k}" for k in range(steps)),
            random_track(rng, ticks, steps),
            random_track(rng, ticks, steps),
            # Few distinct values, so that ties are many.
            (rng.integers(0, 8, ticks) / 8).astype(np.float32),
            rng.random(ticks).astype(np.float32),
        )
        for number, (ticks, steps) in enumerate([(40, 3), (7, 1), (90, 5)])
    ]


def trace_of(
    truth: Track, predicted: Track, tick_hz: float = 1.0, proposed: int = 0, rejected: int = 0
) -> Trace:
    names = tuple(f"step {k}" for k in range(truth.num_steps))
    return Trace(
        "s", tick_hz, 0, names, truth, predicted, None, None, proposed, (Rejection(0, 0, 0),) * rejected
    )


def track_of(states: Sequence[str], words: dict[int, str], updates: Sequence[int] = ()) -> Track:
    """A track from one string of digits a step, the words by tick, and the ticks of updates."""
    state = np.array([[int(digit) for digit in row] for row in states], dtype=np.int8).T
    ticks = np.arange(len(state))
    responses = tuple(words.get(int(tick)) for tick in ticks)
    return Track(np.isin(ticks, list(words)), np.isin(ticks, list(updates)), state, responses)


@pytest.mark.parametrize("seed", range(5))
def test_decisions_agree_with_scikit_learn(seed: int) -> None:
    traces = random_traces(seed)
    scores = score(traces)
    for key, name, score_name in (
        ("speaking", "speak", "speak_score"),
        ("dst_update", "dst_update", "update_score"),
    ):
        true = np.concatenate([getattr(trace.truth, name) for trace in traces])
        predicted = np.concatenate([getattr(trace.predicted, name) for trace in traces])
        probability = np.concatenate([getattr(trace, score_name) for trace in traces])
        assert scores[key]["precision"] == pytest.approx(sk.precision_score(true, predicted))
        assert scores[key]["recall"] == pytest.approx(sk.recall_score(true, predicted))
        assert scores[key]["f1"] == pytest.approx(sk.f1_score(true, predicted))
        assert scores[key]["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(true, predicted))
        assert scores[key]["pr_auc"] == pytest.approx(sk.average_precision_score(true, probability))


@pytest.mark.parametrize("seed", range(5))
def test_states_agree_with_scikit_learn(seed: int) -> None:
    traces = random_traces(seed)
    true = np.concatenate([trace.truth.state.ravel() for trace in traces])
    predicted = np.concatenate([trace.predicted.state.ravel() for trace in traces])
    state = score(traces)["dst_state"]
    assert state["macro_f1"] == pytest.approx(sk.f1_score(true, predicted, average="macro"))
    assert state["accuracy"] == pytest.approx(sk.accuracy_score(true, predicted))


ticks_lists = st.lists(st.integers(0, 15), max_size=6, unique=True).map(sorted)


@given(ticks_lists, ticks_lists, st.sampled_from([0.0, 0.5, 1.0, 2.5, 4.0]))
def test_event_matching_is_maximum(true: list[int], predicted: list[int], tolerance: float) -> None:
    @cache
    def most(i: int, taken: frozenset[int]) -> int:
        if i == len(true):
            return 0
        fitting = [p for p, at in enumerate(predicted) if p not in taken and abs(at - true[i]) <= tolerance]
        return max([most(i + 1, taken), *(1 + most(i + 1, taken | {p}) for p in fitting)])

    pairs = match_events(true, predicted, tolerance)
    assert len(pairs) == most(0, frozenset())
    assert all(abs(a - b) <= tolerance for a, b in pairs)
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)


def test_event_tolerance_is_inclusive_and_in_seconds() -> None:
    truth = track_of(["000000000000"], {0: "a"})
    for tick, expected in ((1, (1, 1, 1)), (2, (0, 1, 1)), (4, (0, 1, 1)), (5, (0, 0, 1)), (11, (0, 0, 0))):
        late = track_of(["000000000000"], {tick: "a"})
        found = score([trace_of(truth, late, tick_hz=2.0)])["speaking"]["event_f1"]
        assert (found["0.5"], found["2"], found["5"]) == expected


def test_events_of_different_sessions_do_not_match() -> None:
    speaks, silent = track_of(["00"], {0: "a"}), track_of(["00"], {})
    found = score([trace_of(speaks, silent), trace_of(silent, speaks)])
    assert found["speaking"]["event_f1"] == {"0.5": 0.0, "2": 0.0, "5": 0.0}


def test_state_scores_worked_by_hand() -> None:
    # Tick               0         1
    #                    012345678901
    truth = track_of(["001122222222", "000011222222"], {})
    found = track_of(["001112222222", "000111111122"], {})
    state = score([trace_of(truth, found, proposed=10, rejected=3)])["dst_state"]
    # Wrong: the first step at tick 4, the second at 3, 6, 7, 8, 9: 6 of 24 pairs, on 6 of 12 ticks.
    assert state["accuracy"] == pytest.approx(18 / 24)
    assert state["joint"] == pytest.approx(6 / 12)
    # (hits, true, predicted) by state: (5, 6, 5), (4, 4, 3 + 7), (7 + 2, 8 + 6, 7 + 2).
    assert state["macro_f1"] == pytest.approx((10 / 11 + 8 / 14 + 18 / 23) / 3)
    # True changes at 2, 4 and 6, so ticks 0 to 8 are near; 3, 4, 6, 7 and 8 are wrong there.
    assert state["joint_near_transition"] == pytest.approx(4 / 9)
    # Among ticks 0 to 8: (5, 6, 5), (4, 4, 3 + 6), (4, 5 + 3, 4).
    assert state["macro_f1_near_transition"] == pytest.approx((10 / 11 + 8 / 13 + 8 / 12) / 3)
    # Starts 2 -> 2 and 4 -> 3, completions 4 -> 5 and 6 -> 10: errors 0, -1, 1, 4 seconds.
    assert state["transition_f1"] == {"0.5": 1 / 4, "2": 3 / 4, "5": 1.0}
    assert state["transition_time_error"] == pytest.approx((0 - 1 + 1 + 4) / 4)
    # Completed shares differ by a half at ticks 4, 6, 7, 8 and 9.
    assert state["progress_mae"] == pytest.approx(5 * 0.5 / 12)
    # True order A1 A2 B1 B2, predicted A1 B1 A2 B2: two edits in four.
    assert state["order_edit_score"] == pytest.approx(50.0)
    assert state["valid_ratio"] == pytest.approx(0.7)


def test_a_step_shorter_than_a_tick_is_two_events() -> None:
    truth = track_of(["0002"], {})
    state = score([trace_of(truth, track_of(["0001"], {}))])["dst_state"]
    assert state["transition_f1"]["0.5"] == pytest.approx(2 / 3)  # the start is found, the completion is not
    assert state["order_edit_score"] == pytest.approx(50.0)
    back = score([trace_of(track_of(["0001"], {}), truth)])["dst_state"]
    assert back["order_edit_score"] == pytest.approx(50.0)  # of the longer sequence, here the predicted one


def test_a_class_that_is_nowhere_is_left_out() -> None:
    truth = track_of(["0011"], {})
    assert score([trace_of(truth, truth)])["dst_state"]["macro_f1"] == 1.0


def test_words_must_be_the_same_at_the_same_tick() -> None:
    truth = track_of(["00000000"], {0: "a", 2: "b", 4: "c", 6: "d"})
    found = track_of(["00000000"], {0: "a", 2: "x", 5: "c", 7: "d", 6: "d"})
    # At 0 and 6 right, at 2 other words, 4 missed.
    assert score([trace_of(truth, found)])["response"] == {
        "exact_match": 2 / 4,
        "exact_match_when_spoken": pytest.approx(2 / 3),
        "similarity": 1.0,  # of a, c and d, whose pairs are the same words
    }


def test_an_oracle_scores_exactly_one() -> None:
    truth = track_of(["001122222", "000001122"], {2: "a", 5: "b"}, updates=[2, 4, 5, 7])
    oracle = Trace(
        *("s", 2.0, 3, ("a", "b"), truth, truth),
        truth.speak.astype(np.float32),
        truth.dst_update.astype(np.float32),
    )
    found = score([oracle, oracle], {"speaking": 0.5})
    ones = {"0.5": 1.0, "2": 1.0, "5": 1.0}
    for key, threshold in (("speaking", 0.5), ("dst_update", None)):
        names = ("precision", "recall", "f1", "balanced_accuracy", "pr_auc")
        assert found[key] == {**dict.fromkeys(names, 1.0), "event_f1": ones, "threshold": threshold}
    assert found["dst_state"] == {
        **dict.fromkeys(("macro_f1", "accuracy", "joint", "joint_near_transition"), 1.0),
        "macro_f1_near_transition": 1.0,
        "transition_f1": ones,
        "transition_time_error": 0.0,
        "progress_mae": 0.0,
        "order_edit_score": 100.0,
        "valid_ratio": 1.0,
    }
    assert found["response"] == {"exact_match": 1.0, "exact_match_when_spoken": 1.0, "similarity": 1.0}
    assert found["combined"]["value"] == 1.0


def test_silence_scores_exactly_zero() -> None:
    truth = track_of(["001122222"], {2: "a", 5: "b"}, updates=[2, 4])
    found = score([trace_of(truth, copy_initial(truth))])
    zeros = {"0.5": 0.0, "2": 0.0, "5": 0.0}
    for key in ("speaking", "dst_update"):
        assert [found[key][name] for name in ("precision", "recall", "f1")] == [0.0, 0.0, 0.0]
        assert found[key]["event_f1"] == zeros
        assert found[key]["pr_auc"] is None
    assert found["dst_state"]["transition_f1"] == zeros
    assert found["dst_state"]["transition_time_error"] is None
    assert found["dst_state"]["order_edit_score"] == 0.0
    assert found["response"] == {"exact_match": 0.0, "exact_match_when_spoken": 0.0, "similarity": None}


def test_combined_is_the_mean_its_formula_names() -> None:
    found = score(random_traces(0))
    state = found["dst_state"]
    parts = [
        found["speaking"]["event_f1"]["2"],
        state["transition_f1"]["2"],
        state["macro_f1_near_transition"],
        found["matched"]["f1"],
    ]
    assert found["combined"]["value"] == pytest.approx(np.mean(parts))
    named = (
        'speaking.event_f1["2"]',
        'dst_state.transition_f1["2"]',
        "macro_f1_near_transition",
        "matched.f1",
    )
    for name in named:
        assert name in found["combined"]["formula"]


def test_scores_are_plain_json() -> None:
    traces = random_traces(1)
    for found in (score(traces), score_baselines(traces)):
        assert json.loads(json.dumps(found)) == found


def test_no_session_is_refused() -> None:
    with pytest.raises(ValueError, match="no session"):
        score([])


decisions = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=12)


@given(decisions.filter(lambda rows: any(positive for _, positive in rows)))
def test_best_threshold_is_the_best_of_all(rows: list[tuple[int, bool]]) -> None:
    scores = np.array([value / 8 for value, _ in rows], dtype=np.float32)
    truth = np.array([positive for _, positive in rows])
    threshold, f1 = best_threshold(scores, truth)
    by_threshold = {value: sk.f1_score(truth, scores >= value) for value in np.unique(scores)}
    assert f1 == pytest.approx(max(by_threshold.values()))
    assert sk.f1_score(truth, scores >= threshold) == pytest.approx(f1)
    highest = max(value for value, reached in by_threshold.items() if np.isclose(reached, f1))
    below = [value for value in by_threshold if value < highest]
    assert threshold == pytest.approx((highest + max(below)) / 2 if below else highest)


@given(decisions.filter(lambda rows: any(positive for _, positive in rows)))
def test_the_curve_of_precision_and_recall_agrees_with_scikit_learn(rows: list[tuple[int, bool]]) -> None:
    scores = np.array([value / 8 for value, _ in rows])
    truth = np.array([positive for _, positive in rows])
    precision, recall, thresholds = sk.precision_recall_curve(truth, scores)
    expected = list(zip(thresholds, precision, recall, strict=False))[::-1]  # its last point has no threshold
    np.testing.assert_allclose(precision_recall(scores, truth), expected)
    thinned = precision_recall(scores, truth, points=2)
    np.testing.assert_allclose(thinned, [expected[0], expected[-1]] if len(expected) > 1 else expected)


def test_best_threshold_between_neighbouring_floats() -> None:
    low = np.float32(0.3)
    scores = np.array([low, np.nextafter(low, np.float32(1))])
    threshold, f1 = best_threshold(scores, np.array([False, True]))
    assert (scores >= threshold).tolist() == [False, True]
    assert f1 == 1.0


def test_nothing_positive() -> None:
    scores: NDArray[np.float32] = np.array([0.2, 0.7], dtype=np.float32)
    truth = np.array([False, False])
    assert average_precision(scores, truth) == 0.0
    with pytest.raises(ValueError, match="no threshold"):
        best_threshold(scores, truth)


def test_uniform_clock_worked_by_hand() -> None:
    truth = track_of(["000000", "000000"], {5: "never read"}, updates=[1])
    found = uniform_clock(truth)
    # Three ticks a step: the first starts at 0, completes at 3 where the second starts.
    assert found.state.T.tolist() == [[1, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1]]
    assert np.flatnonzero(found.dst_update).tolist() == [0, 3]
    assert np.flatnonzero(found.speak).tolist() == [0, 3]
    assert found.responses == ("", None, None, "", None, None)


def test_uniform_clock_with_more_steps_than_ticks() -> None:
    truth = track_of(["00", "00", "00", "00"], {})
    assert uniform_clock(truth).state.tolist() == [[1, 0, 0, 0], [2, 2, 1, 0]]


def test_constant_baselines() -> None:
    truth = track_of(["0012"], {1: "a"}, updates=[2, 3])
    talks, silent = always_speak(truth), copy_initial(truth)
    assert talks.speak.all()
    assert talks.dst_update.all()
    assert not silent.speak.any()
    assert not silent.dst_update.any()
    assert not talks.state.any()
    assert not silent.state.any()
    found = score_baselines([trace_of(truth, truth)])
    assert list(found) == [*BASELINES, "never_update", "majority"]
    assert found["always_speak"]["speaking"]["recall"] == 1.0
    assert found["always_speak"]["response"]["exact_match"] == 0.0
    assert found["copy_initial"]["dst_state"]["accuracy"] == 0.5


def test_baselines_that_know_a_little() -> None:
    truth = track_of(["0001112222", "0000000112"], {1: "a"}, updates=[2, 3])
    free, taught = never_update(truth, None), never_update(truth, 4)
    assert not free.state.any()
    assert taught.state.T.tolist() == [[0] * 4 + [1] * 4 + [2] * 2, [0] * 4 + [0] * 4 + [1] * 2]
    assert not taught.speak.any()
    # 0 is true 10 times, 1 five times, 2 five times
    found = score_baselines([trace_of(truth, truth)], None, window_ticks=4)
    assert found["majority"]["dst_state"]["accuracy"] == pytest.approx(10 / 20)
    assert found["never_update"]["dst_state"]["accuracy"] == pytest.approx((7 + 8) / 20)
    assert found["never_update"]["dst_state"]["joint"] == pytest.approx(6 / 10)
    assert "matched" not in found["majority"]
    late = track_of(["1222", "2222"], {})
    assert score_baselines([trace_of(late, late)])["majority"]["dst_state"]["accuracy"] == pytest.approx(
        7 / 8
    )


def test_traces_that_do_not_fit_are_refused() -> None:
    two, three = track_of(["00"], {}), track_of(["000"], {})
    with pytest.raises(ValueError, match="states predicted"):
        trace_of(two, three)
    with pytest.raises(ValueError, match="scores of shape"):
        Trace("s", 2.0, 0, ("a",), two, two, np.zeros(3, dtype=np.float32), None)
    with pytest.raises(ValueError, match="step names"):
        Trace("s", 2.0, 0, (), two, two, None, None)
    with pytest.raises(ValueError, match="rejected"):
        trace_of(two, two, proposed=1, rejected=2)
    with pytest.raises(ValueError, match="number of responses"):
        Track(two.speak, three.speak, two.state, two.responses)
    with pytest.raises(ValueError, match="state must be"):
        Track(two.speak, two.dst_update, three.state, two.responses)
