"""The frame of every tick, against the frame numbers burnt into the pictures and a plain reading of the rule."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.decode import DecodeError, TickFrame, probe_duration, tick_frames
from schemas.clock import Clock
from schemas.records import joined_uri

BITS, BLOCK, HEIGHT = 12, 16, 32
WIDTH = BITS * BLOCK
GRACE = Fraction(1, 1000)
REAL_VIDEOS = sorted((Path(__file__).parents[2] / "shared" / "samples" / "videos").glob("*.*"))
RATES = {
    "24": Fraction(24),
    "29.97": Fraction(30000, 1001),
    "30": Fraction(30),
    "59.94": Fraction(60000, 1001),
}


def bar_code(number: int) -> NDArray[np.uint8]:
    """The number in black and white blocks, the lowest bit on the left; above and below, noise of its own."""
    bits = [255 * (number >> bit & 1) for bit in range(BITS)]
    image = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 1), np.uint8).repeat(3, axis=2)
    image[8:-8] = np.repeat(np.array(bits, np.uint8), BLOCK)[:, None]
    return image


def read_bar_code(image: NDArray[np.uint8]) -> int:
    assert image.shape == (HEIGHT, WIDTH, 3)
    blocks = image[10:-10].reshape(HEIGHT - 20, BITS, BLOCK, 3)[:, :, 4:-4].mean(axis=(0, 2, 3))
    assert ((blocks < 40) | (blocks > 215)).all()  # no block is in doubt
    return sum(1 << bit for bit, value in enumerate(blocks) if value > 127)


def write_video(
    path: Path,
    pictures: Sequence[NDArray[np.uint8]],
    pts: Sequence[int],
    time_base: Fraction,
    rate: Fraction | None = None,
    **options: str,
) -> Path:
    """Encode pictures at exactly those times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate or 30)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = time_base
        stream.options = {
            "crf": "8",
            "preset": "veryfast",
            "threads": "1",
            "bf": "0",
            "b_strategy": "0",
            **options,
        }
        for picture, at in zip(pictures, pts, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = at, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbered(path: Path, pts: Sequence[int], time_base: Fraction, **options: str) -> Path:
    return write_video(path, [bar_code(n) for n in range(len(pts))], pts, time_base, **options)


def steady(path: Path, seconds: float = 3.0, rate: Fraction = RATES["30"], **options: str) -> Path:
    return numbered(path, range(round(seconds * rate)), 1 / rate, rate=rate, **options)


def packets(path: Path) -> list[av.Packet]:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def expected(times: Sequence[Fraction], end: Fraction, hz: float) -> list[tuple[int, float]]:
    """Frame number and its time for each tick, by looking through all frames at each tick.

    Args:
        times: of all frames, from the first frame on.
        end: the last time and how long its frame lasts.
    """
    ticks = []
    while (instant := len(ticks) / Fraction(hz)) < end:
        number = max(n for n, time in enumerate(times) if time <= instant + GRACE)
        ticks.append((number, float(times[number])))
    return ticks


def check(path: Path, times: Sequence[Fraction], last_duration: Fraction, hz: float) -> None:
    wanted = expected(times, times[-1] + last_duration, hz)
    frames = list(tick_frames(path, Clock(hz)))
    assert [frame.tick for frame in frames] == list(range(len(wanted)))
    assert [read_bar_code(frame.image) for frame in frames] == [number for number, _ in wanted]
    assert [frame.pts_s for frame in frames] == pytest.approx([at for _, at in wanted], abs=1e-9)
    assert len({number for number, _ in wanted}) > 3  # a picture that never changes would show nothing


def test_the_expectation_worked_by_hand() -> None:
    times = [Fraction(0), Fraction(499, 1000), Fraction(501, 1000), Fraction(502, 1000), Fraction(1)]
    assert expected(times, Fraction(3, 2), 2.0) == [(0, 0.0), (2, 0.501), (4, 1.0)]
    assert expected(times, Fraction(1501, 1000), 2.0)[3:] == [(4, 1.0)]


@pytest.mark.parametrize("hz", [2.0, 5.0])
@pytest.mark.parametrize("b_frames", ["0", "3"])
@pytest.mark.parametrize("rate", RATES.values(), ids=RATES.keys())
def test_constant_rates(tmp_path: Path, rate: Fraction, b_frames: str, hz: float) -> None:
    path = steady(tmp_path / "a.mp4", 6.3, rate, bf=b_frames)
    if b_frames != "0":
        order = [packet.pts for packet in packets(path)]
        assert order != sorted(order)  # the file does hold pictures out of order
    times = [n / rate for n in range(round(6.3 * rate))]
    check(path, times, 1 / rate, hz)


@pytest.mark.parametrize("hz", [2.0, 5.0])
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("first", [0, 123_457])
def test_variable_rate_and_late_start(tmp_path: Path, first: int, ending: str, hz: float) -> None:
    """Gaps from 3 ms to 1.7 s. Matroska keeps milliseconds, so there the times are those of its packets."""
    time_base = Fraction(1, 90_000)
    gaps = np.random.default_rng(4).choice([270, 1501, 3003, 7519, 45_000, 45_090, 150_001], 59)
    pts = [first, *(first + int(at) for at in np.cumsum(gaps))]
    path = numbered(tmp_path / f"a.{ending}", pts, time_base, bf="2")
    kept = sorted(packets(path), key=lambda packet: packet.pts or 0)
    start = kept[0].pts or 0
    times = [((packet.pts or 0) - start) * packet.time_base for packet in kept]
    true = [(at - first) * time_base for at in pts]
    if ending == "mp4":
        assert times == true
    assert [float(time) for time in times] == pytest.approx([float(time) for time in true], abs=0.00101)
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
    assert rate is not None
    # Matroska tells no duration of the last frame; then it is the stream's mean
    last = kept[-1].duration * kept[-1].time_base if kept[-1].duration else 1 / rate
    check(path, times, last, hz)


@pytest.mark.parametrize("hz", [2.0, 5.0])
@pytest.mark.parametrize("b_frames", ["0", "3"])
@pytest.mark.parametrize("ending", ["mkv", "ts"])
def test_other_containers(tmp_path: Path, ending: str, b_frames: str, hz: float) -> None:
    """A transport stream with B-frames starts at a time that is not zero; Matroska rounds to milliseconds."""
    rate = RATES["29.97"]
    path = steady(tmp_path / f"a.{ending}", 6.3, rate, bf=b_frames, g="30")
    kept = sorted(packet.pts for packet in packets(path) if packet.pts is not None)
    assert (kept[0] != 0) == (ending == "ts" and b_frames == "3")
    base = {"mkv": Fraction(1, 1000), "ts": Fraction(1, 90_000)}[ending]
    times = [(at - kept[0]) * base for at in kept]
    assert len(times) == round(6.3 * rate)
    assert [float(time) for time in times] == pytest.approx(
        [float(n / rate) for n in range(len(times))], abs=0.001
    )
    check(path, times, 1 / rate, hz)


@pytest.mark.parametrize(("late_us", "number"), [(900, 15), (1000, 15), (1100, 14)])
def test_a_frame_may_come_one_millisecond_late(tmp_path: Path, late_us: int, number: int) -> None:
    time_base = Fraction(1, 1_000_000)
    pts = [33_000 * n for n in range(15)] + [500_000 + late_us + 33_000 * n for n in range(15)]
    path = numbered(tmp_path / "a.mp4", pts, time_base)
    assert read_bar_code(list(tick_frames(path, Clock(2.0)))[1].image) == number


def test_no_tick_at_the_very_end(tmp_path: Path) -> None:
    """Three seconds at 30 fps end where tick 6 would be; a frame more reaches past it."""
    assert len(list(tick_frames(steady(tmp_path / "a.mp4", 3.0), Clock(2.0)))) == 6
    assert len(list(tick_frames(steady(tmp_path / "b.mp4", 3.0 + 1 / 30), Clock(2.0)))) == 7
    assert len(list(tick_frames(numbered(tmp_path / "c.mp4", [0], Fraction(1, 30)), Clock(2.0)))) == 1
    just_longer = steady(tmp_path / "d.mp4", 3.0009, Fraction(20_000, 10_003))  # 6 frames of 500.15 ms
    assert [frame.tick for frame in tick_frames(just_longer, Clock(2.0))] == list(range(7))


@pytest.mark.parametrize("last_tick", [0, 1, 4, 5, 6, 99])
def test_last_tick_stops(tmp_path: Path, last_tick: int) -> None:
    path = steady(tmp_path / "a.mp4", 3.0)
    every = [(frame.tick, read_bar_code(frame.image)) for frame in tick_frames(path, Clock(2.0))]
    some = [(frame.tick, read_bar_code(frame.image)) for frame in tick_frames(path, Clock(2.0), last_tick)]
    assert some == every[: last_tick + 1] == [(tick, 15 * tick) for tick in range(min(last_tick + 1, 6))]


def test_last_tick_stops_before_damage(tmp_path: Path) -> None:
    """What lies behind the last tick is not decoded: damage there is no error."""
    path = damaged(steady(tmp_path / "a.mkv", 4.0, g="30"), 95)
    assert [read_bar_code(f.image) for f in tick_frames(path, Clock(2.0), 4)] == [0, 15, 30, 45, 60]
    with pytest.raises(DecodeError):
        list(tick_frames(path, Clock(2.0)))


# ---- which way is up


def four_corners() -> NDArray[np.uint8]:
    """Wider than high, another colour in each quarter."""
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32], picture[:16, 32:] = (200, 30, 30), (30, 180, 30)
    picture[16:, :32], picture[16:, 32:] = (40, 40, 220), (230, 230, 230)
    return picture


