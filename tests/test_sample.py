"""The synthetic corpus: its rules read off the events one by one, its pictures, its files on disk."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipeline.sample.corpus import write_sample
from pipeline.sample.render import Painter, whole, write_videos
from pipeline.sample.world import ANNOTATION_FPS, Episode, Recording, make_recordings, part_name, step_name
from schemas.errors import UserError
from schemas.tables import read_table, validate_labels

MANY = make_recordings(90, seed=5)
EPISODES = [episode for recording in MANY for episode in recording.episodes]
COARSE = Path("annotations/coarse-annotations")


# ---- what is said, and when


def reasons_to_speak(episode: Episode) -> list[tuple[int, str, int | None]]:
    """Frame, kind and part of each moment that calls for words, from the events and the user's words alone."""
    found: list[tuple[int, str, int | None]] = [
        (episode.hands_at, "hands come", None),
        (episode.hands_gone, "hands go", None),
    ]
    begun: set[int] = set()
    for step in sorted(episode.steps, key=lambda s: s.start):
        in_turn = next(part for part in episode.plan if part not in begun)
        if step.part != in_turn:
            found.append((step.start, "out of turn", step.part))
        begun.add(step.part)
        if not any(other.start < step.end < other.end for other in episode.steps):
            found.append((step.end, "completion", step.part))
    found += [(span.start, "upside down", span.part) for span in episode.upside_down]
    found += [(span.start, "shown", span.part) for span in episode.shown]
    found += [(start, "hesitation", None) for start, _ in episode.raised]
    spoken = {word.frame for word in episode.words if word.role == "assistant"}
    asked = [word.frame for word in episode.words if word.role == "user" and word.frame in spoken]
    found += [(frame, "question", None) for frame in asked]
    return sorted(found, key=lambda reason: reason[0])


def test_every_word_has_its_reason_and_every_reason_its_word() -> None:
    """So no word comes where a step begins in its turn or ends while the other hand is busy, nor after idle words."""
    kinds: Counter[str] = Counter()
    silent: Counter[str] = Counter()
    for episode in EPISODES:
        reasons = reasons_to_speak(episode)
        words = sorted((w for w in episode.words if w.role == "assistant"), key=lambda w: w.frame)
        assert [word.frame for word in words] == [frame for frame, _, _ in reasons]
        for word, (_, kind, part) in zip(words, reasons, strict=True):
            assert word.text
            assert part is None or part_name(part) in word.text
            kinds[kind] += 1
        at = {word.frame for word in words}
        silent["starts"] += sum(step.start not in at for step in episode.steps)
        silent["completions"] += sum(step.end not in at for step in episode.steps)
    wanted = {
        "hands come",
        "hands go",
        "out of turn",
        "completion",
        "upside down",
        "shown",
        "hesitation",
        "question",
    }
    assert {kind for kind, count in kinds.items() if count >= 5} == wanted
    assert silent["starts"] > kinds["out of turn"]
    assert silent["completions"] >= 5


def test_what_the_user_says() -> None:
    """The goal first, before the hands come; then questions, each answered, and words that need no answer."""
    unanswered: set[str] = set()
    answered: set[str] = set()
    for recording in MANY:
        for episode, user_type in zip(recording.episodes, recording.user_types, strict=True):
            goal, *others = [word for word in episode.words if word.role == "user"]
            assert goal is min(episode.words, key=lambda word: word.frame)
            assert goal.frame < episode.hands_at
            assert user_type == "talk_some" or not others
            spoken = {word.frame for word in episode.words if word.role == "assistant"}
            shown = sorted(span.start for span in episode.shown)
            for number, word in enumerate(others):
                after = min((frame for frame in spoken if frame >= word.frame), default=None)
                until = others[number + 1].frame if number + 1 < len(others) else episode.end
                if after is not None and after < until and (after == word.frame or after in shown):
                    answered.add(word.text)
                else:
                    unanswered.add(word.text)
    assert answered
    assert unanswered
    assert not answered & unanswered  # by its words one knows whether the user waits for an answer


