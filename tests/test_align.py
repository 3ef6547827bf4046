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
from schemas.records import DialogOrigin, Reject, Rejects, Session, Turn, Video
from schemas.states import SourceRow, Step
from schemas.tables import TABLES

RATES = {1.0: Fraction(1), 2.0: Fraction(2), 5.0: Fraction(5), 29.97: Fraction(2997, 100)}
# a coarse grid makes touching spans, shared ticks and events on ticks common; the fine one, everything between
times = st.one_of(st.integers(0, 24).map(lambda n: 250 * n), st.integers(0, 6_000))


def spans(most: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    span = st.tuples(times, times).map(lambda pair: (min(pair), max(pair)))
    return st.lists(span, min_size=1, max_size=most)


@st.composite
def sessions(draw: st.DrawFn) -> Session:
    """Some of the steps, turns and mistakes were read from rows, which name what they hold."""
    start, end = sorted((draw(times), draw(times)))
    duration = draw(st.none() | st.integers(1, 6_000))
    from_rows = draw(st.booleans())
    steps = []
    for n in range(1, draw(st.integers(1, 4)) + 1):
        drawn = draw(spans(3))
        rows = tuple(SourceRow("steps.txt", f"step {n}: {a}-{b}") for a, b in drawn) if from_rows else ()
        steps.append(
            Step(f"S{n}", f"step {n}", tuple((a / 1000, b / 1000) for a, b in drawn), source_rows=rows)
        )
    if draw(st.booleans()):
        steps.append(Step("open", "never ends", ((draw(times) / 1000, math.inf),)))
    if draw(st.booleans()):
        steps.append(Step("none", "never starts"))
    turns = [
        Turn(
            (draw(times) - 1000) / 1000,  # some before the video begins
            draw(st.sampled_from(("user", "assistant"))),
            f"words {n}",
            source_row=SourceRow("words.txt", f"line {n}") if draw(st.booleans()) else None,
        )
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
        tuple(SourceRow("wrong.txt", f"line {n}") for n in range(len(mistakes or ()))) if from_rows else (),
        draw(st.sampled_from(("template", "human"))),
    )


def session_of(
    steps: list[Step],
    turns: list[Turn],
    start_s: float,
    end_s: float,
    duration_s: float | None = None,
    mistakes: tuple[tuple[float, float], ...] | None = None,
    mistake_rows: tuple[SourceRow, ...] = (),
    dialog_origin: DialogOrigin = "human",
) -> Session:
    return Session(
        session_id="x/one",
        video=Video("x/one/cam", "one", "cam.mp4", duration_s=duration_s),
        split="train",
        goal="do it",
        steps=tuple(steps),
        turns=tuple(turns),
        start_s=start_s,
        end_s=end_s,
        dialog_origin=dialog_origin,
        source_file="labels.txt",
        mistakes=mistakes,
        mistake_rows=mistake_rows,
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
        assert {reject.reason for reject in rejects.rows} == {"no ticks"}
        rows = [row for step in session.steps for row in step.source_rows]
        rows += [turn.source_row for turn in session.turns if turn.source_row]
        rows = [("labels.txt", "x/one"), *rows, *session.mistake_rows]
        assert [(reject.source_file, reject.locator) for reject in rejects.rows] == rows
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
            marked = any(
                exact(a) <= t < exact(b) or row["tick"] == tick_of(a, hz) for a, b in session.mistakes
            )
            assert row["mistake"] == marked
    check_steps(session, aligned, inside)
    check_turns(session, aligned, inside, hz)
    assert sorted(map(in_words, rejects.rows)) == sorted(expected_rejects(session, inside, hz))


def check_steps(session: Session, aligned: Aligned, inside: Callable[[float], bool]) -> None:
    """The table has what the states were made from: no end, where a step goes on where nobody sees it."""
    for step, row in zip(session.steps, aligned.steps, strict=True):
        starts = sorted(a for a, _ in step.spans if inside(a) and inside(step.start))
        assert [span["start_s"] for span in row["spans"]] == starts
        seen_to_end = all(inside(t) for span in step.spans for t in span)
        assert all(math.isfinite(span["end_s"]) for span in row["spans"]) == (seen_to_end or not starts)
        assert {span["end_s"] for span in row["spans"]} <= {b for _, b in step.spans} | {math.inf}
        if not step.source_rows:
            assert row["source_rows"] == []
            continue
        for span, source in zip(row["spans"], row["source_rows"], strict=True):
            start, end = source.removeprefix(f"steps.txt, {step.name}: ").split("-")
            assert span["start_s"] == int(start) / 1000
            assert span["end_s"] in (int(end) / 1000, math.inf)


def in_words(reject: Reject) -> tuple[str, str, str, str]:
    """A reject's file, place, reason, and which event of the session it was."""
    if reject.source_file == "labels.txt":
        return reject.source_file, reject.locator, reject.reason, reject.locator
    return reject.source_file, reject.locator, reject.reason, reject.detail.partition(": ")[0]


def expected_rejects(
    session: Session, inside: Callable[[float], bool], hz: Fraction
) -> list[tuple[str, str, str, str]]:
    """One for each span, turn and mistake that is not wholly inside, at its row, else by its name."""
    outside: list[tuple[str, float, SourceRow | None]] = []
    for step in session.steps:
        for (a, b), row in zip(step.spans, step.source_rows or [None] * len(step.spans), strict=True):
            if not (inside(step.start) and inside(a)):
                outside.append((f"step {step.step_id} start", a, row))
            elif math.isfinite(b) and not inside(b):
                outside.append((f"step {step.step_id} end", b, row))
    if session.dialog_origin == "human":  # no file holds the others
        for n, turn in enumerate(session.turns):
            if not inside(turn.t_s):
                outside.append((f"turn {n}", turn.t_s, turn.source_row))
    mistakes = session.mistakes or ()
    for n, (a, b) in enumerate(mistakes):
        if not (inside(a) and inside(b)):
            row = session.mistake_rows[n] if session.mistake_rows else None
            outside.append((f"mistake {n}", a if not inside(a) else b, row))
    duration = session.video.duration_s
    expected = []
    for event, t, row in outside:
        tick = tick_of(t, hz)
        in_video = tick >= 0 and (duration is None or tick / hz < exact(duration))
        reason = "outside the session" if in_video else "outside the video"
        expected.append((*(row or ("labels.txt", f"x/one {event}")), reason, f"x/one {event}"))
    return expected


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
            Step("S2", "two", ((2.0, 9.0),), source_rows=(SourceRow("a.csv", "row 2"),)),
            Step("S3", "three", ((9.0, 9.5),), source_rows=(SourceRow("a.csv", "row 3"),)),
            Step("S4", "four", ((9.5, 10.0),)),
        ],
        [
            Turn(1.0, "assistant", "one"),
            Turn(9.0, "assistant", "three", source_row=SourceRow("b.json", "record 1, turn 2")),
            Turn(9.5, "user", "four"),
        ],
        start_s=0.5,
        end_s=11.5,
        duration_s=4.0,
        mistakes=((1.6, 1.7), (3.0, 5.0), (9.0, 9.5)),
        mistake_rows=tuple(SourceRow("c.csv", f"row {n}") for n in (4, 5, 6)),
    )
    rejects = Rejects()
    aligned = align(session, Clock(), rejects)
    assert aligned is not None
    assert aligned.frames["tick"].to_pylist() == [1, 2, 3, 4, 5, 6, 7]
    states = [[0, 0, 0, 0], *[[1, 0, 0, 0]] * 2, *[[2, 1, 0, 0]] * 4]
    assert aligned.frames["dst_state"].to_pylist() == states
    assert aligned.frames["mistake"].to_pylist() == [False, False, False, True, False, True, True]
    assert [row["spans"] for row in aligned.steps] == [
        [{"start_s": 1.0, "end_s": 2.0}],
        [{"start_s": 2.0, "end_s": math.inf}],
        [],
        [],
    ]
    assert [row["source_rows"] for row in aligned.steps] == [[], ["a.csv, row 2"], [], []]
    late = "outside the video"
    assert rejects.rows == [
        Reject("a.csv", "row 2", late, "x/one step S2 end: 2.000 to 9.000 s, two"),
        Reject("a.csv", "row 3", late, "x/one step S3 start: 9.000 to 9.500 s, three"),
        Reject("labels.txt", "x/one step S4 start", late, "9.500 to 10.000 s, four"),
        Reject("b.json", "record 1, turn 2", late, "x/one turn 1: 9.000 s, assistant: three"),
        Reject("labels.txt", "x/one turn 2", late, "9.500 s, user: four"),
        Reject("c.csv", "row 5", late, "x/one mistake 1: 3.000 to 5.000 s, marked from its start on"),
        Reject("c.csv", "row 6", late, "x/one mistake 2: 9.000 to 9.500 s"),
    ]


