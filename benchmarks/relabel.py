"""How long it takes to write new labels to a cache: `dst cache-features --labels-only`.

    python benchmarks/relabel.py --hours 100

Makes a cache of so many hours of video (its features are a few random numbers a tick: relabelling never looks at
them), writes label tables of the same videos with other steps and turns, and relabels in turn with two sets of tables.
Prints JSON: seconds, and seconds for 100 hours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from made_labels import TICK_HZ, write_labels

from pipeline.cache import relabel
from pipeline.ledger import Entry, VideoEntry, record, sha256_of
from pipeline.shards import writer_of
from pipeline.storage import open_store
from schemas.shards import CHUNK_TICKS, Fingerprint, shard_stem, vision_key

VIDEO_TICKS, VIDEOS_A_SHARD = 2400, 20  # 20 minutes each


def write_cache(folder: Path, videos: list[tuple[str, str, int]]) -> None:
    store = open_store(folder)
    fingerprint = Fingerprint(
        model="made", vision_sha256="0" * 64, preprocessing={}, tick_hz=TICK_HZ, tokens_per_frame=1, dim=4
    )
    store.write_text("cache.json", fingerprint.text())
    features = np.random.default_rng(0).normal(size=(CHUNK_TICKS, 1, 4)).astype(np.float16)
    for number in range(0, len(videos), VIDEOS_A_SHARD):
        some, stem = videos[number : number + VIDEOS_A_SHARD], shard_stem("vision", number // VIDEOS_A_SHARD)
        path = store.work_folder() / f"{stem}.tar"
        with writer_of("tar", path) as writer:
            for video_id, _, ticks in some:
                for first in range(0, ticks, CHUNK_TICKS):
                    count = min(CHUNK_TICKS, ticks - first)
                    meta = {"video_id": video_id, "first_tick": first, "num_ticks": count}
                    pts = (first + np.arange(count)) / TICK_HZ
                    members = {"vision": features[:count], "pts": pts, "meta": meta}
                    writer.add(vision_key(video_id, first // CHUNK_TICKS), members)
        entries = {v: VideoEntry(ticks=n, needed=n, rotation_deg=0, identity=None) for v, _, n in some}
        digest, size = sha256_of(path), path.stat().st_size
        store.commit(path, path.name)
        record(store, stem, Entry(file=path.name, bytes=size, sha256=digest, key="made", videos=entries))


def vision_hashes(folder: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("vision-*"))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=100.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    count = round(arguments.hours * 3600 * TICK_HZ / VIDEO_TICKS)
    videos = [(f"video-{n:05d}", f"gone/video-{n:05d}.mp4", VIDEO_TICKS) for n in range(count)]
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name) / "shards"
        for seed in (0, 1):
            write_labels(Path(name) / f"labels-{seed}" / "made", videos, seed)
        write_cache(cache, videos)
        before = vision_hashes(cache)
        seconds = []
        for turn in range(2 * arguments.rounds):
            began = time.perf_counter()
            summary = relabel(Path(name) / f"labels-{turn % 2}", cache)
            seconds.append(time.perf_counter() - began)
            if summary.failures or vision_hashes(cache) != before:
                raise SystemExit("relabelling failed, or changed a vision shard")
    hours = count * VIDEO_TICKS / TICK_HZ / 3600
    median = float(np.median(seconds))
    print(
        json.dumps(
            {
                "hours": hours,
                "ticks": count * VIDEO_TICKS,
                "seconds": [round(each, 2) for each in seconds],
                "seconds_per_100_hours": round(median / hours * 100, 2),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
