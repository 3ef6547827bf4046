"""Matched-dialogue scores against every possible matching, and cases worked by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from training.baselines import BASELINES
from training.matched import BAG_OF_WORDS, Similarity, match_words, window_ticks
from training.metrics import score
from training.traces import Trace, Track

TICKS = 40


class Table:
    """Similarities that were made up, by the number an utterance is called."""

    name = "table"

    def __init__(self, table: NDArray[np.float64]) -> None:
        self.table = table

    def __call__(self, said: Sequence[str], meant: Sequence[str]) -> NDArray[np.float64]:
        return self.table[np.ix_([int(s[1:]) for s in said], [int(m[1:]) for m in meant])]


def track(words: Sequence[tuple[int, str]]) -> Track:
    texts = dict(words)
    state = np.zeros((TICKS, 1), dtype=np.int8)
    speak = np.isin(np.arange(TICKS), list(texts))
    return Track(speak, np.zeros(TICKS, dtype=np.bool_), state, tuple(texts.get(t) for t in range(TICKS)))


def trace(
    said: Sequence[tuple[int, str]], meant: Sequence[tuple[int, str]], source: str = "wtag", hz: float = 1.0
) -> Trace:
    return Trace("s", hz, 0, ("step",), track(meant), track(said), None, None, source=source)


def matched_scores(traces: Sequence[Trace], similarity: Similarity = BAG_OF_WORDS) -> dict[str, Any]:
    return score(traces, similarity=similarity)["matched"]


ticks = st.lists(st.integers(0, 14), max_size=4, unique=True).map(sorted)
cosines = st.lists(
    st.sampled_from([-0.9, -0.3, 0.0, 0.2, 0.45, 0.5, 0.6, 0.85, 1.0]), min_size=16, max_size=16
)


@given(ticks, ticks, cosines, st.sampled_from([(0, 0), (2, 4), (3, 6), (14, 1)]))
def test_no_matching_is_cheaper(
    said: list[int], meant: list[int], table: list[float], window: tuple[int, int]
) -> None:
    """All ways to give each utterance a partner or none are tried; costs are those of the definition."""
    similarity = np.array(table).reshape(4, 4)
    left, right = window

    def cost(i: int, j: int) -> float:
        apart = abs(said[i] - meant[j])
        far = (apart / max(left, right)) ** 1.5 if apart else 0.0
        return float((1 - abs(similarity[i, j])) + 0.3 * far)

    def allowed(i: int, j: int) -> bool:
        return -left <= meant[j] - said[i] <= right

    cheapest = float("inf")
    for partners in itertools.product([None, *range(len(meant))], repeat=len(said)):
        taken = [j for j in partners if j is not None]
        chosen = [(i, j) for i, j in enumerate(partners) if j is not None]
        if len(set(taken)) == len(taken) and all(allowed(i, j) for i, j in chosen):
            cheapest = min(cheapest, sum(cost(i, j) for i, j in chosen) + len(said) - len(chosen))
    found = match_words(
        [(tick, f"g{n}") for n, tick in enumerate(said)],
        [(tick, f"r{n}") for n, tick in enumerate(meant)],
        window,
        Table(similarity),
    )
    assert len({pair.said for pair in found}) == len({pair.meant for pair in found}) == len(found)
    assert all(allowed(pair.said, pair.meant) for pair in found)
    total = sum(cost(pair.said, pair.meant) for pair in found) + len(said) - len(found)
    assert total == pytest.approx(cheapest, abs=1e-9)
    for pair in found:
        assert pair.similarity == abs(similarity[pair.said, pair.meant])
        assert pair.distance == abs(said[pair.said] - meant[pair.meant])
        assert cost(pair.said, pair.meant) < 1


def test_scores_worked_by_hand() -> None:
    # At 1 Hz wtag allows a true utterance from 3 ticks before to 6 ticks after the one said.
    table = np.zeros((4, 4))
    table[0, 0] = 0.9  # said at 2, meant at 4: allowed, alike
    table[1, 1] = 0.4  # said at 10, meant at 10: a pair, but not alike
    table[2, 2] = 1.0  # said at 20, meant at 27: too late by one
    first = trace([(2, "g0"), (10, "g1"), (20, "g2")], [(4, "r0"), (10, "r1"), (27, "r2"), (39, "r3")])
    # In the second session at 2 Hz the window is 6 and 12 ticks: meant 6 ticks before is allowed.
    table[3, 3] = 0.8
    second = trace([(16, "g3")], [(10, "r3")], hz=2.0)
    found = matched_scores([first, second], Table(table))
    # M = 2 alike of M0 = 3 pairs; N = 1 redundant; X = 2 missed.
    assert found["precision"] == pytest.approx(2 / 4)
    assert found["recall"] == pytest.approx(2 / 5)
    assert found["f1"] == pytest.approx(2 * (2 / 4) * (2 / 5) / (2 / 4 + 2 / 5))
    assert found["jaccard"] == pytest.approx(2 / 6)
    assert found["missing_rate"] == pytest.approx(2 / 5)
    assert found["redundant_rate"] == pytest.approx(1 / 4)
    assert found["time_diff"] == pytest.approx((2 / 1 + 6 / 2) / 2)


def test_the_nearer_of_two_that_mean_the_same_is_taken_and_the_better_of_two_as_near() -> None:
    table = np.full((4, 4), 0.9)
    pairs = match_words([(5, "g0")], [(4, "r0"), (7, "r1")], (3, 6), Table(table))
    assert [(pair.said, pair.meant) for pair in pairs] == [(0, 0)]
    table[0, 0] = 0.2
    pairs = match_words([(5, "g0")], [(4, "r0"), (6, "r1")], (3, 6), Table(table))
    assert [(pair.said, pair.meant) for pair in pairs] == [(0, 1)]


def test_a_pair_must_be_worth_its_distance() -> None:
    # Three ticks of a window of six cost 0.3 * 0.5 ** 1.5 = 0.1061, and leaving both alone no more than a pair.
    for cosine, pairs in ((0.107, 1), (0.105, 0)):
        assert len(match_words([(5, "g0")], [(8, "r0")], (3, 6), Table(np.full((1, 1), cosine)))) == pairs


@pytest.mark.parametrize(
    ("source", "hz", "expected"),
    [
        ("assembly101", 2.0, (4, 8)),
        ("ego4d", 2.0, (8, 17)),
        ("epickitchens", 1.0, (1, 3)),
        ("holoassist", 2.0, (3, 5)),
        ("egoexolearn", 2.0, (4, 7)),
        ("wtag", 1.0, (3, 6)),
        ("toy", 2.0, (5, 5)),
        ("toy", 0.25, (0, 0)),
    ],
)
def test_windows_in_whole_ticks(source: str, hz: float, expected: tuple[int, int]) -> None:
    assert window_ticks(source, hz) == expected


words = st.lists(
    st.sampled_from(["Attach the wheel.", "attach the roof", "Well done!", "...", "Next: the arm"]),
    max_size=5,
)


@given(words, st.sampled_from(["assembly101", "ego4d", "toy"]), st.sampled_from([0.25, 1.0, 2.0]))
def test_an_oracle_scores_exactly_one(texts: list[str], source: str, hz: float) -> None:
    """Though the same is said tick after tick, and though a text may hold no word."""
    said = [(3 + 2 * at, text) for at, text in enumerate(texts)]
    found = matched_scores([trace(said, said, source, hz), trace([(1, "a")], [(1, "a")], source, hz)])
    assert [found[key] for key in ("precision", "recall", "f1", "jaccard")] == [1.0] * 4
    assert [found[key] for key in ("missing_rate", "redundant_rate", "time_diff")] == [0.0] * 3


def test_nothing_said_and_nothing_meant() -> None:
    meant = [(2, "a"), (8, "b")]
    assert matched_scores([trace([], meant)])["missing_rate"] == 1.0
    assert matched_scores([trace(meant, [])])["redundant_rate"] == 1.0
    for pair in (([], meant), (meant, []), ([], [])):
        found = matched_scores([trace(*pair)])
        assert found["f1"] == found["jaccard"] == 0.0
        assert found["time_diff"] is None


texts = st.lists(
    st.sampled_from(["Attach the red wheel", "the wheel", "Then, the WHEEL!", "roof", "..."]),
    min_size=1,
    max_size=4,
)


@given(texts, texts)
def test_bag_of_words_agrees_with_scikit_learn(said: list[str], meant: list[str]) -> None:
    counts = CountVectorizer(token_pattern=r"(?u)\b\w+\b").fit(["word", *said, *meant])
    expected = cosine_similarity(counts.transform(said), counts.transform(meant))
    np.testing.assert_allclose(BAG_OF_WORDS(said, meant), expected, atol=1e-12)


def test_baselines_and_the_combined_score() -> None:
    one = trace([(2, "Attach the wheel"), (9, "no")], [(2, "attach the wheel"), (20, "roof")])
    found = score([one])
    state = found["dst_state"]
    parts = [
        found["speaking"]["event_f1"]["2"],
        state["transition_f1"]["2"],
        state["macro_f1_near_transition"],
        found["matched"]["f1"],
    ]
    assert found["matched"]["f1"] == pytest.approx(0.5)
    assert found["combined"]["value"] == pytest.approx(np.mean(parts))
    assert found["combined"]["formula"].endswith(", matched.f1")
    silent = score([one], similarity=None)
    assert not {"matched", "response"} & silent.keys()
    assert silent["combined"]["value"] == pytest.approx(np.mean(parts[:3]))
    assert "matched" not in silent["combined"]["formula"]
    for predict in BASELINES.values():  # they say nothing that means anything
        baseline = Trace("s", 1.0, 0, ("step",), one.truth, predict(one.truth), None, None)
        assert matched_scores([baseline])["f1"] == 0.0


@given(st.permutations(["attach the wheel", "screw the roof on", "paint it red", "well done"]))
def test_words_at_the_wrong_places_score_less(shuffled: list[str]) -> None:
    meant = [
        (3 + 9 * at, text)
        for at, text in enumerate(["attach the wheel", "screw the roof on", "paint it red", "well done"])
    ]
    found = matched_scores(
        [trace([(tick, text) for (tick, _), text in zip(meant, shuffled, strict=True)], meant)]
    )
    in_place = sum(text == true for text, (_, true) in zip(shuffled, meant, strict=True))
    assert found["f1"] == pytest.approx(in_place / 4)
