"""What making a cache is going to take, before it begins: frames, bytes, hours."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.feed import Feed, Frames, VideoTask
from pipeline.stills import is_picture
from pipeline.storage import Store
from pipeline.todo import Todo
from pipeline.vision import VisionEncoder
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.shards import Fingerprint


@dataclass(frozen=True)
class Estimate:
    """What a run is going to do. ``ticks`` are all of its plan, ``ticks_to_encode`` those that are not there yet;
    ``pictures`` of the ``videos`` are pictures.

    ``bytes_to_write`` is what the shards to be made take. ``bytes_needed`` must be free in ``where`` while they are
    made, for a shard's videos are kept apart until the last of them is there.
    """

    videos: int
    pictures: int
    ticks: int
    ticks_to_encode: int
    shards: int
    shards_to_make: int
    bytes_to_write: int
    bytes_needed: int
    bytes_free: int
    where: str

    @classmethod
    def of(cls, todo: Todo, fingerprint: Fingerprint, store: Store, encoders: int, workers: int) -> Estimate:
        """Of what is to be done by so many encoders, each with so many decode workers."""
        works = todo.works
        bytes_of = [
            sum(video["last_tick_needed"] + 1 for video in work.videos) * fingerprint.bytes_per_tick()
            for work in works
        ]
        at_once = min(len(works), encoders) * max(bytes_of, default=0)
        free = store.free_bytes()
        if free is None:  # shards are made here and sent there: what is open takes room here
            where, needed = str(store.work_folder()), at_once * (workers + 1)
            free = shutil.disk_usage(where).free
        else:
            where, needed = store.url, sum(bytes_of) + at_once
        ticks = sum(plan.ticks for plan in todo.mine)
        finished = sum(todo.plans[number].ticks for number in todo.finished)
        reused = sum(kept.entry.needed for work in works for kept in work.kept.values())
        videos = [video for plan in todo.mine for video in plan.videos]
        return cls(
            videos=len(videos),
            pictures=sum(is_picture(video["uri"]) for video in videos),
            ticks=ticks,
            ticks_to_encode=ticks - finished - reused,
            shards=len(todo.mine),
            shards_to_make=len(works),
            bytes_to_write=sum(bytes_of),
            bytes_needed=needed,
            bytes_free=free,
            where=where,
        )

    def require_room(self) -> None:
        """Refuse what would fill the disk.

        Raises:
            UserError: too little is free.
        """
        if self.bytes_free < self.bytes_needed:
            raise UserError(
                f"{self.where} needs {in_bytes(self.bytes_needed)} free while the shards are made, and has "
                f"{in_bytes(self.bytes_free)}; free some, give another --out, or make the features smaller with "
                "--tokens-per-frame or --dtype int8"
            )


def in_bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def probe(
    todo: Todo, fingerprint: Fingerprint, encoder: VisionEncoder, workers: int, limit_s: float, seconds: float
) -> float | None:
    """Ticks a second that one encoder makes of these videos, tried for some seconds; None where none can be read."""
    videos = [video for work in todo.works for video in work.videos if video["video_id"] not in work.kept]
    tasks = (
        VideoTask.of(number, video["uri"], video, fingerprint.decoder) for number, video in enumerate(videos)
    )
    ticks = 0
    with Feed(encoder.preprocessor, Clock(fingerprint.tick_hz), workers, limit_s) as feed:
        for frames in _frames(feed, tasks):
            if ticks == 0:
                began = (
                    time.perf_counter()
                )  # opening the first videos is not what a long run spends its time with
            encoder.encode(frames.images)
            ticks += len(frames.images)
            if time.perf_counter() - began > seconds:
                break
    return ticks / (time.perf_counter() - began) if ticks else None


def _frames(feed: Feed, tasks: Iterator[VideoTask]) -> Iterator[Frames]:
    return (event for event in feed.events(tasks) if isinstance(event, Frames))
