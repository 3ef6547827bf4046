"""Label tables for benchmarks: one session on each video, with as many steps and turns as real ones have."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa

from schemas.clock import Clock
from schemas.states import Step, TimestampToStateConverter, transitions_between
from schemas.tables import TABLES, LabelWriter

STEPS, TURNS, TICK_HZ = 12, 40, 2.0


def write_labels(folder: Path, videos: list[tuple[str, str, int]], seed: int = 0) -> None:
    """Tables of videos, each given as its id, uri and number of ticks, in the folder of one corpus."""
    rng = random.Random(seed)
    with LabelWriter(folder) as writer:
        for video_id, _, ticks in videos:
            borders = sorted(rng.uniform(0, ticks / TICK_HZ) for _ in range(STEPS + 1))
            steps = [
                {
                    "session_id": video_id,
                    "step": n,
                    "step_id": str(n),
                    "name": f"attach part {n}",
                    "parent": None,
                    "spans": [{"start_s": borders[n], "end_s": borders[n + 1]}],
                    "source_rows": ["made"],
                }
                for n in range(STEPS)
            ]
            told = sorted(rng.sample(range(ticks), min(TURNS, ticks)))
            words = "Well done, now take the next part and attach it to the chassis."
            turns = [
                {
                    "session_id": video_id,
                    "turn": n,
                    "tick": tick,
                    "t_s": tick / TICK_HZ,
                    "role": "assistant",
                    "text": words,
                    "labels": ["instruction"],
                    "progress": None,
                    "source_row": None,
                }
                for n, tick in enumerate(told)
            ]
            session = {
                "session_id": video_id,
                "video_id": video_id,
                "source": "made",
                "split": "train",
                "goal": "assemble the toy",
                "first_tick": 0,
                "num_ticks": ticks,
                "tick_hz": TICK_HZ,
                "num_steps": STEPS,
                "dialog_origin": "template",
            }
            blank = dict.fromkeys(TABLES["sessions"].names)
            writer.add_session(
                blank | session, video_id, steps, turns, _frames(video_id, ticks, borders, told, words)
            )
        blank = dict.fromkeys(TABLES["videos"].names)
        writer.add_videos(
            blank
            | {
                "video_id": video_id,
                "source": "made",
                "recording_id": video_id,
                "uri": uri,
                "rotation_deg": 0,
                "last_tick_needed": ticks - 1,
            }
            for video_id, uri, ticks in videos
        )
        writer.add_about("{}\n")


def _frames(video_id: str, ticks: int, borders: list[float], told: list[int], words: str) -> pa.Table:
    steps = [Step(str(n), f"attach part {n}", ((borders[n], borders[n + 1]),)) for n in range(STEPS)]
    state = TimestampToStateConverter(Clock(TICK_HZ)).matrix(np.arange(ticks), steps)
    before = np.vstack([np.zeros((1, STEPS), np.int8), state[:-1]])
    transitions = transitions_between(before, state)
    speak = np.isin(np.arange(ticks), told)
    columns = {
        "session_id": pa.array([video_id] * ticks),
        "split": pa.array(["train"] * ticks),
        "tick": pa.array(np.arange(ticks, dtype=np.int32)),
        "t_s": pa.array(np.arange(ticks) / TICK_HZ),
        "speak": pa.array(speak),
        "response": pa.array([words if each else None for each in speak.tolist()]),
        "dst_update": pa.array((transitions != 0).any(axis=1)),
        "dst_state": pa.array(list(state), type=pa.list_(pa.int8())),
        "transitions": pa.array(list(transitions), type=pa.list_(pa.int8())),
        "mistake": pa.nulls(ticks, pa.bool_()),
    }
    return pa.table(
        [columns[field.name].cast(field.type) for field in TABLES["frames"]], schema=TABLES["frames"]
    )
