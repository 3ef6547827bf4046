"""Every kind of file the decoder is given, read with and without skipping, against plain decoding of all of it.

Each picture holds its number. A tick is right if its picture is the one that looking through all pictures of the
whole file gives; of a damaged file it may be a recorded failure instead, and never another picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from test_decode import BITS, BLOCK, HEIGHT, WIDTH, bar_code, expected

from pipeline import decode
from pipeline.decode import DecodeError, tick_frames
from pipeline.h264 import Bits, is_recovery_point
from pipeline.packets import scan
from pipeline.sequential import Shown, all_pictures
from pipeline.skipping import Plan, planned_pictures
from schemas.clock import Clock
from schemas.records import joined_uri

RATE = Fraction(25)


def number_of(image: NDArray[np.uint8]) -> int | None:
    """The number in a picture of any height that begins with a bar code; None where a block is in doubt."""
    blocks = image[10 : HEIGHT - 10].reshape(HEIGHT - 20, BITS, BLOCK, 3)[:, :, 4:-4].mean(axis=(0, 2, 3))
    if not ((blocks < 50) | (blocks > 205)).all():
        return None
    return sum(1 << bit for bit, value in enumerate(blocks) if value > 127)


def encode(
    path: Path,
    codec: str = "libx264",
    frames: int = 130,
    rate: Fraction = RATE,
    pix_fmt: str = "yuv420p",
    *,
    gop: int = 30,
    bf: int = 0,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    height: int = HEIGHT,
    sar: Fraction | None = None,
    sound: bool = False,
    muxer: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Numbered pictures in a file; ``pts`` in units of ``time_base``, by default one a picture."""
    if codec == "libx264":
        options = {"preset": "veryfast", "crf": "12", "threads": "1", "b_strategy": "0", **options}
    with av.open(str(path), "w", options=muxer or {}) as container:
        audio = container.add_stream("aac", rate=16_000, layout="mono") if sound else None
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = WIDTH, height, pix_fmt
        if bf or codec != "prores":
            stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, bf
        if codec in ("mpeg1video", "mpeg2video", "mpeg4", "mjpeg", "libvpx", "libvpx-vp9"):
            stream.bit_rate = 6_000_000
        if sar is not None:
            stream.sample_aspect_ratio = sar
        unit = time_base or 1 / rate  # the container may change the stream's
        stream.time_base = stream.codec_context.time_base = unit
        stream.options = options
        if audio is not None:
            sound_frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            sound_frame.sample_rate, sound_frame.pts = 16_000, 0
            container.mux(audio.encode(sound_frame))
        for number, at in zip(range(frames), pts or range(frames), strict=True):
            picture = bar_code(number)
            picture = np.tile(picture, (-(-height // HEIGHT), 1, 1))[:height]
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = at, unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def remux(source: Path, path: Path, change: Callable[[list[av.Packet]], Iterable[av.Packet]]) -> Path:
    """The same packets, changed, in another file; times are kept as they are, also negative ones."""
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(source)) as old, av.open(str(path), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in change([packet for packet in old.demux(video=0) if packet.size]):
            packet.stream = stream
            new.mux(packet)
    return path


def later(pictures: float, packets: list[av.Packet]) -> Iterable[av.Packet]:
    """All packets so many pictures later."""
    for packet in packets:
        assert packet.pts is not None
        assert packet.dts is not None
        shift = round(pictures / RATE / packet.time_base)
        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
    return packets


def from_another(path: Path, change: Callable[[list[av.Packet]], Iterable[av.Packet]], **how: object) -> Path:
    return remux(
        encode(path.with_suffix(".whole.ts" if path.suffix == ".ts" else ".whole.mp4"), **how), path, change
    )  # type: ignore[arg-type]


def x265(parameters: str) -> dict[str, str]:
    return {
        "preset": "ultrafast",
        "x265-params": f"log-level=none:pools=1:crf=10:bframes=3:{parameters}",
    }


@dataclass(frozen=True)
class Kind:
    """How a file is made. ``skips``: something is left out at two ticks a second; False: all of it is decoded."""

    ending: str
    how: dict[str, object] = field(default_factory=dict)
    skips: bool = True
    make: Callable[..., Path] = encode


FIXED = {"sc_threshold": "0"}  # no key frame but where the group of pictures ends
UNEVEN = [n + 7 * (n // 11) + (n % 5 == 3) for n in range(0, 260, 2)]
DROPPED = [n for n in range(190) if n % 17 < 9 or 80 < n < 109]
MPEG = {"bf": 2, "gop": 12}

WHOLE = {
    **{
        f"{float(rate):.2f} fps, {bf} B, group {gop}": Kind(
            "mp4",
            {"rate": rate, "gop": gop, "bf": bf, "frames": round((5 if rate < 50 else 3) * rate), **FIXED},
            gop == 15 or bf > 0,
        )
        for rate, gop, bf in (
            (Fraction(2446, 100), 15, 3),
            (Fraction(25), 250, 3),
            (Fraction(25), 15, 0),
            (Fraction(30000, 1001), 15, 2),
            (Fraction(30000, 1001), 250, 0),
            (Fraction(30), 250, 3),
            (Fraction(60000, 1001), 15, 3),
            (Fraction(60000, 1001), 250, 3),
        )
    },
    "grey": Kind("mp4", {"bf": 3, "pix_fmt": "gray"}),
    "H.264 10 bit": Kind("mp4", {"bf": 3, "pix_fmt": "yuv420p10le"}),
    "H.264 CAVLC, mkv": Kind("mkv", {"bf": 3, "coder": "0"}),
    "H.264 fast start": Kind("mp4", {"bf": 3, "muxer": {"movflags": "faststart"}, **FIXED}),
    "mkv without B pictures": Kind("mkv", FIXED),
    "H.264 flv": Kind("flv", {"bf": 3}),
    "H.264 avi": Kind("avi", {"bf": 0}),
    "H.264 ts": Kind("ts", {"bf": 3, **FIXED}),
    "HEVC 8 bit": Kind("mp4", {"codec": "libx265", **x265("keyint=30:open-gop=0")}),
    "HEVC 10 bit": Kind(
        "mkv", {"codec": "libx265", "pix_fmt": "yuv420p10le", **x265("keyint=30:open-gop=0")}
    ),
    "HEVC ts": Kind("ts", {"codec": "libx265", **x265("keyint=30:open-gop=0")}),
    "HEVC open group": Kind("mkv", {"codec": "libx265", **x265("keyint=30:open-gop=1:b-pyramid=1")}),
    "HEVC layers": Kind(
        "mp4", {"codec": "libx265", **x265("keyint=30:open-gop=1:b-pyramid=1:temporal-layers=3")}
    ),
    "HEVC RADL": Kind("mp4", {"codec": "libx265", **x265("keyint=30:open-gop=0:radl=2")}),
    "VP8": Kind("webm", {"codec": "libvpx", "deadline": "realtime", "cpu-used": "8"}),
    "VP9": Kind("webm", {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8"}),
    "VP9 hidden pictures": Kind(
        "webm", {"codec": "libvpx-vp9", "frames": 100, "lag-in-frames": "16", "cpu-used": "6"}
    ),
    "AV1": Kind(
        "mkv", {"codec": "libsvtav1", "height": 64, "preset": "12", "crf": "20", "svtav1-params": "lp=1"}
    ),
    "MPEG-1": Kind("mpg", {"codec": "mpeg1video", **MPEG}),
    "MPEG-2": Kind("mpg", {"codec": "mpeg2video", **MPEG}),
    "MPEG-2 ts": Kind("ts", {"codec": "mpeg2video", **MPEG}),
    "MPEG-4 avi": Kind("avi", {"codec": "mpeg4", **MPEG}),
    "MPEG-4 mp4": Kind("mp4", {"codec": "mpeg4", **MPEG}),
    "MJPEG": Kind("avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "ProRes": Kind("mov", {"codec": "prores_ks", "pix_fmt": "yuv422p10le", "frames": 40}),
    "FFV1": Kind("mkv", {"codec": "ffv1", "frames": 40}, skips=False),  # not known here
    "SAR": Kind("mp4", {"sar": Fraction(4, 3), "bf": 2}),
    "sound first": Kind("mp4", {"sound": True, "bf": 2}),
    "one frame": Kind("mp4", {"frames": 1}, skips=False),
    "VFR mp4": Kind("mp4", {"pts": UNEVEN, "bf": 2}),
    "VFR mkv": Kind("mkv", {"pts": UNEVEN, "bf": 2}),
    "dropped frames": Kind("mp4", {"pts": DROPPED, "frames": len(DROPPED), "bf": 2}),
    "starts at 5.3 s": Kind("mkv", {"make": partial(later, 132.5), "bf": 2}, make=from_another),
    "open group": Kind("mp4", {"bf": 3, "x264-params": "open_gop=1:keyint=30:min-keyint=30"}),
    "open group ts": Kind("ts", {"bf": 3, "x264-params": "open_gop=1:keyint=30:min-keyint=30"}),
    "intra refresh": Kind("mp4", {"x264-params": "intra-refresh=1:keyint=30:bframes=0"}, skips=False),
    "intra refresh ts": Kind("ts", {"x264-params": "intra-refresh=1:keyint=30:bframes=0"}, skips=False),
    "edit list inside a group": Kind(
        "mp4", {"make": partial(later, -37), "bf": 3, **FIXED}, make=from_another
    ),
    "edit list before B pictures": Kind(
        "mp4", {"make": partial(later, -32), "bf": 3, **FIXED}, make=from_another
    ),
    "MPEG-4 edit list": Kind(
        "mp4", {"make": partial(later, -17), "codec": "mpeg4", **MPEG}, make=from_another
    ),
    "cut off in front": Kind(
        "ts", {"make": lambda packets: packets[17:], "bf": 3, **FIXED}, False, make=from_another
    ),
    "open group cut off in front": Kind(
        "ts",
        {"make": lambda packets: packets[17:], "bf": 3, "x264-params": "open_gop=1:keyint=30:min-keyint=30"},
        False,
        make=from_another,
    ),
    "MPEG-2 cut off in front": Kind(
        "mpg", {"make": lambda packets: packets[17:], "codec": "mpeg2video", **MPEG}, False, make=from_another
    ),
}
"""Undamaged files. A start inside a group is what recorders and cutters leave; decoding begins at a key frame."""


class Library:
    """Files by their kind's name, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._made = folder, dict[str, Path]()

    def __getitem__(self, name: str) -> Path:
        if name not in self._made:
            kind = WHOLE[name]
            how = dict(kind.how)
            arguments = [how.pop("make")] if "make" in how else []
            path = self._folder / f"{len(self._made)}.{kind.ending}"
            self._made[name] = kind.make(path, *arguments, **how)
        return self._made[name]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("videos"))


@dataclass(frozen=True)
class Plain:
    """A file read by decoding all of it: each picture's time from the first on, and where the video ends."""

    pts: list[int]
    times: list[Fraction]
    end: Fraction
    images: list[NDArray[np.uint8]]

    @classmethod
    def read(cls, path: Path) -> Plain:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = list(container.decode(stream))
            unit, rate = Fraction(stream.time_base or 0), stream.average_rate
        pts = [frame.pts or 0 for frame in frames]
        times = [(at - pts[0]) * unit for at in pts]
        lasts = frames[-1].duration * unit if frames[-1].duration else 1 / Fraction(rate or 0)
        return cls(pts, times, times[-1] + lasts, [frame.to_ndarray(format="rgb24") for frame in frames])

    @property
    def numbers(self) -> list[int | None]:
        return [number_of(image) for image in self.images]


def no_damage(first: int, end: int, reason: str) -> None:
    raise AssertionError(f"ticks {first} to {end}: {reason}")


@pytest.mark.parametrize("name", WHOLE)
def test_every_tick_of_a_whole_file_is_exact(library: Library, name: str) -> None:
    path = library[name]
    plain = Plain.read(path)
    numbers = plain.numbers
    assert numbers == list(
        range(numbers[0] or 0, (numbers[0] or 0) + len(numbers))
    )  # the reading itself is right
    for hz, skipping in ((2.0, True), (7.0, True), (7.0, False)):
        wanted = expected(plain.times, plain.end, hz)
        got = list(tick_frames(path, Clock(hz), skipping=skipping, on_damage=no_damage))
        assert [frame.tick for frame in got] == list(range(len(wanted)))
        assert [frame.pts_s for frame in got] == pytest.approx([at for _, at in wanted], abs=1e-9)
        for frame, (index, _) in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(frame.image, plain.images[index])


@dataclass
class Spy:
    """What `tick_frames` did: how often all of a file was decoded, and the plans that it followed."""

    all: int = 0
    plans: list[Plan] = field(default_factory=list)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()

    def all_of_it(*arguments: Any) -> Iterator[Shown]:
        spy.all += 1
        return all_pictures(*arguments)

    def planned(container: Any, stream: Any, plan: Plan, *rest: Any) -> Iterator[Shown]:
        spy.plans.append(plan)
        return planned_pictures(container, stream, plan, *rest)

    monkeypatch.setattr(decode, "all_pictures", all_of_it)
    monkeypatch.setattr(decode, "planned_pictures", planned)
    return spy


@pytest.mark.parametrize("name", WHOLE)
def test_skipping_is_used_where_it_may_be(library: Library, name: str, spy: Spy) -> None:
    path = library[name]
    counts = [len(list(tick_frames(path, Clock(hz)))) for hz in (2.0, 7.0)]
    if name == "FFV1" or "cut off" in name:
        assert (spy.all, spy.plans) == (2, [])
        return
    assert spy.all == 0
    assert [len(plan.wanted) <= count + 1 for plan, count in zip(spy.plans, counts, strict=True)] == [
        True,
        True,
    ]
    plan = spy.plans[0]
    assert plan.sent.all() != WHOLE[name].skips
    if name.endswith("group 250"):
        assert plan.sent.mean() < (0.67 if WHOLE[name].how["bf"] else 1.01)
    if name.endswith("group 15"):
        assert plan.sent.mean() < 0.75
    list(tick_frames(path, Clock(2.0), skipping=False))
    assert spy.all == 1


def test_most_of_long_open_groups_is_left_out(tmp_path: Path, spy: Spy) -> None:
    """More pictures than the order in the stream counts up to (256): it begins anew after what was left out."""
    path = encode(
        tmp_path / "a.mkv", "libx265", 560, **x265("open-gop=1:keyint=250:min-keyint=250:scenecut=0")
    )
    assert scan(path).is_clean.sum() == 3
    got = [number_of(frame.image) for frame in tick_frames(path, Clock(0.125))]
    assert got == [0, 200, 400]
    assert [number_of(frame.image) for frame in tick_frames(path, Clock(0.08))] == [0, 312]
    assert spy.all == 0
    assert spy.plans[1].sent.mean() < 0.5


@pytest.mark.parametrize("name", WHOLE)
def test_the_first_ticks_alone(library: Library, name: str) -> None:
    """The scan stops early then; what is read is the same."""
    path = library[name]
    every = [
        (frame.tick, frame.pts_s, frame.image) for frame in tick_frames(path, Clock(5.0), skipping=False)
    ]
    for last_tick in (1, 13):
        some = list(tick_frames(path, Clock(5.0), last_tick, on_damage=no_damage))
        assert [frame.tick for frame in some] == [tick for tick, _, _ in every[: last_tick + 1]]
        for frame, (_, pts_s, image) in zip(some, every, strict=False):
            assert frame.pts_s == pts_s
            np.testing.assert_array_equal(frame.image, image)
    if name == "25.00 fps, 0 B, group 15":
        assert len(scan(path, None, Fraction(1))) == 45  # key frames at 1.2 s and 1.8 s
        assert not scan(path, None, Fraction(1)).whole


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_said_about_packets(library: Library, name: str) -> None:
    """Decoding from each clean start alone gives all pictures behind it; without unused ones the others are right."""
    path = library[name]
    packets = scan(path)
    assert packets.whole
    assert not packets.is_corrupt.any()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        held = [packet for packet in container.demux(stream) if packet.size]
        truth = _decoded(stream, held)
    assert [packet.pts for packet in held] == packets.pts.tolist()
    for start in np.flatnonzero(packets.is_clean)[:4].tolist():
        part = _fresh(path, held[start : start + 40])
        after = sorted(pts for pts in part if pts >= packets.pts[start])
        assert len(after) > 0 or packets.is_discard[start]
        for pts in after:
            np.testing.assert_array_equal(part[pts], truth[pts])
    left = [packet for packet, used in zip(held, packets.is_used, strict=True) if used]
    for pts, image in _fresh(path, left).items():
        np.testing.assert_array_equal(image, truth[pts])
    if "refresh" in name or name.startswith("open group"):
        assert packets.is_keyframe.sum() >= 3
        assert packets.is_clean.sum() == (0 if "cut off" in name else 1)


def _decoded(stream: Any, packets: Sequence[Any]) -> dict[int, NDArray[np.uint8]]:
    frames = [frame for packet in [*packets, None] for frame in stream.codec_context.decode(packet)]
    return {frame.pts: frame.to_ndarray(format="rgb24") for frame in frames}


def _fresh(path: Path, packets: Sequence[Any]) -> dict[int, NDArray[np.uint8]]:
    """What a decoder gives that has seen no other packets."""
    with av.open(str(path)) as container:
        return _decoded(container.streams.video[0], packets)


# ---- damaged files


def places(path: Path) -> list[tuple[int, int]]:
    """Where each packet begins in the file, and its size, in decoding order."""
    with av.open(str(path)) as container:
        return [(packet.pos or 0, packet.size) for packet in container.demux(video=0) if packet.size]


def zeroed(path: Path, out: Path, *numbers: int) -> Path:
    """Zeros in the middle of these packets."""
    data = bytearray(path.read_bytes())
    at = places(path)
    for number in numbers:
        position, size = at[number]
        data[position + size // 2 : position + size // 2 + 300] = bytes(300)
    out.write_bytes(data)
    return out


def scrambled(path: Path, out: Path, number: int) -> Path:
    """Bytes in the middle of a packet that a packet may well have: only the decoder notices."""
    data = bytearray(path.read_bytes())
    position, size = places(path)[number]
    data[position + size // 2 : position + size // 2 + 300] = b"\xa5\x5a\xff" * 100
    out.write_bytes(data)
    return out


def cut_off(path: Path, out: Path, part: float) -> Path:
    data = path.read_bytes()
    out.write_bytes(data[: int(part * len(data))])
    return out


def lost(path: Path, out: Path, number: int, count: int, before: int = 0) -> Path:
    """So many packets of a transport stream are gone, from just before a picture's beginning or from inside it."""
    data = path.read_bytes()
    at = places(path)[number][0] + 188 * (1 - before)
    out.write_bytes(data[:at] + data[at + 188 * count :])
    return out


def left_out(path: Path, out: Path, least: int) -> Path:
    """A picture that no other needs is gone, and neither counters nor its bytes tell of it."""
    number = least + int(np.flatnonzero(~scan(path).is_used[least:])[0])
    return remux(path, out, lambda packets: packets[:number] + packets[number + 1 :])


def exchanged(path: Path, out: Path, number: int) -> Path:
    """A picture and the next have changed places; the times stay."""

    def change(packets: list[av.Packet]) -> Iterable[av.Packet]:
        contents = [bytes(packet) for packet in packets]
        contents[number], contents[number + 1] = contents[number + 1], contents[number]
        for packet, content in zip(packets, contents, strict=True):
            new = av.Packet(content)
            new.pts, new.dts, new.time_base = packet.pts, packet.dts, packet.time_base
            new.duration, new.is_keyframe = packet.duration, packet.is_keyframe
            yield new

    return remux(path, out, change)


@dataclass(frozen=True)
class Damage:
    """What is done to a whole file, and what can be read of it all the same.

    ``goes_on``: ticks behind the damage are read, up to the last. ``least``: of a hundred ticks, so many are read.
    """

    kind: str
    do: Callable[[Path, Path], Path]
    least: int
    goes_on: bool = True


def _without(path: Path, out: Path, at: int, size: int) -> Path:
    data = path.read_bytes()
    out.write_bytes(data[:at] + data[at + size :])
    return out


def _end(path: Path) -> int:
    """Just before the end of the second key frame."""
    number = int(np.flatnonzero(scan(path).is_keyframe)[1])
    return places(path)[number + 1][0] - 340


def of(damage: Callable[..., Path], *arguments: Any) -> Callable[[Path, Path], Path]:
    return lambda path, out: damage(path, out, *arguments)


DAMAGED = {
    "mp4, a P picture": Damage("H.264 fast start", of(zeroed, 40), 80),
    "mp4, a key frame": Damage("H.264 fast start", of(zeroed, 60), 70),
    "mp4, the first key frame": Damage("H.264 fast start", of(zeroed, 0), 70),
    "mp4, the last packet": Damage("H.264 fast start", of(zeroed, 129), 90, goes_on=False),
    "mp4, two places": Damage("H.264 fast start", of(zeroed, 33, 95), 55),
    "MPEG-4, seen by the decoder only": Damage("MPEG-4 mp4", of(scrambled, 41), 75),
    "mp4 cut off": Damage("H.264 fast start", of(cut_off, 0.6), 55, goes_on=False),
    "mkv, a P picture": Damage("H.264 CAVLC, mkv", of(zeroed, 40), 75),
    "mkv cut off": Damage("H.264 CAVLC, mkv", of(cut_off, 0.63), 55, goes_on=False),
    "mkv, packets exchanged": Damage("mkv without B pictures", of(exchanged, 40), 75),
    "ts, a packet": Damage("H.264 ts", of(zeroed, 40), 60),
    "ts, one packet gone": Damage("H.264 ts", of(lost, 40, 1), 60),
    "ts, sixteen packets gone": Damage("H.264 ts", of(lost, 40, 16), 60),  # its counter has four bits
    "ts, a picture's beginning gone": Damage("H.264 ts", of(lost, 42, 2, 2), 60),
    "ts, 48 packets gone": Damage("H.264 ts", of(lost, 44, 48), 60),
    "ts cut off": Damage("H.264 ts", of(cut_off, 0.7), 55, goes_on=False),
    "open group ts": Damage("open group ts", of(lost, 40, 3), 60),
    "intra refresh": Damage("intra refresh", of(zeroed, 40), 28, goes_on=False),
    "open group ts, the end of a key frame": Damage(
        "open group ts", lambda p, out: _without(p, out, _end(p), 16), 55
    ),
    "HEVC mp4": Damage("HEVC 8 bit", of(zeroed, 40), 70),
    "HEVC open group": Damage("HEVC open group", of(zeroed, 37), 70),
    "HEVC ts": Damage("HEVC ts", of(lost, 40, 5), 60),
    "HEVC ts cut off": Damage("HEVC ts", of(cut_off, 0.87), 80, goes_on=False),
    "ts, a B picture left out": Damage("H.264 ts", of(left_out, 40), 60),
    "MPEG-1": Damage("MPEG-1", of(zeroed, 40), 80),
    "MPEG-2": Damage("MPEG-2", of(zeroed, 40), 80),
    "MPEG-2 ts": Damage("MPEG-2 ts", of(lost, 40, 3), 75),
    "MPEG-4 mp4": Damage("MPEG-4 mp4", of(zeroed, 40), 80),
    "MPEG-4 avi": Damage("MPEG-4 avi", of(zeroed, 40), 25, goes_on=False),
    "MPEG-4 avi, bytes gone": Damage(
        "MPEG-4 avi", lambda path, out: _without(path, out, places(path)[40][0] + 100, 64), 25, goes_on=False
    ),
}


@dataclass
class Outcome:
    """What reading a file at 25 ticks a second gives: the numbers seen, the runs that cannot be read."""

    numbers: dict[int, int | None]
    runs: list[tuple[int, int, str]]

    @classmethod
    def of(cls, path: Path, skipping: bool) -> Outcome:
        runs: list[tuple[int, int, str]] = []
        ticks = tick_frames(path, Clock(25.0), skipping=skipping, on_damage=lambda *run: runs.append(run))
        return cls({frame.tick: number_of(frame.image) for frame in ticks}, runs)

    @property
    def lost(self) -> list[int]:
        return [tick for first, end, _ in self.runs for tick in range(first, end)]


@pytest.mark.parametrize("skipping", [True, False])
@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named_and_never_shown(library: Library, tmp_path: Path, name: str, skipping: bool) -> None:
    damage = DAMAGED[name]
    whole = library[damage.kind]
    path = damage.do(whole, tmp_path / f"broken{whole.suffix}")
    plain = Plain.read(whole)
    wanted = [index for index, _ in expected(plain.times, plain.end, 25.0)]
    got = Outcome.of(path, skipping)
    assert {
        tick: number for tick, number in got.numbers.items() if number != wanted[tick]
    } == {}  # no wrong frame
    seen = sorted([*got.numbers, *got.lost])
    assert seen == list(range(len(seen)))  # each tick once, shown or named
    assert len(got.numbers) >= damage.least / 100 * len(wanted)
    assert all(str(path) in reason and "\n" not in reason for _, _, reason in got.runs)
    if damage.goes_on:
        assert len(seen) == len(wanted) == max(got.numbers) + 1
    assert got.runs
    assert got.lost or "cut off" in name  # a shorter video
    strict: list[int] = []
    first = min(got.lost, default=len(got.numbers))
    with pytest.raises(DecodeError):
        strict.extend(frame.tick for frame in tick_frames(path, Clock(25.0), skipping=skipping))
    assert strict == list(range(first))


def test_after_a_surprise_all_is_decoded_and_nothing_repeated(
    library: Library, tmp_path: Path, spy: Spy
) -> None:
    """Damage that only the decoder notices: up to there ticks came from the plan, from there on from all packets."""
    path = scrambled(library["MPEG-4 mp4"], tmp_path / "a.mp4", 41)
    got = Outcome.of(path, True)
    assert (len(spy.plans), spy.all) == (1, 1)
    assert not scan(path).is_corrupt.any()
    assert list(got.numbers) == sorted(got.numbers)
    assert len(got.lost) == len(set(got.lost)) > 0
    spared = {frame.tick for frame in tick_frames(path, Clock(1.0))}  # no tick needs what is damaged
    assert spared == set(range(6))


def test_a_video_that_breaks_off_says_where(library: Library, tmp_path: Path) -> None:
    whole, path = library["H.264 ts"], cut_off(library["H.264 fast start"], tmp_path / "a.mp4", 0.5)
    got = Outcome.of(path, True)
    *_, (first, end, reason) = got.runs
    assert first == end == max([*got.numbers, *got.lost]) + 1
    assert "breaks off" in reason
    for second, least in ((path, 13), (tmp_path / "missing.mp4", 11)):  # the first part has 5.2 s
        runs: list[tuple[int, int, str]] = []
        parts = tick_frames(joined_uri([whole, second]), Clock(2.0), on_damage=lambda *run: runs.append(run))  # noqa: B023
        ticks = [frame.tick for frame in parts]
        assert ticks == list(range(len(ticks)))
        assert len(ticks) >= least
        *_, (first, end, reason) = runs
        assert first == end >= len(ticks)
        assert str(second) in reason


def test_nothing_readable_is_an_error_in_any_case(library: Library, tmp_path: Path) -> None:
    path = zeroed(library["H.264 fast start"], tmp_path / "a.mp4", 0, 30, 60, 90, 120)
    calls: list[object] = []
    for skipping in (True, False):
        with pytest.raises(DecodeError, match=r"a\.mp4 is damaged at 0\.00 s"):
            list(tick_frames(path, Clock(2.0), skipping=skipping, on_damage=lambda *run: calls.append(run)))
    assert calls == []


def test_a_watcher_hears_of_every_packet(library: Library) -> None:
    path = library["H.264 ts"]
    for skipping, least in ((True, 250), (False, 130)):
        beats: list[int] = []
        list(tick_frames(path, Clock(2.0), skipping=skipping, beat=lambda: beats.append(1)))  # noqa: B023
        assert len(beats) >= least


def test_files_whose_pictures_have_no_times(tmp_path: Path) -> None:
    out_of_order = encode(tmp_path / "a.avi", bf=3)
    with pytest.raises(DecodeError, match=r"a\.avi keeps no times of its B pictures"):
        list(tick_frames(out_of_order, Clock(2.0)))
    raw = encode(tmp_path / "a.h264", bf=0, frames=30)
    with pytest.raises(
        DecodeError, match=r"a\.h264 holds no picture \(a picture without a presentation time\)"
    ):
        list(tick_frames(raw, Clock(2.0), on_damage=lambda *_: None))


@pytest.mark.parametrize(
    ("unit", "at_once"),
    [
        ("06 06 01 c0 80", True),  # a message of type 6 and one byte: 1 is 0 pictures, then flags
        ("06 06 01 50 80", False),  # 010 is 1 picture
        ("06 05 02 aa bb 06 01 c0 80", True),  # behind another message
        ("06 05 ff 01" + " 00" * 256 + " 06 01 c0 80", True),  # of 256 bytes
        ("06 05 04 06 01 c0 00 80", False),  # inside another message
    ],
)
def test_recovery_points(unit: str, at_once: bool) -> None:
    assert is_recovery_point(bytes.fromhex(unit)) is at_once


def test_numbers_in_a_bit_stream() -> None:
    bits = Bits(
        bytes.fromhex("a6 42 98 e2 04 8a")
    )  # 1 010 011 00100 00101 00110 00111 0001000 0001001 0001010
    assert [bits.ue() for _ in range(10)] == list(range(10))
    assert [Bits(bytes([byte])).se() for byte in (0x80, 0x40, 0x60, 0x20, 0x28)] == [0, 1, -1, 2, -2]
    with pytest.raises(EOFError):
        Bits(b"\0").ue()
