"""The clock and the dialog state, against the definitions read out in exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.clock import Clock
from schemas.states import (
    COMPLETE,
    COMPLETED,
    IN_PROGRESS,
    NOT_STARTED,
    START,
    StateValidator,
    Step,
    TimestampToStateConverter,
    parse_dst,
    transitions_between,
)

RATES = {
    0.5: Fraction(1, 2),
    1.0: Fraction(1),
    2.0: Fraction(2),
    5.0: Fraction(5),
    29.97: Fraction(2997, 100),
}
rates = st.sampled_from(sorted(RATES))
milliseconds = st.integers(0, 3_600_000)


@st.composite
def step_times(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Starts and ends in milliseconds; often equal, or touching one another."""
    points = draw(st.lists(st.integers(0, 5_000), min_size=2, max_size=6))
    pairs = draw(
        st.lists(st.tuples(st.sampled_from(points), st.sampled_from(points)), min_size=1, max_size=5)
    )
    return [(min(pair), max(pair)) for pair in pairs]


def as_steps(times: list[tuple[int, int]]) -> list[Step]:
    return [Step(f"S{n}", f"step {n}", ((a / 1000, b / 1000),)) for n, (a, b) in enumerate(times)]


@given(rates, milliseconds)
def test_an_event_belongs_to_the_first_tick_at_or_after_it(hz: float, ms: int) -> None:
    tick, t = Clock(hz).tick_of(ms / 1000), Fraction(ms, 1000)
    assert tick / RATES[hz] >= t > (tick - 1) / RATES[hz]


@given(rates, st.integers(0, 60_000))
def test_ticks_of_a_video_are_those_before_its_end(hz: float, ms: int) -> None:
    count = 0
    while count / RATES[hz] < Fraction(ms, 1000):
        count += 1
    assert Clock(hz).num_ticks(ms / 1000) == count


@given(rates, st.integers(0, 10**6))
def test_the_instant_of_a_tick_belongs_to_that_tick(hz: float, tick: int) -> None:
    assert Clock(hz).tick_of(Clock(hz).time_of(tick)) == tick


@pytest.mark.parametrize("hz", [0.0, -1.0, math.inf, math.nan])
def test_a_clock_needs_a_rate(hz: float) -> None:
    with pytest.raises(ValueError, match="tick_hz"):
        Clock(hz)


@given(rates, st.integers(0, 6_000), step_times())
def test_states_are_those_of_half_open_spans(hz: float, ms: int, times: list[tuple[int, int]]) -> None:
    expected = [NOT_STARTED if ms < start else IN_PROGRESS if ms < end else COMPLETED for start, end in times]
    assert TimestampToStateConverter(Clock(hz)).convert(ms / 1000, as_steps(times)) == expected


@given(rates, step_times(), st.integers(0, 200))
def test_matrix_rows_are_the_states_at_their_ticks(
    hz: float, times: list[tuple[int, int]], first: int
) -> None:
    converter, steps = TimestampToStateConverter(Clock(hz)), as_steps(times)
    ticks = np.arange(first, first + 40)
    matrix = converter.matrix(ticks, steps)
    assert matrix.dtype == np.int8
    assert matrix.shape == (40, len(times))
    for tick, row in zip(ticks.tolist(), matrix.tolist(), strict=True):
        assert row == converter.convert(tick / hz, steps)
        t = tick / RATES[hz] * 1000
        assert row == [int(t >= start) + int(t >= end) for start, end in times]


@given(rates, st.integers(0, 10**6), st.integers(0, 100))
def test_a_step_on_a_tick_starts_and_ends_on_it(hz: float, tick: int, length: int) -> None:
    step = Step("S1", "one", ((tick / hz, (tick + length) / hz),))
    states = TimestampToStateConverter(Clock(hz)).matrix([tick - 1, tick, tick + length], [step])
    assert states[:, 0].tolist() == [0, 1 if length else 2, 2]


