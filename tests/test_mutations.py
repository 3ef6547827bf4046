"""Files that were damaged, or made to do harm: each is read or refused in a sentence, and nothing else happens.

    python tests/test_mutations.py 10000        # so many of each kind

Each damaged file comes from a seed, so that one that fails can be made again: ``... tar 417`` reads number 417 alone.
A process of its own reads them, with a limit on its memory, and is watched: it may not crash, hang, or write anything.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import resource
import sys
import tempfile
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path

import av
import numpy as np
import pytest
from test_shards import SESSIONS, VIDEOS, make_cache, session_members

from pipeline.decode import DecodeError, tick_frames
from pipeline.plan import LabelTables
from pipeline.shards import ShardCache
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.shards import Storage
from schemas.tables import LabelWriter

LIMIT_S = 30.0
MEMORY = 6 << 30
COUNTS = {"tar": 4000, "h5": 2000, "tables": 2000, "videos": 2000}
Span = tuple[int, int]


# ---- damage


def damage(data: bytes, headers: list[Span], rng: random.Random) -> bytes:
    """One to three changes, mostly in the headers."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not changed:
            break
        begin, end = rng.choice(headers) if headers and rng.random() < 0.8 else (0, len(changed))
        at = min(rng.randrange(begin, max(end, begin + 1)), len(changed) - 1)
        rng.choice(CHANGES)(changed, at, rng)
    return bytes(changed)


def _flip(data: bytearray, at: int, rng: random.Random) -> None:
    data[at] ^= 1 << rng.randrange(8)


def _byte(data: bytearray, at: int, rng: random.Random) -> None:
    data[at] = rng.choice((0, 0x7F, 0x80, 0xFF, ord("0"), ord("9"), ord("-"), rng.randrange(256)))


