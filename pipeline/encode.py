"""Videos to vision shards: frames from the decode workers, batches across videos, features to files."""

from __future__ import annotations

import errno
import shutil
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.copies import is_remote, local_copy
from pipeline.feed import Ended, Failed, Feed, Frames, Restarted, VideoTask
from pipeline.identity import identities
from pipeline.ledger import Failure, Unreadable, VideoEntry
from pipeline.spool import Made, Shard, Video, commit
from pipeline.stills import marks_sha256
from pipeline.storage import open_store
from pipeline.todo import VisionWork
from pipeline.vision import VisionEncoder
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.records import joined_uri, video_parts
from schemas.shards import CHUNK_TICKS, ComputeType, Filter, Fingerprint, shard_stem


@dataclass(frozen=True)
class EncoderSpec:
    """What is needed to load the encoder, in this process or another one."""

    folder: Path
    name: str  # what the user calls it
    tokens_per_frame: int | None = None
    filter: Filter = "lanczos"
    compute: ComputeType | None = None  # None: by the device's capability
    batch_size: int = 16
    tiles: int = 1

    def load(self, device: str) -> VisionEncoder:
        return VisionEncoder(
            self.folder,
            device,
            self.tokens_per_frame,
            self.name,
            filter=self.filter,
            compute=self.compute,
            batch_size=self.batch_size,
            tiles=self.tiles,
        )


@dataclass(frozen=True)
class Job:
    """What all processes that make shards of one cache share."""

    out: str
    fingerprint: Fingerprint
    workers: int  # decode processes of each encoder
    limit_s: float  # without progress, after which a video is given up


@dataclass(frozen=True)
class Progress:
    """Since the last one: ticks encoded, ticks that need no more work, seconds of the encoding process by stage."""

    encoded: int
    passed: int
    seconds: dict[str, float]


def make_vision_shards(
    encoder: VisionEncoder, job: Job, works: Iterable[VisionWork]
) -> Generator[Made | Progress, None, None]:
    """Make shards of the work as it comes; several are open at once where that keeps the decode workers busy.

    A video that fails is left out and named in its shard's entry. Frames of all videos share batches, each padded to
    one shape, so that a frame's features do not depend on which frames it was encoded with.

    Raises:
        UserError: the tower gives values that the cache's type cannot hold.
        OSError: no room, or no right, to write.
    """
    clock = Clock(job.fingerprint.tick_hz)
    with _Shards(encoder, job) as shards:
        with Feed(encoder.preprocessor, clock, job.workers, job.limit_s) as feed:
            events = iter(feed.events(shards.tasks(works)))
            while True:
                with shards.timed("wait for frames"):
                    event = next(events, None)
                match event:
                    case None:
                        break
                    case Frames():
                        shards.take(event)
                    case Ended():
                        shards.end(event)
                    case Failed():
                        shards.fail(event.number, event.reason)
                    case Restarted():
                        shards.restart(event.number)
                yield from shards.news()
        shards.encode_rest()
        yield from shards.news(wait=True)