def test_a_step_that_is_interrupted_is_in_progress_from_first_start_to_last_end() -> None:
    step = Step("S1", "one", ((5.0, 6.0), (1.0, 2.0)))
    assert (step.start, step.end) == (1.0, 6.0)
    assert [TimestampToStateConverter().convert(t, [step])[0] for t in (0.5, 1, 3, 5.9, 6)] == [0, 1, 1, 1, 2]


FORMS: dict[str, tuple[Any, list[Step]]] = {
    "list": (
        [
            {"type": "step", "id": "S1", "start_ts": 1.5, "end_ts": 2, "name": "Take the cup."},
            {"type": "step", "id": "S2", "start_ts": "3", "end_ts": None, "name": "Fill it."},
        ],
        [Step("S1", "Take the cup.", ((1.5, 2.0),)), Step("S2", "Fill it.", ((3.0, math.inf),))],
    ),
    "nested": (
        {
            "steps": [
                {
                    "step_id": "1",
                    "name": "tea",
                    "timestamps": {"start_ts": 1, "end_ts": 9},
                    "substeps": [
                        {
                            "name": "boil",
                            "timestamps": {"start_ts": 2, "end_ts": 5},
                            "actions": [{"id": "a", "name": "switch on", "start_ts": 2, "end_ts": 2}],
                        }
                    ],
                },
                {"step_id": "2", "name": "drink", "timestamps": {"start_ts": None, "end_ts": None}},
            ]
        },
        [
            Step("1", "tea", ((1.0, 9.0),)),
            Step("1.1", "boil", ((2.0, 5.0),), "substep", "1"),
            Step("a", "switch on", ((2.0, 2.0),), "action", "1.1"),
            Step("2", "drink"),
        ],
    ),
    "tsv": (
        'type\tid\tstart_ts\tend_ts\tname\nSTEP\tS1\t0\t4.5\topen the "box"\nsubstep\tS2\t1\t\tlook\n',
        [
            Step("S1", 'open the "box"', ((0.0, 4.5),)),
            Step("S2", "look", ((1.0, math.inf),), "substep"),
        ],
    ),
    "tsv with the line ends of three systems": (
        "STEP\tS1\t0\t4.5\tcut\rstep\tS2\t1\t2\tlook\r\n\r\nstep\tS3\t2\t\t" + "x" * 200_000 + "\n\r",
        [
            Step("S1", "cut", ((0.0, 4.5),)),
            Step("S2", "look", ((1.0, 2.0),)),
            Step("S3", "x" * 200_000, ((2.0, math.inf),)),
        ],
    ),
    "ids that are numbers": (
        [{"id": 1, "start_ts": 0, "end_ts": 1, "name": " cut "}, {"id": 0, "start_ts": 2, "end_ts": 3}],
        [Step("1", "cut", ((0.0, 1.0),)), Step("0", "0", ((2.0, 3.0),))],
    ),
    "confidence": (
        {"steps": [{"id": "S1", "name": "cut", "t0": 0.25, "t1": 0.75, "conf": 0.9}]},
        [Step("S1", "cut", ((0.25, 0.75),))],
    ),
    "tasks": (
        {"wash": {"timestamps": [1, 2, 7]}, "dry": {"timestamps": []}, "look": {"timestamps": [3]}},
        [Step("S1", "wash", ((1.0, 7.0),)), Step("S2", "dry"), Step("S3", "look", ((3.0, 3.0),))],
    ),
    "empty": ([], []),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_dst_is_read(form: str) -> None:
    dst, expected = FORMS[form]
    assert parse_dst(dst) == expected
    assert TimestampToStateConverter().convert(100.0, dst) == [
        0 if math.isinf(s.start) else 1 if math.isinf(s.end) else 2 for s in expected
    ]


def nested(depth: int) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for _ in range(depth):
        entries = [{"start_ts": 1, "end_ts": 2, "substeps": entries}]
    return entries


def test_substeps_in_substeps() -> None:
    steps = parse_dst(nested(40))
    assert [len(step.step_id.split(".")) for step in steps] == list(range(1, 41))
    with pytest.raises(ValueError, match="entries in entries without end"):
        parse_dst(nested(5_000))


@pytest.mark.parametrize(
    ("dst", "named"),
    [
        ([{"id": "S1", "start_ts": "soon", "end_ts": 2}], "S1.*soon"),
        ([{"id": "S1", "start_ts": 10**400, "end_ts": 2}], "S1"),
        ([{"id": "S1", "name": "x"}], "S1.*start_ts"),
        ([{"id": "S1", "start_ts": 1}], "S1.*end_ts"),
        ([{"id": "S1", "start_ts": None, "end_ts": 2}], "S1.*no start"),
        ([{"id": "S1", "start_ts": 3, "end_ts": 2}], "S1.*before"),
        ([{"id": "S1", "start_ts": -3, "end_ts": 2}], "S1"),
        ([{"id": "S1", "start_ts": math.nan, "end_ts": 2}], "S1"),
        ([{"id": "S1", "start_ts": math.inf, "end_ts": None}], "S1"),
        ([{"id": "S1", "start_ts": True, "end_ts": 2}], "S1.*True, which is not a number"),
        ([{"id": "S1", "start_ts": 0, "end_ts": False}], "S1.*False, which is not a number"),
        ({"wash": {"timestamps": [True, 2]}}, "S1.*True"),
        *(
            ([{"id": "S1", "start_ts": 1, "end_ts": 2, "name": name}], "S1.*name")
            for name in (None, "", " ", 5, ["cut"], {"en": "cut"}, False)
        ),
        ({" ": {"timestamps": [1, 2]}}, "S1.*name"),
        ("step\tS1\t1\t2\t ", "S1.*name"),
        *(
            ([{"id": "S1", "t0": 0, "t1": 1}, {"id": given, "t0": 1, "t1": 2}], "entry 1 has the id")
            for given in (None, True, 1.5, ["S1"], {})
        ),
        ([{"id": "S1", "start_ts": 1, "end_ts": 2, "substeps": 5}], "S1"),
        ([{"id": "S1", "start_ts": 1, "end_ts": 2, "substeps": "S2"}], "S1"),
        (["S1"], "entry 0"),
        ({"steps": ["S1"]}, "entry 0"),
        ({"wash": {"timestamps": "12"}}, "wash"),
        ({"wash": {"times": [1]}}, "wash"),
        ({"wash": {"timestamps": ["x"]}}, "S1.*'x'"),
        ({"wash": 5}, "wash"),
        ("step\tS1\t1\t2", "line 1"),
        ("step\tS1\t1\t2\tcut\r\n\r\nstep\tS2\t1\t2\n", "line 3"),
        ("step\tS1\t1\tlate\tcut", "S1.*late"),
        (5, "int"),
    ],
)
def test_a_malformed_dst_names_its_entry(dst: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_dst(dst)


def test_transitions_say_what_changed() -> None:
    before = np.array([0, 0, 0, 1, 1, 2], np.int8)
    after = np.array([0, 1, 2, 1, 2, 2], np.int8)
    assert transitions_between(before, after).tolist() == [0, START, START | COMPLETE, 0, COMPLETE, 0]


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=3, max_size=3), min_size=1, max_size=20
    )
)
def test_the_validator_keeps_what_moves_forward_and_names_the_rest(
    predictions: list[list[tuple[int, bool]]],
) -> None:
    validator = StateValidator([0, 0, 0])
    held, proposed = [0, 0, 0], 0
    for predicted in predictions:
        refused = []
        for step, (state, sure) in enumerate(predicted):
            proposed += state != held[step]
            if state < held[step] or (held[step] == 0 and state == 2 and not sure):
                refused.append(step)
            else:
                held[step] = state
        states = np.array([state for state, _ in predicted])
        probability = np.array([0.96 if sure else 0.94 for _, sure in predicted])
        assert validator.update(states, probability).tolist() == refused
        assert validator.state.tolist() == held
    assert validator.proposed == proposed
