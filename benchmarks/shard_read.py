"""How fast training reads features: windows of 64 ticks at random places of a cache that is in memory.

    python benchmarks/shard_read.py --megabytes 512

Writes float16 features of 64 tokens of width 960 as a tar and as HDF5, then fills batches with windows of them: this
project's reader on both, h5py, and stock webdataset, which can only read in order (its windows are the chunks).
Beside them, a copy of as many bytes within memory. All by one thread, in turn, several rounds, medians; its processor
time counts, so that other work on the machine counts little. Prints JSON: gigabytes a second, and each as a part of
the plain copy.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import webdataset as wds
from numpy.typing import NDArray

from pipeline.ledger import Entry, VideoEntry
from pipeline.shards import ShardCache, writer_of
from schemas.shards import CHUNK_TICKS, Fingerprint, Storage, shard_stem, vision_key

TOKENS, DIM, TICK_HZ = 64, 960, 2.0
WINDOW = 64  # ticks
BATCH = 4  # windows
VIDEO_TICKS = 512
CHUNK_BYTES = CHUNK_TICKS * TOKENS * DIM * 2

Windows = list[tuple[str, int]]  # video, first tick
Batch = NDArray[np.float16]


def write_cache(folder: Path, storage: Storage, videos: int, shards: int) -> None:
    """A cache of random features with so many videos in each shard, and a session without labels."""
    folder.mkdir()
    Fingerprint(
        model="m",
        vision_sha256="",
        preprocessing={},
        tick_hz=TICK_HZ,
        tokens_per_frame=TOKENS,
        dim=DIM,
        storage=storage,
    ).write(folder)
    (folder / "ledger").mkdir()
    rng = np.random.default_rng(0)
    for shard in range(shards):
        ids = [f"video-{shard}-{number}" for number in range(videos)]
        path = folder / f"{shard_stem('vision', shard)}.{storage}"
        with writer_of(storage, path) as writer:
            for video in ids:
                for chunk in range(VIDEO_TICKS // CHUNK_TICKS):
                    vision = rng.integers(0, 2**15, (CHUNK_TICKS, TOKENS, DIM), np.uint16).view(np.float16)
                    pts = (np.arange(CHUNK_TICKS) + chunk * CHUNK_TICKS) / TICK_HZ
                    writer.add(vision_key(video, chunk), {"vision": vision, "pts": pts, "meta": {}})
        entry = VideoEntry(ticks=VIDEO_TICKS, needed=VIDEO_TICKS, rotation_deg=0, identity=None)
        _enter(folder, path, dict.fromkeys(ids, entry))
    labels = folder / f"{shard_stem('labels', 0)}.{storage}"
    with writer_of(storage, labels) as writer:
        writer.add("session", {"meta": {}})
    _enter(folder, labels, {})


def _enter(folder: Path, path: Path, videos: dict[str, VideoEntry]) -> None:
    entry = Entry(file=path.name, bytes=path.stat().st_size, sha256="", key="", videos=videos)
    (folder / "ledger" / f"{path.stem}.json").write_text(entry.model_dump_json())


def by_cache(cache: ShardCache, windows: Windows, batch: Batch) -> None:
    for number, (video, first) in enumerate(windows):
        cache.features(video, first, WINDOW, out=batch[number % BATCH])


def by_h5py(files: dict[str, h5py.File], windows: Windows, batch: Batch) -> None:
    for number, (video, first) in enumerate(windows):
        out, at = batch[number % BATCH], 0
        while at < WINDOW:
            chunk, begin = divmod(first + at, CHUNK_TICKS)
            count = min(CHUNK_TICKS - begin, WINDOW - at)
            dataset = files[video][f"{vision_key(video, chunk)}/vision"]
            dataset.read_direct(out, np.s_[begin : begin + count], np.s_[at : at + count])
            at += count


def by_webdataset(chunks: Iterator[dict[str, Batch]], windows: Windows, batch: Batch) -> None:
    for number in range(len(windows)):
        batch[number % BATCH] = next(chunks)["vision.npy"]


def by_copy(source: Batch, windows: Windows, batch: Batch) -> None:
    """The same bytes from the same places, from memory that holds all of them in order."""
    for number, (video, first) in enumerate(windows):
        _, shard, index = video.split("-")
        begin = int(shard) * (len(source) // 2) + int(index) * VIDEO_TICKS + first
        batch[number % BATCH] = source[begin : begin + WINDOW]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=512, help="of features, in two shards")
    parser.add_argument("--windows", type=int, default=200, help="read in each turn")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    shards = 2
    videos = max(1, arguments.megabytes * 1_000_000 // (shards * VIDEO_TICKS // CHUNK_TICKS * CHUNK_BYTES))
    with tempfile.TemporaryDirectory() as name:
        caches = {}
        storages: tuple[Storage, ...] = ("tar", "h5")
        for storage in storages:
            write_cache(Path(name, storage), storage, videos, shards)
            caches[storage] = ShardCache(Path(name, storage))
        tars = [str(path) for path in sorted(Path(name, "tar").glob("vision-*"))]
        chunks = iter(wds.WebDataset(tars, shardshuffle=False).decode().repeat())
        h5_files = [h5py.File(path) for path in sorted(Path(name, "h5").glob("vision-*"))]
        file_of = {f"video-{n}-{v}": file for n, file in enumerate(h5_files) for v in range(videos)}
        source = np.concatenate([caches["tar"].features(video, 0, VIDEO_TICKS) for video in file_of])
        batch = np.zeros((BATCH, WINDOW, TOKENS, DIM), np.float16)
        ways: dict[str, Callable[[Windows], None]] = {
            "copy": lambda windows: by_copy(source, windows, batch),
            "tar": lambda windows: by_cache(caches["tar"], windows, batch),
            "h5": lambda windows: by_cache(caches["h5"], windows, batch),
            "h5py": lambda windows: by_h5py(file_of, windows, batch),
            "webdataset": lambda windows: by_webdataset(chunks, windows[:20], batch),
        }
        rng = random.Random(0)
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(arguments.rounds + 1):
            windows = [
                (rng.choice(list(file_of)), rng.randrange(VIDEO_TICKS - WINDOW))
                for _ in range(arguments.windows)
            ]
            for way, read in ways.items():
                began = time.thread_time()
                read(windows)
                seconds = time.thread_time() - began
                count = 20 if way == "webdataset" else len(windows)
                if turn:  # the first brings the files into memory
                    speeds[way].append(count * CHUNK_BYTES / seconds / 1e9)
        last = [batch.copy() for way in ("copy", "tar", "h5", "h5py") if ways[way](windows) is None]
        assert all(np.array_equal(each.view(np.uint16), last[0].view(np.uint16)) for each in last)
        medians = {way: statistics.median(values) for way, values in speeds.items()}
        of_copy = [
            {way: speeds[way][turn] / speeds["copy"][turn] for way in ways}
            for turn in range(arguments.rounds)
        ]
        print(
            json.dumps(
                {
                    "megabytes": round(source.nbytes / 1e6),
                    "gigabytes_per_second": {way: round(speed, 3) for way, speed in medians.items()},
                    "of_a_copy": {
                        way: round(statistics.median(turn[way] for turn in of_copy), 3) for way in ways
                    },
                    "tar_to_webdataset": round(medians["tar"] / medians["webdataset"], 1),
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
