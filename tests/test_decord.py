"""decord: exact on what it is given, and what it is not given. Always in another process, since it can hang."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from multiprocessing.pool import Pool
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from test_decode import (
    BLOCK,
    RATES,
    audio_only,
    bar_code,
    damaged,
    expected,
    four_corners,
    numbered,
    packets,
    read_bar_code,
    shown_by_a_player,
    steady,
    with_display_matrix,
    write_video,
)

from pipeline.decode import DecodeError, TickFrame, tick_frames
from pipeline.decord_frames import decord_tick_frames, require_decord, why_not_decord
from pipeline.packets import Packets, scan
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.records import joined_uri

LIMIT_S = 30
REAL_VIDEOS = sorted((Path(__file__).parents[2] / "shared" / "samples" / "videos").glob("*.*"))

Decode = Callable[..., tuple[list[TickFrame], str | None]]


@pytest.fixture(scope="module")
def decode() -> Iterator[Decode]:
    """All frames of a file through decord, and the sentence of a DecodeError; fails where there is no answer."""
    pools: list[Pool] = []

    def work(*arguments: object) -> tuple[list[TickFrame], str | None]:
        if not pools:
            pools.append(multiprocessing.get_context("spawn").Pool(1))
        try:
            return pools[0].apply_async(all_frames, arguments).get(LIMIT_S)
        except multiprocessing.TimeoutError:
            pools.pop().terminate()
            raise

    yield work
    for pool in pools:
        pool.terminate()


def all_frames(
    path: Path, hz: float, last_tick: int | None = None, rotation_deg: int = 0
) -> tuple[list[TickFrame], str | None]:
    frames: list[TickFrame] = []
    stderr = os.fstat(2)
    try:
        frames.extend(decord_tick_frames(path, Clock(hz), last_tick, rotation_deg))
        return frames, None
    except DecodeError as error:
        return frames, str(error)
    finally:
        assert os.path.samestat(os.fstat(2), stderr)


def check(decode: Decode, path: Path, hz: float, last_duration: Fraction) -> None:
    """Against the numbers in the pictures, and against PyAV's frames."""
    assert why_not_decord(path) is None
    shown = sorted((packet.pts or 0, packet.time_base) for packet in packets(path))
    times = [(pts - shown[0][0]) * time_base for pts, time_base in shown]
    wanted = expected(times, times[-1] + last_duration, hz)
    frames, error = decode(path, hz)
    assert error is None
    assert [frame.tick for frame in frames] == list(range(len(wanted)))
    assert [read_bar_code(frame.image) for frame in frames] == [number for number, _ in wanted]
    assert [frame.pts_s for frame in frames] == pytest.approx([at for _, at in wanted], abs=1e-9)
    check_against_pyav(frames, path, hz)


def check_against_pyav(frames: list[TickFrame], path: Path, hz: float) -> None:
    others = list(tick_frames(path, Clock(hz), skipping=False))
    assert [(frame.tick, frame.pts_s) for frame in frames] == [(frame.tick, frame.pts_s) for frame in others]
    for frame, other in zip(frames, others, strict=True):
        assert frame.image.flags.c_contiguous
        assert difference(frame.image, other.image) < 0.5