def _number(data: bytearray, at: int, rng: random.Random) -> None:
    """A length or a place, in place of another."""
    value = rng.choice(
        (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, len(data), rng.randrange(999))
    )
    width = rng.choice((1, 2, 4, 8))
    raw = (value % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big")))
    data[at : at + width] = raw[: len(data) - at]


def _digits(data: bytearray, at: int, rng: random.Random) -> None:
    """The next number in a text, in place of another."""
    found = re.compile(rb"\d+").search(data, at)
    if found:
        value = rng.choice((0, 1, 7, 10**9, 10**17, len(data), rng.randrange(99_999)))
        data[found.start() : found.end()] = str(value).rjust(len(found[0]), "0").encode()[: len(found[0])]


def _zeros(data: bytearray, at: int, rng: random.Random) -> None:
    size = min(rng.choice((1, 8, 64, 512, 1024, 4096)), len(data) - at)
    data[at : at + size] = bytes(size)


def _cut(data: bytearray, at: int, rng: random.Random) -> None:
    del data[at:]


def _without(data: bytearray, at: int, rng: random.Random) -> None:
    del data[at : at + rng.choice((1, 4, 512, 1000))]


def _again(data: bytearray, at: int, rng: random.Random) -> None:
    data[at:at] = data[at : at + rng.choice((1, 4, 512, 1000))]


def _elsewhere(data: bytearray, at: int, rng: random.Random) -> None:
    """A block in place of another one."""
    size = rng.choice((4, 16, 128, 512, 1024))
    other = rng.randrange(len(data))
    block = data[other : other + size]
    data[at : at + len(block)] = block[: len(data) - at]


CHANGES = [
    _flip,
    _flip,
    _byte,
    _byte,
    _number,
    _number,
    _digits,
    _digits,
    _zeros,
    _cut,
    _without,
    _again,
    _elsewhere,
]


def signed_tar(data: bytes) -> bytes:
    """With right checksums again, as someone who means harm would write them."""
    changed = bytearray(data)
    for at in range(0, len(changed) - 511, 512):
        header = changed[at : at + 512]
        if header[257:262] == b"ustar":
            total = sum(header) - sum(header[148:156]) + 8 * 32
            changed[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(changed)


def index_of(data: bytes) -> Span:
    found = re.search(rb"index\.json: (\d+) at (\d+)", data[:512])
    assert found
    return int(found[2]), int(found[2]) + int(found[1])


def signed_h5(data: bytes, index: Span, rng: random.Random) -> bytes:
    """Damaged in its index, with the right size and checksum for it."""
    head, text = data[: index[0]], data[slice(*index)]
    text = damage(text, [], rng)
    size = len(head) + len(text)
    sign = f"dst shard of {size} bytes, index.json: {len(text)} at {len(head)}, crc32 {zlib.crc32(text)}\n"
    return sign.encode().ljust(512, b"\0") + head[512:] + text


# ---- what is damaged: each kind makes files in a folder, damages one of them, and reads it with what belongs to it


def damaged_cache(folder: Path, rng: random.Random) -> tuple[Path, bytes]:
    """One file of the cache: mostly a shard, else an entry of the ledger or the fingerprint."""
    if rng.random() < 0.1:
        path = rng.choice([folder / "cache/cache.json", *sorted(folder.glob("cache/ledger/*.json"))])
        return path, damage(path.read_bytes(), [], rng)
    path = rng.choice(sorted(folder.glob("cache/*-0*")))
    data = path.read_bytes()
    if path.suffix == ".h5":
        index = index_of(data)
        if rng.random() < 0.5:
            return path, signed_h5(data, index, rng)
        return path, damage(data, [(0, 120), index], rng)
    headers = [found.start() - 257 for found in re.finditer(b"ustar", data)]
    spans = [span for at in headers for span in ((at, at + 160), (at + 512, at + 640))]
    changed = damage(data, spans, rng)
    return path, signed_tar(changed) if rng.random() < 0.7 else changed


def read_cache(damaged: Path) -> None:
    cache = ShardCache(next(path for path in damaged.parents if path.name == "cache"))
    for session_id in cache.session_ids:
        session = cache.session(session_id)
        session.frames.to_pylist()
        for name in session.frames.column_names:
            session.column(name)
    for video in VIDEOS:
        ticks = cache.num_ticks(video)
        cache.features(video, 0, ticks).sum()
        cache.features(video, 0, min(ticks, 64)).sum()
        cache.readable(video, 0, ticks)


def settled_ledger(path: Path, data: bytes) -> None:
    """Whoever sends a cache sends a ledger that fits; else each cut shard would be refused for its size."""
    entry = path.parent / "ledger" / f"{path.stem}.json"
    if entry.is_file() and path.suffix != ".json":
        entry.write_text(json.dumps(json.loads(entry.read_text()) | {"bytes": len(data)}))


def make_tables(folder: Path) -> None:
    with LabelWriter(folder / "labels" / "hand") as writer:
        for session_id, (video, first, ticks) in SESSIONS.items():
            parts = session_members(session_id, video, first, ticks)
            row = {key: value for key, value in parts["meta"].items() if key not in ("uri", "rotation_deg")}
            writer.add_session(row, video, parts["steps"], parts["turns"], parts["frames"])
        writer.add_videos(
            {
                "video_id": video,
                "source": "hand",
                "recording_id": video,
                "uri": "gone.mp4",
                "rotation_deg": 0,
                "duration_s": None,
                "last_tick_needed": ticks - 1,
            }
            for video, ticks in VIDEOS.items()
        )


def damaged_table(folder: Path, rng: random.Random) -> tuple[Path, bytes]:
    path = rng.choice(
        [path for path in sorted(folder.glob("labels/hand/*.parquet")) if path.stem != "rejects"]
    )
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return path, damage(data, [(footer, len(data)), (footer, len(data)), (4, 100)], rng)


def read_tables(damaged: Path) -> None:
    tables = LabelTables(damaged.parent)
    for session in tables.sessions:
        for name in ("steps", "turns", "frames"):
            tables.of_session(name, session["session_id"]).to_pylist()


def make_videos(folder: Path) -> None:
    """A third of a second each, with B pictures."""
    pictures = np.random.default_rng(0).integers(0, 255, (10, 6, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    kinds = {
        "a.mp4": "libx264",
        "b.mkv": "libx264",
        "c.avi": "mpeg4",
        "d.webm": "libvpx-vp9",
        "e.ts": "libx264",
    }
    for name, codec in kinds.items():
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=30, options={"g": "5", "cpu-used": "8"})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.time_base = Fraction(1, 30)
            for number, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def damaged_video(folder: Path, rng: random.Random) -> tuple[Path, bytes]:
    path = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    data = path.read_bytes()
    return path, damage(data, [(0, 600), (max(0, len(data) - 1500), len(data))], rng)


def read_video(path: Path) -> None:
    av.logging.set_level(av.logging.PANIC)
    for on_damage in (None, lambda first, end, reason: None):
        try:
            for frame in tick_frames(path, Clock(10.0), 200, on_damage=on_damage):
                assert frame.image.dtype == np.uint8
        except DecodeError:
            if on_damage is not None:
                raise


def _make_cache(storage: Storage) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        make_cache(folder / "cache", storage)

    return make


Damage = Callable[[Path, random.Random], tuple[Path, bytes]]
KINDS: dict[str, tuple[Callable[[Path], None], Damage, Callable[[Path], None]]] = {
    "tar": (_make_cache("tar"), damaged_cache, read_cache),
    "h5": (_make_cache("h5"), damaged_cache, read_cache),
    "tables": (make_tables, damaged_table, read_tables),
    "videos": (make_videos, damaged_video, read_video),
}


# ---- reading them


def outcome(kind: str, folder: Path, number: int) -> str:
    """What became of one: "read", "refused", or what must not be."""
    _, damaged, read = KINDS[kind]
    path, data = damaged(folder, random.Random(f"{kind} {number}"))
    whole = {path: path.read_bytes()}
    if kind in ("tar", "h5"):
        entry = path.parent / "ledger" / f"{path.stem}.json"
        whole |= {entry: entry.read_bytes()} if entry.is_file() else {}
        settled_ledger(path, data)
    path.write_bytes(data)
    try:
        read(path)
    except (UserError, DecodeError) as error:
        return "refused" if str(error) and "\n" not in str(error) else f"not a sentence: {error!r}"
    except Exception:
        return traceback.format_exc()
    finally:
        for each, before in whole.items():
            each.write_bytes(before)
    return "read"


def read_some(pipe: Connection, kind: str, folder: Path) -> None:
    """Run in a process of its own: numbers in, outcomes out."""
    warnings.simplefilter("ignore")  # of sums that overflow
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (number := pipe.recv()) is not None:
        pipe.send(outcome(kind, folder, number))


def run(kind: str, numbers: range) -> tuple[Counter[str], list[str]]:
    """How many were read and refused, and what must not have happened, with its number."""
    context = multiprocessing.get_context("spawn")
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    process = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "files")
        folder.mkdir()
        KINDS[kind][0](folder)
        before = {path: path.read_bytes() for path in Path(name).rglob("*") if path.is_file()}
        for number in numbers:
            if process is None:
                ours, theirs = context.Pipe()
                process = context.Process(target=read_some, args=(theirs, kind, folder), daemon=True)
                process.start()
                theirs.close()
            ours.send(number)
            try:
                told = ours.recv() if ours.poll(LIMIT_S) else f"no answer in {LIMIT_S} s"
            except EOFError:
                told = "the process ended"
            outcomes[told.split("\n")[0][:40]] += 1
            if told in ("read", "refused"):
                continue
            wrong.append(f"{kind} {number}: {told}")
            if not told.startswith("Traceback"):
                process.kill()
                process.join()
                wrong[-1] += f" (exit code {process.exitcode})"
                process = None
                for path, data in before.items():
                    path.write_bytes(data)
        if process is not None:
            ours.send(None)
            process.join()
        after = {path: path.read_bytes() for path in Path(name).rglob("*") if path.is_file()}
        if after != before:
            wrong.append(
                f"{kind}: files were made or changed: {sorted(map(str, after.keys() ^ before.keys()))}"
            )
    return outcomes, wrong


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_read_or_refused(kind: str) -> None:
    outcomes, wrong = run(kind, range(COUNTS[kind]))
    assert not wrong, f"{len(wrong)} of {COUNTS[kind]}, the first: {wrong[0]}"
    assert outcomes["read"] > COUNTS[kind] / 50  # or the damage would not reach what it is meant for
    assert outcomes["refused"] > COUNTS[kind] / 5


def main() -> None:
    match sys.argv[1:]:
        case [kind, number]:
            chosen = {kind: range(int(number), int(number) + 1)}
        case [count]:
            chosen = {kind: range(int(count)) for kind in KINDS}
        case _:
            raise SystemExit(__doc__)
    failed = False
    for kind, numbers in chosen.items():
        outcomes, wrong = run(kind, numbers)
        print(kind, dict(outcomes), flush=True)
        print(*wrong[:20], sep="\n", flush=True)
        failed |= bool(wrong)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
