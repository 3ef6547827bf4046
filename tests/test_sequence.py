"""How a window is written, and what may attend to what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from training.batch import pack
from training.losses import IGNORE
from training.sequence import STATE_TAGS, SequenceBuilder, Words, may_attend

STEPS = ("attach the red wheel", "attach the blue cabin", "attach the green roof")
WORDS = (
    Words(2, "user", "I want to assemble the crane."),
    Words(5, "assistant", "First, attach the red wheel."),
    Words(9, "user", "Is this the right one?"),
    Words(9, "assistant", "Yes, that is the red wheel."),
    Words(9, "assistant", "Well done."),
    Words(12, "user", "Okay."),
)


@pytest.fixture(scope="module")
def builder(tiny_model: Path) -> SequenceBuilder:
    return SequenceBuilder(AutoTokenizer.from_pretrained(tiny_model), 2, max_plan_steps=24, memory_turns=1)


def test_a_window_reads_as_its_parts_in_order(builder: SequenceBuilder) -> None:
    window = builder.window("Assemble the crane", STEPS, np.array([2, 1, 0], np.int8), 8, 3, WORDS)
    text = builder.tokenizer.decode(window.tokens)
    assert text == (
        "<|im_start|>System: You are a proactive assistant.\nGoal: Assemble the crane\nPlan:"
        "\n1. done: attach the red wheel\n2. doing: attach the blue cabin\n3. to do: attach the green roof"
        "<end_of_utterance>\n"
        "Assistant: First, attach the red wheel.<end_of_utterance>\n"  # the last turn before the window
        "<image><image>"
        "User: Is this the right one?<end_of_utterance>\n<image><image>"
        "Assistant: Yes, that is the red wheel. Well done.<end_of_utterance>"
        "<image><image>"
    )


def test_heads_read_at_the_last_visual_token_and_the_last_token_of_each_name(
    builder: SequenceBuilder,
) -> None:
    window = builder.window("Assemble the crane", STEPS, np.zeros(3, np.int8), 8, 3, WORDS)
    images = np.flatnonzero(window.tokens == builder.image_id)
    assert window.visual_at.tolist() == images.tolist()
    assert window.tick_at.tolist() == images[1::2].tolist()
    for index, name in zip(window.step_at, STEPS, strict=True):
        assert builder.tokenizer.decode(window.tokens[: index + 1]).endswith(f"{STATE_TAGS[0]}: {name}")


def test_positions_of_the_trunk_count_on_as_if_speech_were_not_there(builder: SequenceBuilder) -> None:
    window = builder.window("Assemble the crane", STEPS, np.zeros(3, np.int8), 8, 3, WORDS)
    silent = [w for w in WORDS if w.role == "user" or w.tick < 8]
    alone = builder.window("Assemble the crane", STEPS, np.zeros(3, np.int8), 8, 3, silent)
    assert window.tokens[~window.speech].tolist() == alone.tokens.tolist()
    assert window.positions[~window.speech].tolist() == list(range(len(alone.tokens)))
    first_spoken = int(np.argmax(window.speech))
    assert window.positions[first_spoken] == window.positions[first_spoken - 1] + 1


def test_the_answer_and_its_end_are_the_targets(builder: SequenceBuilder) -> None:
    window = builder.window("Assemble the crane", STEPS, np.zeros(3, np.int8), 8, 3, WORDS)
    labelled = np.flatnonzero(window.targets != IGNORE)
    assert window.speech[labelled].all()
    assert window.targets[labelled].tolist() == window.tokens[labelled + 1].tolist()
    assert window.targets[labelled[-1]] == builder.end_of_utterance
    assert builder.text_of(window.targets[labelled].tolist()) == "Yes, that is the red wheel. Well done."
    assert builder.end_of_utterance != builder.pad_token


def test_a_long_plan_shows_the_steps_around_the_first_open_one(tiny_model: Path) -> None:
    builder = SequenceBuilder(AutoTokenizer.from_pretrained(tiny_model), 1, max_plan_steps=8, memory_turns=0)
    names = [f"step number {n}" for n in range(40)]
    state = np.array([2] * 20 + [0] * 20, np.int8)
    window = builder.window("Assemble the crane", names, state, 0, 2, [])
    assert window.shown.tolist() == list(range(18, 26))
    assert "\n21. to do: step number 20" in builder.tokenizer.decode(window.tokens)
    assert builder.shown_steps(np.full(40, 2, np.int8)).tolist() == list(range(32, 40))
    assert builder.shown_steps(np.zeros(40, np.int8)).tolist() == list(range(8))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), min_size=1, max_size=12))
def test_may_attend_against_the_rule_read_pair_by_pair(rows: list[tuple[bool, int]]) -> None:
    rows = sorted(rows, key=lambda row: row[1])  # documents lie one after the other
    speech, documents = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    allowed = may_attend(speech, documents)
    for query in range(len(rows)):
        for key in range(len(rows)):
            expected = key <= query and documents[key] == documents[query]
            if speech[key] and not speech[query]:
                expected = False
            assert allowed[query, key] == expected


@given(st.lists(st.integers(1, 120), min_size=1, max_size=30))
def test_packing_keeps_each_window_once_and_rows_within_bounds(lengths: list[int]) -> None:
    rows = pack(lengths, 100)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[index] for index in row) <= 100
