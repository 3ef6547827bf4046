"""The order of training: each tick once an epoch, the same steps from any position, on any ranks and workers."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.shards import ShardCache
from training import sampler
from training.batch import Batch
from training.data import SessionData, load_sessions
from training.losses import IGNORE
from training.model import DSTSmolVLMConfig
from training.recipe import Recipe, load_recipe
from training.sampler import TrainingSteps, subsampled, with_noise
from training.sequence import SequenceBuilder
from training.steps import Position, Step, training_loader

SMALL = ["data.window_ticks=24", "data.batch_rows=3", "data.max_seq_len=400", "data.state_noise=0.1"]
END_OF_TURN = ["data.speech=inline", "data.speak_by=end_of_turn", "tasks.speaking.weight=0"]


@pytest.fixture(scope="module")
def sessions(shards: Path) -> list[SessionData]:
    return load_sessions(ShardCache(shards), "train")


@pytest.fixture(scope="module")
def folder(tiny_model: Path) -> Path:
    return tiny_model


def steps_of(
    sessions: list[SessionData],
    folder: Path,
    overrides: list[str],
    start: Position = sampler.START,
    rank: int = 0,
    ranks: int = 1,
) -> TrainingSteps:
    recipe = load_recipe("tiny", [*SMALL, *overrides])
    return TrainingSteps(sessions, builder_of(folder, recipe), recipe, start, rank, ranks)


def builder_of(folder: Path, recipe: Recipe) -> SequenceBuilder:
    data = recipe.data
    config = DSTSmolVLMConfig(
        visual_tokens=1,
        max_plan_steps=data.max_plan_steps,
        memory_turns=data.memory_turns,
        speech=data.speech,
        speak_by=data.speak_by,
    )
    return SequenceBuilder.of(folder, config)


def epoch_of(steps: TrainingSteps, epoch: int = 0) -> list[Step]:
    """All steps of an epoch, found by where they lead."""
    steps.start = Position(epoch)
    found = []
    for step in steps:
        found.append(step)
        if step.after.epoch > epoch:
            return found
    raise AssertionError


def place(name: str) -> tuple[str, range]:
    """The session and the ticks that a window's name tells."""
    session_id, _, first, _, last = name.rsplit(" ", 4)
    return session_id, range(int(first), int(last) + 1)


def rows_of(batch: Batch) -> list[tuple[str, ...]]:
    return [
        tuple(batch.names[number] for number in sorted(set(row.tolist()) - {-1})) for row in batch.documents
    ]


def by_tick(steps: list[Step], name: str) -> dict[tuple[str, int], list[int]]:
    """The labels of each tick of the data."""
    found: dict[tuple[str, int], list[int]] = {}
    for batch in (batch for step in steps for batch in step.passes):
        labels = getattr(batch, name).tolist()
        places = [(s, tick) for s, ticks in map(place, batch.names) for tick in ticks]
        for where, label in zip(places, labels, strict=True):
            found.setdefault(where, []).append(label)
    return found


def is_same(one: Step, other: Step) -> bool:
    if one.after != other.after or len(one.passes) != len(other.passes):
        return False
    for a, b in zip(one.passes, other.passes, strict=True):
        for name, value in vars(a).items():
            theirs = getattr(b, name)
            if not (torch.equal(value, theirs) if torch.is_tensor(value) else value == theirs):
                return False
    return True


def test_an_epoch_has_each_tick_once_and_cuts_where_the_last_did_not(
    sessions: list[SessionData], folder: Path
) -> None:
    all_ticks = {(s.session_id, s.first_tick + i) for s in sessions for i in range(s.num_ticks)}
    cuts = []
    for epoch in range(2):
        names = [
            name
            for step in epoch_of(steps_of(sessions, folder, []), epoch)
            for b in step.passes
            for name in b.names
        ]
        seen = Counter((s, tick) for s, ticks in map(place, names) for tick in ticks)
        assert seen.keys() == all_ticks
        assert set(seen.values()) == {1}
        cuts.append(set(names))
    assert len(cuts[0] & cuts[1]) < len(cuts[0]) / 3