def with_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Overwrite the matrix in the track header: a picture's (x, y) is shown at (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd") + 4
    matrix = header + (52 if data[header] == 1 else 40)
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    assert data[matrix : matrix + 36] == identity
    data[matrix : matrix + 36] = struct.pack(">9i", *(v << 16 for v in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    path.write_bytes(data)
    return path


def shown_by_a_player(picture: NDArray[np.uint8], a: int, b: int, c: int, d: int) -> NDArray[np.uint8]:
    """Each pixel put where the matrix says, then moved so that all are inside."""
    height, width = picture.shape[:2]
    places = {(a * x + c * y, b * x + d * y): picture[y, x] for y in range(height) for x in range(width)}
    left, top = min(x for x, _ in places), min(y for _, y in places)
    right, bottom = max(x for x, _ in places), max(y for _, y in places)
    shown = np.zeros((bottom - top + 1, right - left + 1, 3), np.uint8)
    for (x, y), colour in places.items():
        shown[y - top, x - left] = colour
    return shown


@pytest.mark.parametrize("rotation", [0, 90, 180, 270, -90])
def test_rotation_of_the_manifest_is_counter_clockwise(tmp_path: Path, rotation: int) -> None:
    path = write_video(tmp_path / "a.mp4", [four_corners()] * 3, range(3), Fraction(1, 2))
    plain = [frame.image for frame in tick_frames(path, Clock(2.0))]
    assert plain[0][:, :8].mean(axis=(0, 1)) == pytest.approx((120, 35, 125), abs=12)  # left: red above blue
    turned = [frame.image for frame in tick_frames(path, Clock(2.0), rotation_deg=rotation)]
    assert len(turned) == len(plain) == 3
    for image, original in zip(turned, plain, strict=True):
        np.testing.assert_array_equal(image, np.rot90(original, rotation // 90))
        assert image.flags.c_contiguous


@pytest.mark.parametrize(
    ("matrix", "extra"),
    [
        ((0, 1, -1, 0), 0),  # a telephone held upright: shown turned by 90 degrees clockwise
        ((0, -1, 1, 0), 0),
        ((-1, 0, 0, -1), 0),
        ((0, 1, -1, 0), 90),  # the manifest's turn comes on top: here it undoes the file's
        ((-1, 0, 0, 1), 0),  # a mirror, as front cameras write
        ((1, 0, 0, -1), 0),
        ((0, 1, 1, 0), 0),
        ((0, -1, -1, 0), 180),
    ],
)
def test_display_matrix_is_applied(tmp_path: Path, matrix: tuple[int, int, int, int], extra: int) -> None:
    path = write_video(tmp_path / "a.mp4", [four_corners()] * 2, range(2), Fraction(1, 2))
    stored = next(tick_frames(path, Clock(2.0))).image
    path = with_display_matrix(path, *matrix)
    shown = next(tick_frames(path, Clock(2.0), rotation_deg=extra)).image
    np.testing.assert_array_equal(shown, np.rot90(shown_by_a_player(stored, *matrix), extra // 90))
    assert np.array_equal(shown, stored) == (extra == 90)


# ---- what cannot be decoded


def decoded_before_error(path: Path, hz: float) -> tuple[list[TickFrame], str]:
    frames: list[TickFrame] = []
    stream = tick_frames(path, Clock(hz))
    with pytest.raises(DecodeError) as raised:
        frames.extend(stream)  # keeps those that came before the error
    message = str(raised.value)
    assert str(path) in message
    assert "\n" not in message
    return frames, message


def audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        stream.layout = "mono"
        for number in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16_000, 1024 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def damaged(path: Path, number: int) -> Path:
    """Overwrite the inside of one picture's packet with zeros; the container around it stays whole."""
    picture = bytes(packets(path)[number])
    assert len(picture) > 200
    data = path.read_bytes()
    assert data.count(picture) == 1
    path.write_bytes(data.replace(picture, picture[:30] + bytes(len(picture) - 30)))
    return path


def test_not_a_video(tmp_path: Path) -> None:
    text, empty = tmp_path / "text.mp4", tmp_path / "empty.mp4"
    text.write_text("not a video\n" * 100)
    empty.write_bytes(b"")
    no_index = steady(tmp_path / "no-index.mp4")
    no_index.write_bytes(no_index.read_bytes()[:-2000])  # the index (moov) is at the end
    reasons = {
        tmp_path / "missing.mp4": "is not there",
        text: "cannot be opened",
        empty: "cannot be opened",
        audio_only(tmp_path / "sound.mp4"): "no video stream",
        no_index: "cannot be opened",
        tmp_path: "",
    }
    for path, reason in reasons.items():
        frames, message = decoded_before_error(path, 2.0)
        assert frames == []
        assert reason in message
        with pytest.raises(DecodeError, match=path.name):
            probe_duration(path)


@pytest.mark.parametrize("b_frames", ["0", "2"])
@pytest.mark.parametrize("ending", ["mkv", "mp4"])
@pytest.mark.parametrize("number", [1, 37, 60, 88])
def test_damage_inside_is_an_error_and_no_wrong_frame(
    tmp_path: Path, ending: str, b_frames: str, number: int
) -> None:
    path = steady(tmp_path / f"a.{ending}", 4.0, bf=b_frames, g="30")
    at = damaged(path, number)
    frames, _ = decoded_before_error(at, 30.0)
    assert [read_bar_code(frame.image) for frame in frames] == list(range(len(frames)))
    assert number - 8 <= len(frames) <= number + 8  # what came before is not thrown away


@pytest.mark.parametrize("b_frames", ["0", "2"])
@pytest.mark.parametrize("ending", ["mkv", "ts"])
@pytest.mark.parametrize("part", [0.3, 0.5, 0.63, 0.8])
def test_a_file_cut_short_gives_no_wrong_frame(
    tmp_path: Path, ending: str, b_frames: str, part: float
) -> None:
    """These containers need no end: a cut file is a shorter video, and its last, partial picture no picture."""
    path = steady(tmp_path / f"a.{ending}", 4.0, bf=b_frames, g="30")
    start = min(packet.pts or 0 for packet in packets(path))
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    left = sorted(((packet.pts or 0) - start) * packet.time_base for packet in packets(path))
    frames: list[TickFrame] = []
    with suppress(DecodeError):  # of the partial picture, where the container passes it on
        frames.extend(tick_frames(path, Clock(30.0)))
    wanted = [round(30 * at) for _, at in expected(left, left[-1] + Fraction(1, 30), 30.0)]
    got = [read_bar_code(frame.image) for frame in frames]
    assert got == wanted[: len(got)]
    assert len(wanted) - 4 <= len(got)
    assert 120 * (part - 0.1) <= len(got) <= 120 * (part + 0.1)


def test_a_cut_mp4_with_its_index_in_front_breaks_off(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.options = {"crf": "8", "threads": "1", "bf": "0", "g": "30"}
        for number in range(120):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(bar_code(number), "rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames, _ = decoded_before_error(path, 30.0)
    assert [read_bar_code(frame.image) for frame in frames] == list(range(len(frames)))
    assert 20 < len(frames) < 100


def test_tags_in_another_encoding_are_no_error(tmp_path: Path) -> None:
    path = steady(tmp_path / "a.mp4", 2.0)
    data = path.read_bytes()
    assert data.count(b"VideoHandler") == 1
    path.write_bytes(data.replace(b"VideoHandler", "Vidéo".encode("latin-1").ljust(12)))
    assert [read_bar_code(frame.image) for frame in tick_frames(path, Clock(2.0))] == [0, 15, 30, 45]
    assert probe_duration(path) == pytest.approx(2.0)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_probed_duration(tmp_path: Path, ending: str) -> None:
    path = steady(tmp_path / f"a.{ending}", 4.0, RATES["29.97"])
    assert probe_duration(path) == pytest.approx(120 * 1.001 / 30, abs=0.04)


def test_files_are_closed(tmp_path: Path) -> None:
    """Also where the reader stops half way, so that many videos do not use up the file handles."""
    path = steady(tmp_path / "a.mp4")
    handles = Path("/proc/self/fd")
    if not handles.is_dir():  # not Linux: removing the folder of an open file is the check there
        next(iter(tick_frames(path, Clock(2.0))))
        shutil.rmtree(tmp_path)
        assert not tmp_path.exists()
        return
    before = len(list(handles.iterdir()))
    for _ in range(5):
        frames = tick_frames(path, Clock(2.0))
        next(frames)
        frames.close()  # type: ignore[attr-defined]
        assert len(list(tick_frames(path, Clock(2.0), 2))) == 3
    assert len(list(handles.iterdir())) == before


@pytest.mark.parametrize("path", REAL_VIDEOS, ids=lambda path: path.name)
def test_real_videos(path: Path) -> None:
    """Every tick of a real file against all its frames, decoded one by one here."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        every = [
            (frame.pts * frame.time_base, frame.to_ndarray(format="rgb24"), frame.duration * frame.time_base)
            for frame in container.decode(stream)
        ]
    start = every[0][0]
    wanted = expected([at - start for at, _, _ in every], every[-1][0] - start + every[-1][2], 5.0)
    frames = list(tick_frames(path, Clock(5.0)))
    assert [frame.pts_s for frame in frames] == pytest.approx([at for _, at in wanted])
    for frame, (number, _) in zip(frames, wanted, strict=True):
        np.testing.assert_array_equal(frame.image, every[number][1])


# ---- a video of several files


def with_told_duration(path: Path, seconds: float) -> Path:
    """Overwrite the duration in a Matroska header; 0 tells none."""
    data = bytearray(path.read_bytes())
    at = data.index(bytes.fromhex("448988")) + 3
    data[at : at + 8] = struct.pack(">d", 1000 * seconds)
    path.write_bytes(data)
    return path


def small(path: Path, frames: int, rate: Fraction) -> Path:
    pictures = [np.ascontiguousarray(bar_code(n)[:, :64]) for n in range(500, 500 + frames)]
    return write_video(path, pictures, range(frames), 1 / rate, rate)


def laid_out(
    paths: Sequence[Path], lengths: Sequence[Fraction | None]
) -> tuple[list[tuple[Fraction, NDArray[np.uint8]]], Fraction]:
    """All frames of all files, each where it is on the common axis, and where that ends.

    Args:
        lengths: what the header of each file tells.
    """
    frames: list[tuple[Fraction, NDArray[np.uint8]]] = []
    begin = Fraction(0)
    for number, (path, length) in enumerate(zip(paths, lengths, strict=True)):
        with av.open(str(path)) as container:
            every = [
                (
                    frame.pts * frame.time_base,
                    frame.duration * frame.time_base,
                    frame.to_ndarray(format="rgb24"),
                )
                for frame in container.decode(video=0)
            ]
        first, (last, lasts, _) = every[0][0], every[-1]
        decoded_end = begin + last - first + lasts
        end = decoded_end if length is None or number == len(paths) - 1 else begin + length
        is_last = number == len(paths) - 1
        frames += [
            (begin + at - first, image) for at, _, image in every if is_last or begin + at - first < end
        ]
        begin = end
    return frames, begin


RATE = RATES["29.97"]
KINDS = {  # of a file of 2 to 3 seconds: how it is made, and what its header tells
    "steady": (lambda folder: steady(folder / "a.mp4", 2.0), Fraction(2)),
    "drifting": (lambda folder: steady(folder / "b.mp4", 2.3, RATE, bf="3"), 69 / RATE),
    "late start": (lambda folder: numbered(folder / "c.mp4", range(900, 990), Fraction(1, 30)), None),
    "little": (lambda folder: small(folder / "d.mp4", 70, RATES["24"]), Fraction(70, 24)),
    "cut by its header": (
        lambda folder: with_told_duration(steady(folder / "e.mkv", 3.0), 2.214),
        Fraction(2214, 1000),
    ),
    "shorter than its header": (
        lambda folder: with_told_duration(steady(folder / "f.mkv", 2.0), 2.906),
        Fraction(2906, 1000),
    ),
    "without a told end": (lambda folder: with_told_duration(steady(folder / "g.mkv", 2.5), 0), None),
}


@pytest.mark.parametrize("hz", [2.0, 5.0, 30.0])
@pytest.mark.parametrize(
    "kinds",
    [
        ("steady", "drifting", "little"),
        ("drifting", "drifting", "drifting", "steady"),
        ("cut by its header", "little", "shorter than its header"),
        ("shorter than its header", "cut by its header"),
        ("without a told end", "late start"),
        ("late start",),
    ],
    ids=" + ".join,
)
def test_parts_lie_one_after_the_other(tmp_path: Path, kinds: tuple[str, ...], hz: float) -> None:
    paths = [KINDS[kind][0](tmp_path) for kind in kinds]
    frames, end = laid_out(paths, [KINDS[kind][1] for kind in kinds])
    wanted = expected([at for at, _ in frames], end, hz)
    got = list(tick_frames(joined_uri(paths), Clock(hz)))
    assert [frame.tick for frame in got] == list(range(len(wanted)))
    assert [frame.pts_s for frame in got] == [at for _, at in wanted]
    for frame, (number, _) in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(frame.image, frames[number][1])
    half = [(frame.tick, frame.pts_s) for frame in tick_frames(joined_uri(paths), Clock(hz), len(got) // 2)]
    assert half == [(frame.tick, frame.pts_s) for frame in got[: len(got) // 2 + 1]]


def test_parts_worked_by_hand(tmp_path: Path) -> None:
    """The header of the first says 2.214 s, of the second 2.906 s, where it has 2 s of pictures."""
    kinds = ("cut by its header", "shorter than its header", "little")
    paths = [KINDS[kind][0](tmp_path) for kind in kinds]
    frames = list(tick_frames(joined_uri(paths), Clock(2.0)))
    assert [frame.pts_s for frame in frames][:5] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [frame.pts_s for frame in frames][5:10] == pytest.approx([2.481, 2.981, 3.481, 3.981, 4.181])
    assert [read_bar_code(frame.image) for frame in frames[:11]] == [0, 15, 30, 45, 60, 8, 23, 38, 53, 59, 59]
    assert [frame.pts_s for frame in frames][11] == pytest.approx(5.12 + 9 / 24)
    assert [frame.image.shape[1] for frame in frames] == [WIDTH] * 11 + [64] * 6  # to 5.12 + 70 / 24 = 8.04 s


def test_a_part_begins_where_the_probed_durations_end(tmp_path: Path) -> None:
    for kind in ("steady", "drifting", "little", "cut by its header", "shorter than its header"):
        first = KINDS[kind][0](tmp_path)
        second = KINDS["late start"][0](tmp_path)
        told = KINDS[kind][1]
        assert probe_duration(first) == float(told)
        shown = [frame.pts_s for frame in tick_frames(joined_uri([first, second]), Clock(60.0))]
        assert probe_duration(first) in shown  # the second's first frame
    with pytest.raises(DecodeError, match=r"g\.mkv tells no duration in its header"):
        probe_duration(KINDS["without a told end"][0](tmp_path))
    path = KINDS["steady"][0](tmp_path)
    data = bytearray(path.read_bytes())
    at = data.index(b"mdhd") + 20
    data[at : at + 4] = bytes(4)
    path.write_bytes(data)
    with pytest.raises(DecodeError, match=r"a\.mp4 tells no duration in its header"):
        probe_duration(path)
    second = KINDS["little"][0](tmp_path)
    assert [frame.pts_s for frame in tick_frames(joined_uri([path, second]), Clock(2.0))][4:6] == [2.0, 2.5]


def test_parts_that_are_not_whole(tmp_path: Path) -> None:
    first = steady(tmp_path / "a.mp4", 2.0)
    frames: list[TickFrame] = []
    with pytest.raises(DecodeError) as raised:
        frames.extend(tick_frames(joined_uri([first, tmp_path / "b.mp4"]), Clock(2.0)))
    assert str(raised.value) == f"{tmp_path / 'b.mp4'} is not there"
    assert len(list(tick_frames(joined_uri([first, tmp_path / "b.mp4"]), Clock(2.0), 3))) == 4
    broken = damaged(steady(tmp_path / "c.mkv", 4.0, g="30"), 60)
    with pytest.raises(DecodeError, match=r"c\.mkv is damaged at 2"):
        list(tick_frames(joined_uri([first, broken]), Clock(2.0)))
    assert len(list(tick_frames(joined_uri([with_told_duration(broken, 1.5), first]), Clock(2.0)))) == 7