def test_instructions_name_the_first_part_not_begun() -> None:
    """Where words give an instruction (they hold a step's name), it is the step that is next in the plan."""
    checked = 0
    for episode in EPISODES:
        for word in episode.words:
            if word.role != "assistant":
                continue
            named = [part for part in episode.plan if step_name(episode.task, part) in word.text]
            if named:
                begun = {step.part for step in episode.steps if step.start <= word.frame}
                assert named == [next(part for part in episode.plan if part not in begun)]
                checked += 1
    assert checked > len(EPISODES)


def test_events_are_possible() -> None:
    """Two hands do one thing each; what is seen besides lies inside its step; all inside the episode."""
    for recording in MANY:
        end = 0
        for episode in recording.episodes:
            assert sorted(step.part for step in episode.steps) == sorted(episode.plan)
            assert len(set(episode.plan)) == len(episode.plan)
            assert end < min(word.frame for word in episode.words)
            for one in episode.steps:
                assert episode.hands_at < one.start < one.end < episode.hands_gone < episode.end
                for other in episode.steps:
                    meet = one.start < other.end and other.start < one.end
                    assert one is other or not meet or one.hand != other.hand
            for span in [*episode.upside_down, *episode.shown]:
                [step] = [step for step in episode.steps if step.part == span.part]
                assert step.start < span.start < span.end < step.end
                assert step.hand == span.hand
            for start, stop in episode.raised:
                assert not any(s.start < stop and start < s.end for s in episode.steps)
            assert max(word.frame for word in episode.words) <= episode.end
            end = episode.end


# ---- what is seen


def still_painter(recording: Recording) -> Painter:
    """Without the trembling of the hands, which would make any two pictures differ."""
    painter = Painter(recording)
    painter.jitter = np.zeros_like(painter.jitter)
    return painter


def difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    """Pixels that are clearly another colour."""
    return int((np.abs(a.astype(int) - b.astype(int)).max(axis=2) > 24).sum())