def test_what_a_window_holds_is_what_its_name_says(sessions: list[SessionData], folder: Path) -> None:
    by_id = {session.session_id: session for session in sessions}
    for batch in (batch for step in epoch_of(steps_of(sessions, folder, [])) for batch in step.passes):
        for number, (session_id, ticks) in enumerate(map(place, batch.names)):
            session, mine = by_id[session_id], batch.window_of_tick == number
            here = slice(ticks.start - session.first_tick, ticks.stop - session.first_tick)
            assert np.array_equal(batch.features[mine].numpy(), session.features(ticks.start, len(ticks)))
            assert batch.speaking[mine].tolist() == session.truth.speak[here].astype(int).tolist()
            assert batch.dst_update[mine].tolist() == session.truth.dst_update[here].astype(int).tolist()
            assert batch.near[mine].tolist() == session.near[here].tolist()
            assert (batch.documents.flatten()[batch.tick_at[mine]] == number).all()


def test_the_order_follows_from_seed_and_epoch_alone(
    sessions: list[SessionData], shards: Path, folder: Path
) -> None:
    first = epoch_of(steps_of(sessions, folder, []), 1)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    again = steps_of(load_sessions(ShardCache(shards), "train"), folder, [])
    epoch_of(again, 0)  # what came before does not matter
    assert all(map(is_same, first, epoch_of(again, 1)))
    for other in (epoch_of(again, 2), epoch_of(steps_of(sessions, folder, ["train.seed=1"]), 1)):
        assert not any(map(is_same, first, other))


def test_from_any_position_on_come_the_same_steps(sessions: list[SessionData], folder: Path) -> None:
    everything = epoch_of(steps_of(sessions, folder, []), 0)
    length = len(everything)
    assert length > 3
    assert [step.after for step in everything] == [*(Position(0, n) for n in range(1, length)), Position(1)]
    everything += epoch_of(steps_of(sessions, folder, []), 1)
    for begin in range(length + 2):
        at = everything[begin - 1].after if begin else Position()
        steps = list(islice(steps_of(sessions, folder, [], at), 4))
        assert all(map(is_same, steps, everything[begin:]))


def test_a_step_is_planned_a_pool_ahead_and_only_its_own_features_are_read(
    sessions: list[SessionData], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "POOL_WINDOWS", 12)
    planned, read = [], []
    write, features = SequenceBuilder.window, SessionData.features
    monkeypatch.setattr(SequenceBuilder, "window", lambda *a: [planned.append(1), write(*a)][1])
    monkeypatch.setattr(SessionData, "features", lambda *a: [read.append(1), features(*a)][1])
    length = len(epoch_of(steps_of(sessions, folder, [])))
    planned.clear(), read.clear()
    first = next(iter(steps_of(sessions, folder, [])))
    assert len(planned) <= 2 * 12
    assert len(read) == len(first.passes[0].names)
    read.clear()
    last = next(iter(steps_of(sessions, folder, [], Position(0, length - 1))))
    assert last.after == Position(1)
    assert len(read) == len(last.passes[0].names)