class _Shards:
    """The shards and videos that are open, and the batch that is being filled."""

    def __init__(self, encoder: VisionEncoder, job: Job) -> None:
        self._encoder, self._job = encoder, job
        self._store = open_store(job.out)
        self._work_folder = self._store.work_folder()
        self._shards: list[Shard] = []
        self._videos: dict[int, Video] = {}  # that are being decoded, by the number of the task
        self._tasks = 0
        side = encoder.preprocessor.side
        self._batch = np.zeros((encoder.batch_size, side, side, 3), np.uint8)
        self._slots: list[tuple[Video, float]] = []  # whose frame each row of the batch is, and its pts
        self._encoding: tuple[Any, list[tuple[Video, float]]] | None = None  # the batch before it
        self._finished: deque[tuple[Shard, Future[Made]]] = deque()
        self._committer = ThreadPoolExecutor(1)
        self._fetchers = ThreadPoolExecutor(job.workers)
        self._encoded = self._passed = 0
        self._seconds: dict[str, float] = defaultdict(float)

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._committer.shutdown(cancel_futures=True)
        for shard in [*self._shards, *(shard for shard, _ in self._finished)]:
            for video in shard.videos:
                video.drop()
            shutil.rmtree(shard.folder, ignore_errors=True)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - began

    def tasks(self, works: Iterable[VisionWork]) -> Iterator[VideoTask]:
        """The videos to decode, in the order of the work; remote ones are fetched some videos ahead."""
        waiting: deque[tuple[Shard, dict[str, Any], Path, Future[str]]] = deque()
        for shard, row, copies in self._rows(works):
            parts = video_parts(row["uri"])
            waiting.append((shard, row, copies, self._fetchers.submit(_local_uri, parts, copies)))
            ahead = self._job.workers if any(map(_is_address, parts)) else 0
            while len(waiting) > ahead:
                yield from self._task(*waiting.popleft())
        while waiting:
            yield from self._task(*waiting.popleft())

    def take(self, frames: Frames) -> None:
        """Copy frames into the batch; encode it when it is full."""
        video = self._videos[frames.number]
        for image, pts in zip(frames.images, frames.pts, strict=True):
            self._batch[len(self._slots)] = image
            self._slots.append((video, float(pts)))
            if len(self._slots) == len(self._batch):
                self._start_batch()

    def end(self, event: Ended) -> None:
        video = self._videos.pop(event.number)
        shutil.rmtree(video.copies, ignore_errors=True)
        needed = video.row["last_tick_needed"] + 1
        video.end(
            VideoEntry(
                ticks=event.ticks,
                needed=needed,
                rotation_deg=video.row["rotation_deg"],
                identity=video.identity
                or identities([video.row["uri"]])[0],  # it was not there when it was planned
                marks_sha256=marks_sha256(video.row["marks"]),
                unreadable=tuple(Unreadable(*run) for run in event.unreadable),
                notes=tuple(event.notes),
            )
        )
        self._passed += needed - event.ticks  # those after its end

    def fail(self, number: int, reason: str) -> None:
        video = self._videos.pop(number)
        shutil.rmtree(video.copies, ignore_errors=True)
        video.failure = reason
        self._passed += video.row["last_tick_needed"] + 1 - video.ticks
        video.drop()

    def restart(self, number: int) -> None:
        """What came of a video so far is not to be used: it comes again from the first tick on."""
        video = self._videos[number]
        self._passed -= video.ticks
        video.drop()
        again = Video(video.row, video.identity, video.path, video.copies, self._job.fingerprint)
        self._videos[number] = again
        [shard] = [shard for shard in self._shards if video in shard.videos]
        shard.videos[shard.videos.index(video)] = again

    def encode_rest(self) -> None:
        """The batch that is not full, and the one that is being encoded."""
        if self._slots:
            self._start_batch()
        self._finish_batch()

    def news(self, wait: bool = False) -> Iterator[Made | Progress]:
        """What happened since the last time. Shards that are complete are put together beside the encoding."""
        if self._encoded or self._passed:
            yield Progress(self._encoded, self._passed, dict(self._seconds))
            self._encoded = self._passed = 0
            self._seconds.clear()
        while done := next((shard for shard in self._shards if shard.is_done), None):
            self._shards.remove(done)
            self._finished.append((done, self._committer.submit(self._commit, done)))
        # what waits to be written takes room, so there is one at most
        while self._finished and (wait or len(self._finished) > 1 or self._finished[0][1].done()):
            yield self._finished[0][1].result()
            self._finished.popleft()

    def _rows(self, works: Iterable[VisionWork]) -> Iterator[tuple[Shard, dict[str, Any], Path]]:
        """The videos to encode, and where a remote one lies while it is decoded: no other run uses that folder, and it
        goes with the shard's."""
        for work in works:
            folder = self._work_folder / shard_stem("vision", work.number)
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
            folder.mkdir(parents=True)
            shard = Shard(work, folder, len(work.videos) - len(work.kept))
            self._shards.append(shard)
            for place, row in enumerate(work.videos):
                if row["video_id"] in work.kept:
                    self._passed += row["last_tick_needed"] + 1
                else:
                    yield shard, row, folder / f"fetched-{place:05d}"

    def _task(
        self, shard: Shard, row: dict[str, Any], copies: Path, local: Future[str]
    ) -> Iterator[VideoTask]:
        """None where the video could not be fetched."""
        try:
            uri = local.result()
        except (UserError, OSError) as error:
            cause = error.__cause__ if isinstance(error, UserError) else error
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise cause from None  # the other videos would fail of it, too
            shard.not_fetched.append(Failure(id=row["video_id"], reason=str(error)))
            self._passed += row["last_tick_needed"] + 1
            return
        number = self._tasks
        self._tasks += 1
        path = shard.folder / f"video-{len(shard.videos):05d}.tar"
        identity = shard.work.identity[row["video_id"]]
        self._videos[number] = Video(row, identity, path, copies, self._job.fingerprint)
        shard.videos.append(self._videos[number])
        yield VideoTask.of(number, uri, row, self._job.fingerprint.decoder)

    def _start_batch(self) -> None:
        """Give a batch to the encoder, then see to the one before: a GPU works while its features are written."""
        with self.timed("encode"):
            pending = self._encoder.start(self._batch[: len(self._slots)])
        self._finish_batch()
        self._encoding, self._slots = (pending, self._slots), []

    def _finish_batch(self) -> None:
        if self._encoding is None:
            return
        pending, slots = self._encoding
        self._encoding = None
        with self.timed("encode"):
            features = self._encoder.finish(pending)
        with self.timed("write"):
            for first, end in _runs(slots):
                video = slots[first][0]
                if not video.dropped:
                    video.add(features[first:end], [pts for _, pts in slots[first:end]])
                    self._encoded += end - first
                    self._passed += end - first

    def _commit(self, shard: Shard) -> Made:
        return commit(shard, self._store, self._job.fingerprint, self._encoder.batch_size)


def _runs(slots: list[tuple[Video, float]]) -> Iterator[tuple[int, int]]:
    """Stretches of one video that do not cross a chunk's border."""
    first = 0
    while first < len(slots):
        video = slots[first][0]
        most = first + CHUNK_TICKS - video.ticks % CHUNK_TICKS
        end = first + 1
        while end < min(most, len(slots)) and slots[end][0] is video:
            end += 1
        yield first, end
        first = end


def _is_address(part: str) -> bool:
    return is_remote(part) or part.startswith("file://")


def _local_uri(parts: list[str], folder: Path) -> str:
    """The uri of a video's files here, fetched where they lie elsewhere."""
    return joined_uri([local_copy(part, folder) if _is_address(part) else Path(part) for part in parts])
