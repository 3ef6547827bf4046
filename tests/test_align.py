"""Sessions on the clock, against a plain reading of the definitions, tick by tick in exact fractions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.align import Aligned, align
from schemas.clock import Clock
from schemas.records import Reject, Rejects, Session, Turn, Video
from schemas.states import Step
from schemas.tables import TABLES

RATES = {1.0: Fraction(1), 2.0: Fraction(2), 5.0: Fraction(5), 29.97: Fraction(2997, 100)}
# a coarse grid makes touching spans, shared ticks and events on ticks common; the fine one, everything between
times = st.one_of(st.integers(0, 24).map(lambda n: 250 * n), st.integers(0, 6_000))


def spans(most: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    span = st.tuples(times, times).map(lambda pair: (min(pair), max(pair)))
    return st.lists(span, min_size=1, max_size=most)


@st.composite
def sessions(draw: st.DrawFn) -> Session:
    start, end = sorted((draw(times), draw(times)))
    duration = draw(st.none() | st.integers(1, 6_000))
    steps = []
    for n in range(1, draw(st.integers(1, 4)) + 1):
        drawn = draw(spans(3))
        rows = tuple(f"row {a}-{b}" for a, b in drawn)
        steps.append(
            Step(f"S{n}", f"step {n}", tuple((a / 1000, b / 1000) for a, b in drawn), source_rows=rows)
        )
    if draw(st.booleans()):
        steps.append(Step("open", "never ends", ((draw(times) / 1000, math.inf),)))
    if draw(st.booleans()):
        steps.append(Step("none", "never starts"))
    turns = [
        Turn(draw(times) / 1000, draw(st.sampled_from(("user", "assistant"))), f"words {n}")
        for n in range(draw(st.integers(0, 6)))
    ]
    mistakes = draw(st.none() | spans(3))
    return session_of(
        steps,
        turns,
        start / 1000,
        end / 1000,
        None if duration is None else duration / 1000,
        None if mistakes is None else tuple((a / 1000, b / 1000) for a, b in mistakes),
    )


def session_of(
    steps: list[Step],
    turns: list[Turn],
    start_s: float,
    end_s: float,
    duration_s: float | None = None,
    mistakes: tuple[tuple[float, float], ...] | None = None,
) -> Session:
    video = Video("x/one/cam", "one", "cam.mp4", duration_s=duration_s)
    return Session(
        *(
            "x/one",
            video,
            "train",
            "do it",
            tuple(steps),
            tuple(turns),
            start_s,
            end_s,
            "template",
            "labels.txt",
        ),
        mistakes=mistakes,
    )


def exact(t: float) -> Fraction:
    return Fraction(round(t * 1000), 1000)


def tick_of(t: float, hz: Fraction) -> int:
    return math.ceil(exact(t) * hz)


def ticks_of(session: Session, hz: Fraction) -> list[int]:
    ticks = range(tick_of(session.start_s, hz), tick_of(session.end_s, hz) + 1)
    duration = session.video.duration_s
    return [k for k in ticks if duration is None or k / hz < exact(duration)]


@given(sessions(), st.sampled_from(sorted(RATES)))
def test_a_session_is_what_the_definitions_say(session: Session, rate: float) -> None:
    hz, rejects = RATES[rate], Rejects()
    aligned = align(session, Clock(rate), rejects)
    ticks = ticks_of(session, hz)
    if not ticks:
        assert aligned is None
        assert [reject.reason for reject in rejects.rows] == ["no ticks"]
        return
    assert aligned is not None
    assert aligned.frames.schema.equals(TABLES["frames"])
    rows = aligned.frames.to_pylist()
    assert [row["tick"] for row in rows] == ticks
    assert [row["t_s"] for row in rows] == [tick / rate for tick in ticks]
    assert (aligned.session["first_tick"], aligned.session["num_ticks"]) == (ticks[0], len(ticks))
    assert aligned.last_tick == ticks[-1]

    def inside(t: float) -> bool:
        return math.isfinite(t) and tick_of(t, hz) in ticks

    before = [0] * len(session.steps)
    for row in rows:
        t = row["tick"] / hz
        state = []
        for step in session.steps:
            started = inside(step.start) and t >= exact(step.start)
            ended = started and inside(step.end) and t >= exact(step.end)
            state.append(int(started) + int(ended))
        assert row["dst_state"] == state
        assert all(now >= then for now, then in zip(state, before, strict=True))
        assert row["dst_update"] == (state != before)
        changes = zip(before, state, strict=True)
        assert row["transitions"] == [(old == 0 < new) + 2 * (old < 2 == new) for old, new in changes]
        before = state
        said = [u for u in session.turns if u.role == "assistant" and tick_of(u.t_s, hz) == row["tick"]]
        said.sort(key=lambda turn: turn.t_s)
        assert row["speak"] == bool(said)
        assert row["response"] == (" ".join(turn.text for turn in said) if said else None)
        if session.mistakes is None:
            assert row["mistake"] is None
        else:
            assert row["mistake"] == any(exact(a) <= t < exact(b) for a, b in session.mistakes)
    check_rejects(session, rejects, inside, hz)
    check_turns(session, aligned, inside, hz)
    for row in aligned.steps:
        if row["step_id"] not in ("open", "none"):
            assert len(row["source_rows"]) == len(row["spans"])
        for span, source in zip(row["spans"], row["source_rows"], strict=False):
            start, end = source.removeprefix("row ").split("-")
            assert span["start_s"] == int(start) / 1000
            assert span["end_s"] in (int(end) / 1000, math.inf)


def check_rejects(session: Session, rejects: Rejects, inside: Callable[[float], bool], hz: Fraction) -> None:
    expected = []
    for step in session.steps:
        for what, t in (("start", step.start), ("end", step.end)):
            if math.isfinite(t) and not (inside(t) and inside(step.start)):
                expected.append(f"x/one step {step.step_id} {what}")
    expected += [f"x/one turn {n}" for n, turn in enumerate(session.turns) if not inside(turn.t_s)]
    expected += [
        f"x/one mistake {n}"
        for n, (a, b) in enumerate(session.mistakes or ())
        if not (inside(a) and inside(b)) or tick_of(a, hz) == tick_of(b, hz)
    ]
    assert sorted(reject.locator for reject in rejects.rows) == sorted(expected)


def check_turns(session: Session, aligned: Aligned, inside: Callable[[float], bool], hz: Fraction) -> None:
    used = [turn for turn in session.turns if inside(turn.t_s)]
    used.sort(key=lambda turn: turn.t_s)
    assert [row["text"] for row in aligned.turns] == [turn.text for turn in used]
    assert [row["tick"] for row in aligned.turns] == [tick_of(turn.t_s, hz) for turn in used]
    assert [row["turn"] for row in aligned.turns] == list(range(len(used)))
    spoken = [turn for turn in used if turn.role == "assistant"]
    assert aligned.joined_turns == len(spoken) - aligned.frames["speak"].to_pylist().count(True)


def test_a_video_shorter_than_its_annotations() -> None:
    session = session_of(
        [
            Step("S1", "one", ((1.0, 2.0),)),
            Step("S2", "two", ((2.0, 9.0),)),
            Step("S3", "three", ((9.0, 9.5),)),
        ],
        [Turn(1.0, "assistant", "one"), Turn(9.0, "assistant", "three")],
        start_s=0.5,
        end_s=11.5,
        duration_s=4.0,
    )
    rejects = Rejects()
    aligned = align(session, Clock(), rejects)
    assert aligned is not None
    assert aligned.frames["tick"].to_pylist() == [1, 2, 3, 4, 5, 6, 7]
    assert aligned.frames["dst_state"].to_pylist() == [[0, 0, 0], *[[1, 0, 0]] * 2, *[[2, 1, 0]] * 4]
    assert [row["spans"] for row in aligned.steps] == [
        [{"start_s": 1.0, "end_s": 2.0}],
        [{"start_s": 2.0, "end_s": math.inf}],
        [],
    ]
    assert rejects.rows == [
        Reject("labels.txt", "x/one step S2 end", "outside the video", "9.000 s, two"),
        Reject("labels.txt", "x/one step S3 start", "outside the video", "9.000 s, three"),
        Reject(
            *("labels.txt", "x/one step S3 end", "outside the video"),
            "9.500 s, three, whose start is not used",
        ),
        Reject("labels.txt", "x/one turn 1", "outside the video", "9.000 s, assistant: three"),
    ]


def test_a_step_shorter_than_a_tick_starts_and_completes_in_one() -> None:
    session = session_of([Step("S1", "one", ((1.1, 1.2),))], [], 0.0, 2.0)
    aligned = align(session, Clock(), Rejects())
    assert aligned is not None
    assert aligned.frames["transitions"].to_pylist() == [[0], [0], [0], [3], [0]]
    assert aligned.frames["mistake"].to_pylist() == [None] * 5


def test_texts_of_one_tick_are_joined_in_order_of_time() -> None:
    turns = [Turn(1.4, "assistant", "second"), Turn(1.2, "assistant", "first"), Turn(1.3, "user", "hm")]
    aligned = align(session_of([Step("S1", "one", ((1.0, 2.0),))], turns, 0.0, 2.0), Clock(), Rejects())
    assert aligned is not None
    assert aligned.frames["response"].to_pylist() == [None, None, None, "first second", None]
    assert [(row["text"], row["tick"]) for row in aligned.turns] == [("first", 3), ("hm", 3), ("second", 3)]
    assert aligned.joined_turns == 1


@pytest.mark.parametrize(
    ("steps", "duration_s", "reason"),
    [([], None, "no steps"), ([Step("S1", "one", ((9.0, 9.5),))], 5.0, "no ticks")],
)
def test_nothing_left_is_one_reject(steps: list[Step], duration_s: float | None, reason: str) -> None:
    rejects = Rejects()
    assert align(session_of(steps, [], 7.0, 11.5, duration_s), Clock(), rejects) is None
    assert [(reject.locator, reject.reason) for reject in rejects.rows] == [("x/one", reason)]