def test_words_of_the_template_outside_are_no_rejects() -> None:
    """No file holds them, and what they are made of is one by itself."""
    rejects, step = Rejects(), Step("S1", "one", ((1.0, 9.0),))
    turns = [Turn(1.0, "assistant", "Next: one."), Turn(9.0, "assistant", "Done.")]
    aligned = align(session_of([step], turns, 0.0, 11.0, 4.0, dialog_origin="template"), Clock(), rejects)
    assert aligned is not None
    assert [row["text"] for row in aligned.turns] == ["Next: one."]
    assert [reject.locator for reject in rejects.rows] == ["x/one step S1 end"]


def test_a_span_in_the_middle_that_ends_outside_leaves_the_step_open() -> None:
    spans, rows = ((1.0, 2.0), (3.0, 9.0), (9.5, 9.75)), [SourceRow("a.csv", f"row {n}") for n in (1, 2, 3)]
    rejects = Rejects()
    step = Step("S1", "one", spans, source_rows=tuple(rows))
    aligned = align(session_of([step], [], 0.0, 11.0, 5.0), Clock(1.0), rejects)
    assert aligned is not None
    assert aligned.steps[0]["spans"] == [{"start_s": 1.0, "end_s": 2.0}, {"start_s": 3.0, "end_s": math.inf}]
    assert aligned.steps[0]["source_rows"] == ["a.csv, row 1", "a.csv, row 2"]
    assert aligned.frames["dst_state"].to_pylist() == [[0], [1], [1], [1], [1]]
    events = ["x/one step S1 end", "x/one step S1 start"]
    assert [reject.detail.partition(":")[0] for reject in rejects.rows] == events
    assert [(reject.source_file, reject.locator) for reject in rejects.rows] == rows[1:]


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
