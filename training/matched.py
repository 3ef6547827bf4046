"""Scores of a whole dialogue: what is said is matched with what should be, in time and in meaning, one to one.

The metric of ProAssist ("Proactive Assistant Dialogue Generation from Streaming Egocentric Videos", EMNLP 2025), with
one difference: there a perfect prediction is lost, since its cost of zero counts as no pair at all. Here it scores 1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from training.traces import Trace, Track

WINDOWS_S = {
    "assembly101": (2.0, 4.0),
    "ego4d": (4.0, 8.5),
    "epickitchens": (1.5, 3.0),
    "holoassist": (1.5, 2.5),
    "egoexolearn": (2.0, 3.5),
    "wtag": (3.0, 6.0),
}
"""How far, in seconds, a true utterance may lie (before, after) the one said, by corpus."""
OTHER_WINDOW_S = (2.5, 2.5)

DISTANCE_WEIGHT, DISTANCE_POWER = 0.3, 1.5
LEFT_ALONE = 1.0
"""What it costs to leave an utterance without a partner."""
ALIKE = 0.5
"""Utterances of a pair mean the same when their similarity is above this."""


class Similarity(Protocol):
    """How alike utterances are in meaning. ``name`` is told with every score."""

    @property
    def name(self) -> str: ...

    def __call__(self, said: Sequence[str], meant: Sequence[str]) -> NDArray[np.float64]:
        """Cosines ``[G, R]`` in [-1, 1]; G and R are at least 1."""
        ...


class BagOfWords:
    """Cosine of the counts of words, in small letters: needs no model, and knows no synonyms."""

    name = "bag-of-words"

    def __call__(self, said: Sequence[str], meant: Sequence[str]) -> NDArray[np.float64]:
        bags = [Counter(re.findall(r"\w+", text.lower())) for text in (*said, *meant)]
        column = {word: at for at, word in enumerate(sorted(set().union(*bags)))}
        counts = np.zeros((len(bags), len(column)))
        for row, bag in enumerate(bags):
            counts[row, [column[word] for word in bag]] = list(bag.values())
        norms = np.linalg.norm(counts, axis=1, keepdims=True)
        unit = np.divide(counts, norms, out=np.zeros_like(counts), where=norms > 0)
        cosines: NDArray[np.float64] = unit[: len(said)] @ unit[len(said) :].T
        return cosines


BAG_OF_WORDS = BagOfWords()


class Pair(NamedTuple):
    """Two utterances that were matched: their places in the lists, how alike they are, their distance in ticks."""

    said: int
    meant: int
    similarity: float
    distance: int


def match_words(
    said: Sequence[tuple[int, str]],
    meant: Sequence[tuple[int, str]],
    window: tuple[int, int],
    similarity: Similarity = BAG_OF_WORDS,
) -> list[Pair]:
    """The cheapest one-to-one matching, in which any utterance may be left alone.

    A pair costs ``1 - |cosine| + 0.3 * (distance / longer side of the window) ** 1.5``, an utterance left alone 1. A
    pair that costs no less than that is none.

    Args:
        said, meant: utterances, each with its tick.
        window: ticks that one that is meant may lie (before, after) the one that is said.
    """
    if not said or not meant:
        return []
    before, after = window
    later = np.array([tick for tick, _ in meant]) - np.array([tick for tick, _ in said])[:, None]
    distance = np.abs(later)
    texts = [[text for _, text in each] for each in (said, meant)]
    alike = np.abs(similarity(*texts))
    alike[np.array(texts[0])[:, None] == np.array(texts[1])] = 1.0  # also where a text has no word
    cost = 1 - alike + DISTANCE_WEIGHT * (distance / max(before, after, 1)) ** DISTANCE_POWER
    # What a pair saves against leaving its utterance alone; one that saves nothing is as good as none.
    saved = np.where((-before <= later) & (later <= after), np.maximum(0, LEFT_ALONE - cost), 0)
    rows, columns = linear_sum_assignment(saved, maximize=True)
    return [
        Pair(i, j, float(alike[i, j]), int(distance[i, j]))
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
        if saved[i, j] > 0
    ]


def match_trace(trace: Trace, similarity: Similarity = BAG_OF_WORDS) -> list[Pair]:
    """`match_words` on what a session's prediction says and what its truth does, in its corpus' window."""
    window = window_ticks(trace.source, trace.tick_hz)
    return match_words(utterances(trace.predicted), utterances(trace.truth), window, similarity)


def alike_words(trace: Trace, pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """What was said and what should have been, of the pairs that mean the same."""
    said, meant = utterances(trace.predicted), utterances(trace.truth)
    return [(said[pair.said][1], meant[pair.meant][1]) for pair in pairs if pair.similarity > ALIKE]


def utterances(track: Track) -> list[tuple[int, str]]:
    """What a track says, each with its tick; "" where it speaks without words."""
    return [(int(tick), track.responses[tick] or "") for tick in np.flatnonzero(track.speak)]


def window_ticks(source: str, tick_hz: float) -> tuple[int, int]:
    """A corpus' window in whole ticks (before, after)."""
    before, after = WINDOWS_S.get(source, OTHER_WINDOW_S)
    return int(before * tick_hz), int(after * tick_hz)