@pytest.mark.parametrize("rows_at_once", [None, 1, 2])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_all_ranks_together_have_the_rows_of_one(
    sessions: list[SessionData], folder: Path, ranks: int, rows_at_once: int | None
) -> None:
    settings = ["data.batch_rows=4", f"data.rows_at_once={'null' if rows_at_once is None else rows_at_once}"]
    whole = epoch_of(steps_of(sessions, folder, ["data.batch_rows=4"]))
    shares = [epoch_of(steps_of(sessions, folder, settings, rank=r, ranks=ranks)) for r in range(ranks)]
    for step, *parts in zip(whole, *shares, strict=True):
        assert {part.after for part in parts} == {step.after}
        batches = [batch for part in parts for batch in part.passes]
        working = [batch for batch in batches if (batch.dst_state != IGNORE).any()]
        rows = rows_of(step.passes[0])
        assert sorted(row for b in working for row in rows_of(b)) == sorted(rows)
        at_once = rows_at_once or -(-len(rows) // ranks)
        assert all(len(b.tokens) <= at_once for b in batches)
        # each pass is a meeting of all ranks: who has no rows for it takes part without labels
        most = -(-len(working) // ranks)
        assert [len(part.passes) for part in parts] == [most] * ranks
        for batch in (b for part in parts for b in part.passes if not (b.dst_state != IGNORE).any()):
            assert (torch.cat([batch.speaking, batch.dst_update]) == IGNORE).all()
            assert len(batch.response) == len(batch.response_at) == 0


def test_worker_processes_change_nothing(sessions: list[SessionData], folder: Path) -> None:
    start = Position(0, len(epoch_of(steps_of(sessions, folder, []))) - 3)
    wanted = 5  # over the end of the epoch, and more than two a worker
    alone = list(islice(steps_of(sessions, folder, [], start), wanted))
    assert alone[-1].after == Position(1, 2)
    loader = training_loader(steps_of(sessions, folder, [], start), workers=2)
    together = list(islice(loader, wanted))
    assert len(together) == wanted
    assert all(map(is_same, together, alone))


def test_silence_is_left_out_anew_each_epoch_and_events_never(
    sessions: list[SessionData], folder: Path
) -> None:
    steps = steps_of(
        sessions, folder, ["tasks.speaking.silence_ratio=0.3", "tasks.dst_update.silence_ratio=0.6"]
    )
    epochs = [epoch_of(steps, epoch) for epoch in range(2)]
    for head, truth, ratio in (("speaking", "speak", 0.3), ("dst_update", "dst_update", 0.6)):
        kept: list[set[tuple[str, int]]] = []
        events = {
            (s.session_id, s.first_tick + int(i))
            for s in sessions
            for i in np.flatnonzero(getattr(s.truth, truth))
        }
        for epoch in epochs:
            labels = by_tick(epoch, head)
            assert {where for where, found in labels.items() if found == [1]} == events
            kept.append({where for where, found in labels.items() if found == [0]})
            silent = len(labels) - len(events)
            assert abs(len(kept[-1]) - ratio * silent) < 4 * (ratio * (1 - ratio) * silent) ** 0.5
        # two independent draws share ratio ** 2 of all, not all they have
        assert abs(len(kept[0] & kept[1]) / silent - ratio**2) < 0.06
    speaking, update = (by_tick(epochs[0], head) for head in ("speaking", "dst_update"))
    assert any(update[where] == [0] for where, found in speaking.items() if found == [IGNORE])
    for batch in (batch for step in epochs[0] for batch in step.passes):
        states = [n for w in batch.window_of_tick.tolist() for n in [batch.num_steps[w]]]
        assert (batch.dst_state != IGNORE).sum(1).tolist() == states


def test_silence_as_a_next_token_is_left_out_where_the_label_is(
    sessions: list[SessionData], folder: Path
) -> None:
    steps = steps_of(sessions, folder, [*END_OF_TURN, "tasks.speaking.silence_ratio=0.25"])
    silent, opened, dropped = steps.builder.end_of_utterance, steps.builder.assistant_prefix[0], 0
    for batch in (batch for step in epoch_of(steps) for batch in step.passes):
        target = dict(zip(batch.response_at.tolist(), batch.response.tolist(), strict=True))
        for at, label in zip(batch.tick_at.tolist(), batch.speaking.tolist(), strict=True):
            assert target.get(at) == {0: silent, 1: opened, IGNORE: None}[label]
            dropped += label == IGNORE
    assert dropped > 100


@given(st.lists(st.sampled_from([0, 1, IGNORE]), max_size=40), st.integers(0, 5))
def test_only_silence_is_ever_left_out(labels: list[int], seed: int) -> None:
    given_labels = np.array(labels, dtype=np.int64)
    kept = subsampled(given_labels, 0.5, np.random.default_rng(seed))
    assert np.array_equal(kept[given_labels != 0], given_labels[given_labels != 0])
    assert set(kept[given_labels == 0].tolist()) <= {0, IGNORE}
    assert np.array_equal(subsampled(given_labels, 1.0, np.random.default_rng(seed)), given_labels)


def test_noise_shows_each_other_state_as_often() -> None:
    state = np.repeat(np.array([0, 1, 2], np.int8), 4000)
    noisy = with_noise(state, 0.25, np.random.default_rng(0))
    for true in range(3):
        shares = np.bincount(noisy[state == true], minlength=3) / 4000
        expected = np.where(np.arange(3) == true, 0.75, 0.125)
        assert np.abs(shares - expected).max() < 0.03


@pytest.mark.parametrize(("max_seq_len", "window_ticks"), [(400, 32), (2048, 64), (2048, 16)])
def test_rows_fit_and_hardly_anything_is_padding(
    sessions: list[SessionData], folder: Path, max_seq_len: int, window_ticks: int
) -> None:
    settings = [f"data.max_seq_len={max_seq_len}", f"data.window_ticks={window_ticks}", "data.batch_rows=3"]
    many = [*sessions] * 4  # an epoch of some length: its last step has what is left over
    batches = [batch for step in epoch_of(steps_of(many, folder, settings)) for batch in step.passes]
    assert max(batch.tokens.shape[1] for batch in batches) <= max_seq_len
    padded = sum(int((batch.documents < 0).sum()) for batch in batches)
    assert padded / sum(batch.tokens.numel() for batch in batches) < 0.02