def difference(image: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    assert image.shape == other.shape
    return float(np.abs(image.astype(int) - other).mean())


# ---- what it is given


@pytest.mark.parametrize("hz", [2.0, 5.0])
@pytest.mark.parametrize(
    ("rate", "ending", "options"),
    [
        (Fraction(2446, 100), "mp4", {"bf": "3", "g": "15"}),
        (Fraction(25), "mkv", {"bf": "2", "g": "250"}),
        (RATES["29.97"], "mp4", {"bf": "0", "g": "250"}),
        (RATES["59.94"], "mov", {"bf": "3", "g": "15"}),
        (Fraction(1), "mp4", {"bf": "2"}),  # the same picture at several ticks
    ],
)
def test_constant_rates(
    tmp_path: Path, decode: Decode, rate: Fraction, ending: str, options: dict[str, str], hz: float
) -> None:
    path = steady(tmp_path / f"a.{ending}", 6.3 if rate > 1 else 20, rate, **options)
    check(decode, path, hz, 1 / rate)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("first", [0, 477_000])
def test_variable_rate_and_late_start(tmp_path: Path, decode: Decode, first: int, ending: str) -> None:
    gaps = np.random.default_rng(4).choice([270, 1501, 3003, 7519, 45_000, 45_090, 150_001], 59)
    pts = [first, *(first + int(at) for at in np.cumsum(gaps))]
    path = numbered(tmp_path / f"a.{ending}", pts, Fraction(1, 90_000), bf="2")
    last = max(packets(path), key=lambda packet: packet.pts or 0)
    check(decode, path, 5.0, (last.duration or 0) * last.time_base)


def test_more_pictures_than_go_into_one_batch(tmp_path: Path, decode: Decode) -> None:
    path = steady(tmp_path / "a.mp4", 7, RATES["30"], bf="2", g="40")
    frames, _ = decode(path, 30.0)
    assert [read_bar_code(frame.image) for frame in frames] == list(range(210))
    some, _ = decode(path, 30.0, 64)
    assert [read_bar_code(frame.image) for frame in some] == list(range(65))
    alone, _ = decode(path, 2.0, 0)
    assert [(frame.tick, read_bar_code(frame.image)) for frame in alone] == [(0, 0)]
    beyond, _ = decode(path, 2.0, 99)
    assert [read_bar_code(frame.image) for frame in beyond] == [15 * tick for tick in range(14)]


def with_audio_first(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        sound, stream = container.add_stream("aac", rate=16_000), container.add_stream("libx264", rate=30)
        sound.layout = "mono"
        stream.width, stream.height, stream.pix_fmt = 12 * BLOCK, 32, "yuv420p"
        stream.options = {"crf": "8", "threads": "1"}
        for number in range(90):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(bar_code(number), "rgb24")))
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 533), np.float32), "fltp", "mono")
            tone.sample_rate, tone.pts = 16_000, 533 * number
            container.mux(sound.encode(tone))
        container.mux(stream.encode(None))
        container.mux(sound.encode(None))
    return path


def test_sound_first_and_one_picture(tmp_path: Path, decode: Decode) -> None:
    check(decode, with_audio_first(tmp_path / "a.mp4"), 2.0, Fraction(1, 30))
    frames, _ = decode(steady(tmp_path / "b.mp4", 1 / 30), 2.0)
    assert [(frame.tick, read_bar_code(frame.image)) for frame in frames] == [(0, 0)]


@pytest.mark.parametrize("extra", [0, 90])
@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (0, 1, -1, 0), (0, -1, 1, 0), (-1, 0, 0, -1)])
def test_which_way_is_up(
    tmp_path: Path, decode: Decode, matrix: tuple[int, int, int, int], extra: int
) -> None:
    """The file's own turn is applied once, by decord; the manifest's comes on top, counter-clockwise."""
    path = write_video(tmp_path / "a.mp4", [four_corners()] * 2, range(2), Fraction(1, 2))
    [stored, _], _ = decode(path, 2.0)
    assert difference(stored.image, four_corners()) < 8
    path = with_display_matrix(path, *matrix)
    frames, _ = decode(path, 2.0, None, extra)
    assert len(frames) == 2
    turned = np.rot90(shown_by_a_player(stored.image, *matrix), extra // 90)
    for frame in frames:
        assert difference(frame.image, turned) < 2
        assert frame.image.flags.c_contiguous


@pytest.mark.parametrize("path", REAL_VIDEOS, ids=lambda path: path.name)
def test_real_videos(path: Path, decode: Decode) -> None:
    assert why_not_decord(path) is None
    frames, error = decode(path, 2.0)
    assert error is None
    check_against_pyav(frames, path, 2.0)


def test_a_watcher_sees_progress(tmp_path: Path) -> None:
    path = steady(tmp_path / "a.mp4", 3)
    beats: list[int] = []
    assert why_not_decord(path, lambda: beats.append(1)) is None
    assert len(beats) >= 90
    seen = len(beats)
    assert why_not_decord(path, lambda: beats.append(1)) is None
    assert len(beats) == seen  # the file has not changed since


# ---- what it is not given


def encoded(path: Path, codec: str, pix_fmt: str = "yuv420p", **options: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 12 * BLOCK, 32, pix_fmt
        stream.options = options
        for number in range(90):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(bar_code(number), "rgb24")))
        container.mux(stream.encode(None))
    return path


