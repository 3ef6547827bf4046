"""How a window is written, and what may attend to what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bare_windows import bare_example
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from training.batch import collate, pack
from training.losses import IGNORE
from training.sequence import STATE_TAGS, SequenceBuilder, Words, shown_steps

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
    assert shown_steps(np.full(40, 2, np.int8), 8).tolist() == list(range(32, 40))
    assert shown_steps(np.zeros(40, np.int8), 8).tolist() == list(range(8))


@given(
    st.lists(
        st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=3),
        min_size=1,
        max_size=3,
    )
)
def test_the_mask_against_the_rule_read_pair_by_pair(rows: list[list[list[bool]]]) -> None:
    windows = [speech for row in rows for speech in row]
    numbers = iter(range(len(windows)))
    batch = collate(
        [bare_example(speech) for speech in windows], [[next(numbers) for _ in row] for row in rows], 0
    )
    size = max(sum(map(len, row)) for row in rows)
    mask = batch.additive_mask(torch.float32)
    assert mask.shape == (len(rows), 1, size, size)
    assert set(mask.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}
    for row, seen in zip(rows, (mask[:, 0] == 0).tolist(), strict=True):
        # of each position: the number of its window in the row (the padding's is -1), and whether it is spoken
        laid = [(number, spoken) for number, speech in enumerate(row) for spoken in speech]
        laid += [(-1, False)] * (size - len(laid))
        for query, (mine, i_speak) in enumerate(laid):
            for key, (other, spoken) in enumerate(laid):
                expected = key <= query and mine == other
                if spoken and not i_speak:
                    expected = False
                assert seen[query][key] == expected


def test_rows_lie_as_they_were_told() -> None:
    sizes = (5, 3, 4)
    batch = collate([bare_example([False] * size) for size in sizes], [[2, 1], [0]], pad_token=99)
    assert batch.order == [2, 1, 0]
    assert batch.tokens.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 99, 99]]
    assert batch.documents.tolist() == [[0, 0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 2, -1, -1]]
    assert batch.tick_at.tolist() == [0, 4, 7]
    assert batch.padding == pytest.approx(2 / 14)


@given(st.lists(st.integers(1, 120), min_size=1, max_size=30))
def test_packing_keeps_each_window_once_and_rows_within_bounds(lengths: list[int]) -> None:
    rows = pack(lengths, 100)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[index] for index in row) <= 100