def around(painter: Painter, frame: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Copies of the pictures one annotation frame before, and at, a moment."""
    before, at = (painter.picture(Fraction(f, ANNOTATION_FPS)).copy() for f in (frame - 1, frame))
    return before, at


@pytest.mark.parametrize("recording", MANY[:12], ids=lambda recording: recording.sequence)
def test_every_event_can_be_seen(recording: Recording) -> None:
    painter = still_painter(recording)
    for episode in recording.episodes:
        spans = [*episode.steps, *episode.upside_down, *episode.shown]
        moments = [episode.hands_at, episode.hands_gone]
        moments += [moment for span in spans for moment in (span.start, span.end)]
        moments += [moment for start, end in episode.raised for moment in (start, end)]
        for moment in moments:
            assert difference(*around(painter, moment)) > 100
        quiet = [step.start + 5 for step in episode.steps] + [step.end - 5 for step in episode.steps]
        assert any(difference(*around(painter, frame)) == 0 for frame in quiet)


@pytest.mark.parametrize("recording", MANY[:12], ids=lambda recording: recording.sequence)
def test_every_word_answers_what_is_seen_or_said(recording: Recording) -> None:
    painter = still_painter(recording)
    for episode in recording.episodes:
        said = {word.frame for word in episode.words if word.role == "user"}
        for word in episode.words:
            if word.role == "assistant" and word.frame not in said:
                assert difference(*around(painter, word.frame)) > 100


def test_before_the_hands_come_a_plan_shows_nothing_of_the_future() -> None:
    """Two assemblies look alike until the hands come but for the table: no part lies there to be guessed from."""
    recording = next(r for r in MANY if r.episodes[0].task == "assembly")
    painter = still_painter(recording)
    first = painter.picture(Fraction(0)).copy()
    last = painter.picture(Fraction(recording.episodes[0].hands_at - 1, ANNOTATION_FPS))
    assert difference(first, last) == 0


def test_parts_look_different() -> None:
    """Each part in the hand gives a picture of its own."""
    pictures = []
    seen: set[int] = set()
    for recording in MANY:
        for step in recording.episodes[0].steps:
            first = min(recording.episodes[0].steps, key=lambda s: s.start)
            if step is first and step.part not in seen and recording.episodes[0].task == "assembly":
                seen.add(step.part)
                painter = still_painter(recording)
                pictures.append(difference(*around(painter, step.start)))
    assert len(seen) >= 6
    assert min(pictures) > 100


# ---- the layout


def test_no_plan_is_in_two_splits() -> None:
    plans: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for recording in make_recordings(160, seed=0):
        for episode in recording.episodes:
            plans.setdefault((episode.task, episode.plan), []).append(recording.split)
    assert all(len(splits) == 1 for splits in plans.values())
    counts = Counter(split for splits in plans.values() for split in splits)
    assert sum(counts.values()) == 160
    assert min(counts["val"], counts["test"]) >= 10
    assert counts["train"] > 100


@pytest.mark.parametrize("sessions", [18, 19, 20, 37, 160])
def test_exactly_that_many_sessions(sessions: int) -> None:
    recordings = make_recordings(sessions, seed=1)
    assert sum(len(recording.episodes) for recording in recordings) == sessions
    assert {recording.split for recording in recordings} == {"train", "val", "test"}
    assert len({recording.sequence for recording in recordings}) == len(recordings)


def corpus_recordings() -> list[Recording]:
    return make_recordings(18, seed=3)  # what the fixture asks for


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_splits_on_disk(corpus: Path) -> None:
    """By recording and by plan, from the files as they were written."""
    recordings: dict[str, set[str]] = {}
    plans: dict[str, set[tuple[str, ...]]] = {}
    for split in ("train", "val", "test"):
        for path in (corpus / COARSE / "coarse_splits").glob(f"{split}_coarse_*.txt"):
            names = {line.split("\t")[0] for line in path.read_text().splitlines()}
            assert all((corpus / COARSE / "coarse_labels" / name).is_file() for name in names)
            recordings.setdefault(split, set()).update(name.split("_", 1)[1] for name in names)
        plans[split] = {
            tuple(step["name"] for step in record["dst"])
            for record in json_lines(corpus / "dialogs" / f"dst_{split}.jsonl")
        }
        assert recordings[split]
        assert plans[split]
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not recordings[one] & recordings[other]
        assert not plans[one] & plans[other]
    assert sum(len(some) for some in plans.values()) == 18
    labels = {path.name.split("_", 1)[1] for path in (corpus / COARSE / "coarse_labels").iterdir()}
    assert set.union(*recordings.values()) == labels


def test_rates_of_the_videos(corpus: Path) -> None:
    rates = set()
    for recording in corpus_recordings():
        with av.open(str(video_of(corpus, recording))) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            rates.add(stream.average_rate)
            assert stream.average_rate == Fraction(*recording.fps)
            assert stream.duration is not None
            assert stream.duration * stream.time_base > Fraction(recording.end, 30)
    assert rates == {Fraction(30000, 1001), Fraction(30), Fraction(60000, 1001)}


def video_of(corpus: Path, recording: Recording) -> Path:
    [path] = (corpus / "videos" / recording.sequence).glob("*.mp4")
    return path


@pytest.mark.parametrize("rate", [(30000, 1001), (60000, 1001)], ids=["29.97", "59.94"])
def test_annotations_count_at_30_fps(corpus: Path, rate: tuple[int, int]) -> None:
    """In a video of another rate the part is in the hand at start / 30 seconds, and not a frame before."""
    recording = next(r for r in corpus_recordings() if r.fps == rate)
    name = f"{recording.episodes[0].task}_{recording.sequence}.txt"
    starts = [
        int(row.split("\t")[0]) for row in (corpus / COARSE / "coarse_labels" / name).read_text().splitlines()
    ]
    assert len(starts) == len(recording.episodes[0].plan)
    with av.open(str(video_of(corpus, recording))) as container:
        frames = list(container.decode(video=0))
    painter = Painter(recording)
    for start in starts:
        moment = Fraction(start, 30)
        after = next(n for n, frame in enumerate(frames) if frame.pts * frame.time_base >= moment)
        wanted = painter.picture(frames[after].pts * frames[after].time_base).astype(int)
        errors = [
            np.abs(frames[n].to_ndarray(format="rgb24").astype(int) - wanted).mean()
            for n in (after - 1, after)
        ]
        assert errors[1] < 6  # what H.264 loses
        assert errors[0] > errors[1] + 2


def test_labels_are_the_worlds(corpus: Path, labels: Path) -> None:
    """From the world through all files and `prepare`: spans, words and mistakes arrive where they were."""
    assert validate_labels(labels / "assembly101") == []
    tables = {
        name: read_table(labels / "assembly101", name).to_pylist()
        for name in ("sessions", "steps", "turns", "frames")
    }
    sessions = {row["session_id"]: row for row in tables["sessions"]}
    found = 0
    for recording in corpus_recordings():
        for episode in recording.episodes:
            [(session_id, session)] = [
                item for item in sessions.items() if f"/{episode.task}_{recording.sequence}__" in item[0]
            ]
            assert (session["split"], session["goal"]) == (recording.split, episode.goal())
            rows = {name: [r for r in tables[name] if r["session_id"] == session_id] for name in tables}
            times = {step.part: (step.start / 30, step.end / 30) for step in episode.steps}
            assert [row["name"] for row in rows["steps"]] == [
                step_name(episode.task, p) for p in episode.plan
            ]
            for row, part in zip(rows["steps"], episode.plan, strict=True):
                [span] = row["spans"]
                assert (span["start_s"], span["end_s"]) == pytest.approx(times[part])
            said = sorted(episode.words, key=lambda word: word.frame)
            assert [(row["role"], row["text"]) for row in rows["turns"]] == [(w.role, w.text) for w in said]
            assert [row["t_s"] for row in rows["turns"]] == pytest.approx([w.frame / 30 for w in said])
            if episode.task == "assembly":
                wrong = [(span.start / 30, span.end / 30) for span in episode.upside_down]
                for row in rows["frames"]:
                    assert row["mistake"] == any(start <= row["t_s"] < end for start, end in wrong)
            found += 1
    assert found == len(sessions) == 18


# ---- writing


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".mp4"
    }


def test_the_same_arguments_give_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.sample.corpus.write_videos", lambda clips, on_video: None)
    write_sample("assembly101", tmp_path / "again", 18, seed=3)
    write_sample("assembly101", tmp_path / "other", 18, seed=4)
    assert hashes(tmp_path / "again") == hashes(corpus)
    assert hashes(tmp_path / "other") != hashes(corpus)
    shortest = min(corpus_recordings(), key=lambda recording: recording.end)
    write_videos([whole(shortest, tmp_path / "video.mp4")], lambda: None)
    assert (tmp_path / "video.mp4").read_bytes() == video_of(corpus, shortest).read_bytes()


def test_tables_of_the_same_corpus_are_the_same(corpus: Path, labels: Path, tmp_path: Path) -> None:
    from pipeline.prepare import prepare
    from schemas.clock import Clock

    prepare("assembly101", corpus, tmp_path, Clock(2.0))
    assert hashes(tmp_path) == hashes(labels)
    assert pq.read_table(tmp_path / "assembly101" / "frames.parquet").num_rows > 1000


def test_where_it_does_not_write(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"is not empty; give a new folder with --out"):
        write_sample("assembly101", tmp_path, 18, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match=r"--sessions 17 is too few .* at least 18"):
        write_sample("assembly101", tmp_path / "new", 17, seed=0)
    assert not (tmp_path / "new").exists()