def with_edit_list(path: Path) -> Path:
    """Show the video from ten pictures later on."""
    path = steady(path, 3, bf="0")
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 16
    [time_base] = {packet.time_base for packet in packets(path)}
    media_time = int.from_bytes(data[at : at + 4], "big") + int(Fraction(10, 30) / time_base)
    data[at : at + 4] = media_time.to_bytes(4, "big")
    path.write_bytes(data)
    return path


def faststart(path: Path) -> Path:
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 12 * BLOCK, 32, "yuv420p"
        for number in range(90):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(bar_code(number), "rgb24")))
        container.mux(stream.encode(None))
    return path


def cut(path: Path, part: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    return path


def remuxed(source: Path, path: Path, shift: Callable[[int, int], int]) -> Path:
    """The same packets; ``shift(number, pts)`` gives their new presentation times."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(p for p in old.demux(video=0) if p.size):
            packet.pts = packet.dts = shift(number, packet.pts or 0)
            packet.stream = stream
            new.mux(packet)
    return path


REFUSED: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "HEVC": (
        "hevc, not h264",
        lambda p: encoded(p / "a.mp4", "libx265", **{"x265-params": "log-level=none"}),
    ),
    "VP9": ("vp9, not h264", lambda p: encoded(p / "a.webm", "libvpx-vp9", deadline="realtime")),
    "transport stream": ("container is mpegts", lambda p: steady(p / "a.ts")),
    "AVI": ("container is avi", lambda p: encoded(p / "a.avi", "mpeg4")),
    "MPEG-2": ("container is mpeg", lambda p: encoded(p / "a.mpg", "mpeg2video")),
    "open GOP": (
        "cannot start afresh at each of its key frames",
        lambda p: steady(p / "a.mp4", bf="3", g="15", **{"x264-params": "open-gop=1"}),
    ),
    "intra refresh": (
        "cannot start afresh at each of its key frames",
        lambda p: steady(p / "a.mp4", g="15", **{"x264-params": "intra-refresh=1"}),
    ),
    "interlaced": (
        "interlaced",
        lambda p: steady(p / "a.mp4", **{"x264-params": "tff=1:interlaced=1"}),
    ),
    "edit list": ("edit list hides some of its pictures", lambda p: with_edit_list(p / "a.mp4")),
    "mirrored": (
        "display matrix does more than turn",
        lambda p: with_display_matrix(steady(p / "a.mp4"), -1, 0, 0, 1),
    ),
    "parameters inside": (
        "size or format may change inside",
        lambda p: steady(p / "a.mkv", g="15", **{"x264-params": "repeat-headers=1"}),
    ),
    "cut MP4": ("damaged or cut short", lambda p: cut(faststart(p / "a.mp4"), 0.6)),
    "cut Matroska": ("damaged or cut short", lambda p: cut(steady(p / "a.mkv", bf="2"), 0.6)),
    "zeros inside": ("damaged or cut short", lambda p: damaged(steady(p / "a.mp4"), 37)),
    "first picture damaged": ("", lambda p: damaged(steady(p / "a.mp4"), 0)),
    "a time twice": (
        "same presentation time",
        lambda p: remuxed(steady(p / "s.mkv"), p / "a.mkv", lambda number, pts: pts - 33 * (number == 40)),
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(tmp_path: Path, decode: Decode, kind: str) -> None:
    reason, make = REFUSED[kind]
    path = make(tmp_path)
    told = why_not_decord(path)
    assert told is not None
    assert reason in told
    assert decode(path, 2.0) == ([], f"{path} is not for decord: {told}")


def test_several_files_are_refused(tmp_path: Path) -> None:
    parts = [steady(tmp_path / "a.mp4"), steady(tmp_path / "b.mp4")]
    assert [why_not_decord(part) for part in parts] == [None, None]
    assert why_not_decord(joined_uri(parts)) == "it is several files"


def test_what_is_no_video(tmp_path: Path, decode: Decode) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("not a video\n" * 100)
    for path, reason in {
        tmp_path / "missing.mp4": "is not there",
        text: "cannot be opened",
        audio_only(tmp_path / "sound.mp4"): "no video stream",
    }.items():
        with pytest.raises(DecodeError, match=reason):
            why_not_decord(path)
        frames, error = decode(path, 2.0)
        assert frames == []
        assert reason in str(error)


def test_a_file_that_changes_is_looked_at_again(tmp_path: Path) -> None:
    path = steady(tmp_path / "a.mp4")
    assert why_not_decord(path) is None
    damaged(path, 37)
    assert why_not_decord(path) == "it is damaged or cut short"


def stock_decoder_notices(path: Path) -> bool:
    with av.open(str(path)) as container:
        try:
            return any(frame.is_corrupt for frame in container.decode(video=0))
        except av.FFmpegError:
            return True


def test_damage_that_only_the_decoder_finds(tmp_path: Path, decode: Decode) -> None:
    """Bits turned over inside a picture: decord itself would go on with what it makes of it."""
    path = steady(tmp_path / "a.mp4", 4.0, bf="2", g="30")
    whole, pictures = path.read_bytes(), [bytes(packet) for packet in packets(path)]
    noticed = 0
    for number in range(1, 120, 7):
        changed = bytearray(pictures[number])
        changed[60:-5:37] = bytes(value ^ 0x55 for value in changed[60:-5:37])
        assert whole.count(pictures[number]) == 1
        path.write_bytes(whole.replace(pictures[number], changed))
        if not stock_decoder_notices(path):
            continue
        noticed += 1
        assert why_not_decord(path) is None
        frames, error = decode(path, 30.0)
        assert error is not None
        assert error.startswith(f"{path} is damaged (")
        assert [read_bar_code(frame.image) for frame in frames] == list(range(len(frames)))
        assert len(frames) in (0, 64)  # whole batches from before the damage
    assert noticed >= 5


class Stand:
    """In for the package decord: a reader of black pictures that talks."""

    def __init__(self, pictures: int) -> None:
        self.batches: list[int] = []
        self.logging, self.DECORDError = self, ValueError
        self.INFO = 32
        self._pictures = pictures

    def set_level(self, level: int) -> None: ...

    def cpu(self, number: int) -> None: ...

    def VideoReader(self, *_: object, **__: object) -> Stand:
        os.write(2, b"a remark\n")
        return self

    def __len__(self) -> int:
        return self._pictures

    def get_batch(self, indices: list[int]) -> Stand:
        self.batches.append(len(indices))
        return self

    def asnumpy(self) -> NDArray[np.uint8]:
        return np.zeros((self.batches[-1], 32, 12 * BLOCK, 3), np.uint8)


def test_what_is_said_goes_on_to_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "decord", Stand(89))  # type: ignore[arg-type]
    with pytest.raises(DecodeError, match=r"a\.mp4 holds 90 pictures, and decord finds 89"):
        list(decord_tick_frames(steady(tmp_path / "a.mp4"), Clock(2.0)))
    assert capfd.readouterr().err == "a remark\n"


def test_batches_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pictures, and in bytes where they are large."""
    path, beats = steady(tmp_path / "a.mp4"), []
    for most_bytes, batches in (
        (256_000_000, [64, 26]),
        (40 * 32 * 12 * BLOCK * 3, [40, 40, 10]),
        (1, [1] * 90),
    ):
        stand = Stand(90)
        monkeypatch.setitem(sys.modules, "decord", stand)  # type: ignore[arg-type]
        monkeypatch.setattr("pipeline.decord_frames._BATCH_BYTES", most_bytes)
        beats.clear()
        frames = list(decord_tick_frames(path, Clock(30.0), beat=lambda: beats.append(1)))
        assert [frame.tick for frame in frames] == list(range(90))
        assert stand.batches == batches
        assert len(beats) >= len(batches)


def test_no_duration_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the last picture is shown as long as the stream's mean."""

    def silent(path: Path, beat: Callable[[], None] | None) -> Packets:
        found = scan(path, beat)
        return replace(found, duration=np.zeros_like(found.duration))

    monkeypatch.setitem(sys.modules, "decord", Stand(90))  # type: ignore[arg-type]
    monkeypatch.setattr("pipeline.decord_frames.scan", silent)
    frames = list(decord_tick_frames(steady(tmp_path / "a.mp4"), Clock(60.0)))
    assert [frame.tick for frame in frames] == list(range(180))


def test_decord_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = steady(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(UserError, match=r"decord is not installed .*; use --decoder pyav"):
        require_decord()
    with pytest.raises(UserError, match="decord is not installed"):
        list(decord_tick_frames(path, Clock(2.0)))
