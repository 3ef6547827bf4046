"""Live video against the frame numbers burnt into its pictures: over real sockets, in real time."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from test_decode import audio_only, bar_code, damaged, expected, read_bar_code, steady, write_video

from pipeline import live_source
from pipeline.decode import DecodeError, TickFrame, tick_frames
from pipeline.live import Gap, live_ticks
from pipeline.live_source import PictureTimes, is_live
from schemas.clock import Clock

HZ, RATE, GRACE = 10.0, 30, 0.001
SLACK_S = 0.6  # a busy machine may be this late
Send = Callable[[bytes], None]
Answer = Callable[[Send], None]


@pytest.fixture(autouse=True)
def _nothing_stays_behind() -> Iterator[None]:
    handles = Path("/proc/self/fd")
    before = len(list(handles.iterdir())) if handles.is_dir() else 0
    yield
    assert not reader_lives()
    assert not handles.is_dir() or len(list(handles.iterdir())) <= before


def reader_lives() -> bool:
    return any(thread.name == "dst-live" for thread in threading.enumerate())


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Start a server whose nth connection gets the nth answer, and further ones none: "503" at once."""
    servers: list[ThreadingHTTPServer] = []

    def start(*answers: Answer) -> str:
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = left.pop(0) if left else refuse
                with suppress(ConnectionError):  # the reader has gone
                    if answer is refuse:
                        self.send_error(503)
                        return
                    self.send_response(200)
                    self.end_headers()
                    answer(self.wfile.write)

            def log_message(self, *_: Any) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = False
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/live"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()  # waits for its threads


def refuse(send: Send) -> None: ...


def at_once(data: bytes) -> Answer:
    return lambda send: send(data)


def paced(data: bytes, seconds: float) -> Answer:
    """All of it at a steady rate; the pictures of these tests need about the same number of bytes each."""

    def answer(send: Send) -> None:
        start, sent = time.monotonic(), 0
        while sent < len(data):
            end = round(len(data) * min(1.0, (time.monotonic() - start) / seconds + 0.02))
            send(data[sent:end])
            sent = end
            time.sleep(0.01)

    return answer


def then_silence(answer: Answer, seconds: float) -> Answer:
    def both(send: Send) -> None:
        answer(send)
        time.sleep(seconds)

    return both


def movie(folder: Path, first: int, count: int, ending: str = "ts", stamp: int = 0, **options: str) -> bytes:
    """Pictures that bear the numbers from ``first`` on, at 30 a second, from the ``stamp``-th of these times on."""
    pictures = [bar_code(first + n) for n in range(count)]
    path, pts = folder / f"{first}.{ending}", range(stamp, stamp + count)
    return write_video(path, pictures, pts, Fraction(1, RATE), **options).read_bytes()


Told = tuple[float, TickFrame | Gap]


def watch(
    url: str, ticks: int, hz: float = HZ, each_s: float = 0.0, **options: float
) -> tuple[list[Told], float]:
    """What comes up to that tick, each with its seconds since the first one, and how long closing took."""
    told: list[Told] = []
    with closing(live_ticks(url, Clock(hz), **options)) as live:
        for piece in live:
            told.append((time.monotonic(), piece))
            last = piece.end - 1 if isinstance(piece, Gap) else piece.tick
            if last >= ticks - 1:
                break
            time.sleep(each_s if isinstance(piece, TickFrame) else 0)
        begin = time.monotonic()
    closing_s = time.monotonic() - begin
    assert not reader_lives()
    check_whole([piece for _, piece in told])
    return [(at - told[0][0], piece) for at, piece in told], closing_s


def check_whole(pieces: list[TickFrame | Gap]) -> None:
    """Each tick once, in order."""
    ticks = [
        tick
        for piece in pieces
        for tick in (range(piece.first, piece.end) if isinstance(piece, Gap) else [piece.tick])
    ]
    assert ticks == list(range(len(ticks)))


def numbers(told: list[Told]) -> list[tuple[int, int]]:
    return [(piece.tick, read_bar_code(piece.image)) for _, piece in told if isinstance(piece, TickFrame)]


def check_real_time(
    told: list[Told], hz: float = HZ, early_s: float = 0.0, waits: int = -1, wait_s: float = 0.0
) -> None:
    """Each tick came when it was due, ``waits`` up to that much later."""
    for at, piece in told:
        if isinstance(piece, TickFrame):
            late_s = SLACK_S + (wait_s if piece.tick == waits else 0)
            assert piece.tick / hz - early_s - SLACK_S / 2 <= at <= piece.tick / hz + late_s, (at, piece.tick)


# ---- the time of a picture


def times(*seen: tuple[float | None, float]) -> list[float]:
    made = PictureTimes()
    return [
        float(made.time_of(None if stamp is None else Fraction(stamp).limit_denominator(1000), at))
        for stamp, at in seen
    ]


def test_stamps_lead_whatever_the_arrival() -> None:
    assert times((7.0, 0.0), (7.5, 0.9), (8.0, 1.0), (8.25, 1.0), (12.0, 4.75)) == [0, 0.5, 1, 1.25, 5]
    # held up for 4.5 s, and then all at once
    assert times((0.0, 0.0), (0.5, 5.0), (1.0, 5.0), (5.5, 5.5)) == [0, 0.5, 1, 5.5]


def test_arrival_leads_where_stamps_fail() -> None:
    assert times((40.0, 0.0), (40.5, 0.5), (0.0, 1.25), (0.5, 1.5)) == [0, 0.5, 1.25, 1.75]  # they begin anew
    assert times((0.0, 0.0), (0.5, 0.5), (3600.0, 1.0), (3600.5, 1.5)) == [0, 0.5, 1.0, 1.5]  # they jump
    assert times((None, 0.0), (None, 0.5), (3.0, 1.0), (3.5, 1.75)) == [0, 0.5, 1.0, 1.5]  # they are missing
    assert times((0.0, 0.0), (0.25, 5.0), (0.5, 5.75), (0.75, 6.0)) == [
        0,
        0.25,
        5.75,
        6.0,
    ]  # they fall behind
    # a picture that came before its time, and stamps that begin anew: times rise
    assert times((0.0, 0.0), (2.0, 0.5), (0.0, 0.75), (0.25, 1.0)) == [0, 2.0, 2.001, 2.251]
    assert times((5.0, 0.0), (5.0, 0.5), (5.5, 0.75)) == [0, 0.5, 1.0]  # the same twice


def test_a_new_connection_counts_from_its_arrival() -> None:
    made = PictureTimes()
    assert [made.time_of(Fraction(n), n) for n in (0, 1)] == [0, 1]
    made.reconnected()
    assert [made.time_of(Fraction(n, 2), 2 + n / 2) for n in (4, 5)] == [4, 4.5]


# ---- what comes over a socket


@pytest.mark.parametrize(("ending", "b_frames"), [("ts", "0"), ("ts", "2"), ("mkv", "2")])
def test_a_stream_shows_the_frames_that_the_rule_says(
    tmp_path: Path, serve: Callable[..., str], ending: str, b_frames: str
) -> None:
    data = movie(tmp_path, 0, 30, ending, bf=b_frames)
    told, _ = watch(serve(paced(data, 1.0)), 9)
    wanted = expected([Fraction(n, RATE) for n in range(30)], Fraction(1), HZ)[:9]
    assert [number for _, number in numbers(told)] == [number for number, _ in wanted]
    shown = [piece.pts_s for _, piece in told if isinstance(piece, TickFrame)]
    assert shown == pytest.approx([at for _, at in wanted], abs=0.001)
    check_real_time(told)


@pytest.mark.parametrize("each_s", [0.0, 0.08])
def test_pictures_that_come_in_a_burst_are_given_about_when_they_are_due(
    tmp_path: Path, serve: Callable[..., str], each_s: float
) -> None:
    """Nor is one lost, with room for three, if the consumer takes a little less than the time it has."""
    told, _ = watch(serve(at_once(movie(tmp_path, 0, 61))), 20, each_s=each_s, lag_s=0.2)
    assert numbers(told) == [(k, 3 * k) for k in range(20)]
    check_real_time(told, early_s=1.0)


@pytest.mark.parametrize(("late_ms", "number"), [(1, 15), (2, 14)])
def test_a_frame_may_come_one_millisecond_late(
    tmp_path: Path, serve: Callable[..., str], late_ms: int, number: int
) -> None:
    pts = [33 * n for n in range(15)] + [500 + late_ms + 33 * n for n in range(15)]
    path = write_video(tmp_path / "a.mkv", [bar_code(n) for n in range(30)], pts, Fraction(1, 1000))
    told, _ = watch(serve(at_once(path.read_bytes())), 2, hz=2.0)
    assert numbers(told) == [(0, 0), (1, number)]


def test_a_picture_that_lost_a_part_is_not_shown(tmp_path: Path, serve: Callable[..., str]) -> None:
    """One packet of the transport stream is gone; the picture before stays in place of the one it belonged to."""
    data = movie(tmp_path, 0, 20, g="10", keyint_min="10", sc_threshold="0")
    # where pictures begin: their stream has the number 0x100, and 0x4 marks a beginning
    pictures = [at for at in range(0, len(data), 188) if data[at + 1 : at + 3] == b"\x41\x00"]
    assert len(pictures) == 20
    at = pictures[15] + 3 * 188
    assert at < pictures[16] - 188
    told, _ = watch(serve(at_once(data[:at] + data[at + 188 :])), 16, hz=30.0)
    assert numbers(told) == [(k, k) for k in range(15)] + [(15, 14)]


def test_one_who_joins_in_the_middle_sees_whole_pictures(tmp_path: Path, serve: Callable[..., str]) -> None:
    data = movie(tmp_path, 0, 60, g="20", keyint_min="20", sc_threshold="0")
    told, _ = watch(serve(at_once(data[len(data) // 2 - 7 :])), 3)
    assert numbers(told) == [(0, 40), (1, 43), (2, 46)]


def check_return(
    told: list[Told], lasts: tuple[int, ...], gap_first: int, second_first: int, patience_s: float = 0.0
) -> Gap:
    """Pictures 0 to one of ``lasts``, a gap, and pictures from ``second_first`` on, all in real time."""
    gap = next(piece for _, piece in told if isinstance(piece, Gap))
    assert [piece for _, piece in told if isinstance(piece, Gap)] == [gap]
    assert gap.first == gap_first
    assert [pair for pair in numbers(told) if pair[0] < gap.first] == [(k, 3 * k) for k in range(gap.first)]
    after = [piece for _, piece in told if isinstance(piece, TickFrame) and piece.tick >= gap.end]
    starts = [piece.pts_s - (read_bar_code(piece.image) - second_first) / RATE for piece in after]
    assert starts == pytest.approx([starts[0]] * len(starts), abs=0.001)
    for piece in after:
        assert piece.tick / HZ - 1 / RATE < piece.pts_s <= piece.tick / HZ + GRACE
    assert (gap.end - 1) / HZ + GRACE < starts[0] <= gap.end / HZ + GRACE
    assert gap.reason in {f"no picture for {starts[0] - last / RATE:.1f} s" for last in lasts}
    check_real_time(told, waits=gap_first - 1, wait_s=patience_s)
    return gap


def test_a_stream_that_comes_back(tmp_path: Path, serve: Callable[..., str]) -> None:
    """It ends after 1 s, refuses once, and begins anew with stamps from 0: the clock has gone on."""
    url = serve(paced(movie(tmp_path, 0, 31), 1.0), refuse, paced(movie(tmp_path, 500, 60), 2.0))
    told, _ = watch(url, 27)
    gap = check_return(told, (30,), 11, 500)
    assert 19 <= gap.end <= 24  # two waits of half a second


def test_a_stream_that_falls_silent_and_comes_back(tmp_path: Path, serve: Callable[..., str]) -> None:
    """Its new stamps would go on well from the old ones, but the time between was longer."""
    silent = then_silence(paced(movie(tmp_path, 0, 32), 1.0667), 1.5)
    url = serve(silent, paced(movie(tmp_path, 500, 60, stamp=40), 2.0))
    told, _ = watch(url, 27, patience_s=0.7)
    # the last picture may be lost, as nothing follows that ends it; until when its tick is shown is not known
    check_return(told, (30, 31), 11, 500, patience_s=0.7)


def test_sound_alone_does_not_keep_a_connection(tmp_path: Path, serve: Callable[..., str]) -> None:
    """Half a second of pictures and 3 s of sound."""
    path = tmp_path / "a.ts"
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream("libx264", rate=RATE), container.add_stream("aac", rate=16_000)
        video.width, video.height, video.pix_fmt, audio.layout = 192, 32, "yuv420p", "mono"
        for number in range(15):
            container.mux(video.encode(av.VideoFrame.from_ndarray(bar_code(number), "rgb24")))
        container.mux(video.encode(None))
        for number in range(47):
            noise = np.random.default_rng(number).normal(0, 0.1, (1, 1024)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(noise, "fltp", "mono")
            frame.sample_rate, frame.pts = 16_000, 1024 * number
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    begin = time.monotonic()
    shown: list[av.VideoFrame | None] = []
    with pytest.raises(DecodeError, match=r"gave no picture for 0\.5 s"):
        shown += live_source.pictures(serve(paced(path.read_bytes(), 3.0)), 0.5)
    assert any(frame is not None for frame in shown)
    assert time.monotonic() - begin < 2.4


def test_a_stream_that_never_comes_back(tmp_path: Path, serve: Callable[..., str]) -> None:
    url = serve(paced(movie(tmp_path, 0, 15), 0.5)).replace("//", "//user:secret@")
    begin = time.monotonic()
    with pytest.raises(DecodeError) as raised:
        list(live_ticks(url, Clock(HZ), give_up_s=0.8))
    assert 1.2 < time.monotonic() - begin < 1.3 + SLACK_S
    message = str(raised.value)
    assert message.startswith("http://127.0.0.1:")
    assert "gave no picture for 0.8 s (" in message
    assert "; see that it runs, and start again" in message
    assert "secret" not in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["says nothing", "sends nothing", "sends no video"])
def test_a_source_that_never_begins(tmp_path: Path, serve: Callable[..., str], kind: str) -> None:
    if kind == "says nothing":
        with socket.create_server(("127.0.0.1", 0)) as listener:
            message = error_of(f"http://127.0.0.1:{listener.getsockname()[1]}/")
    elif kind == "sends nothing":
        message = error_of(serve(lambda send: time.sleep(1.2)))
    else:
        sound = audio_only(tmp_path / "a.mkv").read_bytes()
        message = error_of(serve(at_once(sound)))
    reason = {"sends no video": "holds no video"}.get(kind, "does not answer for 0.5 s")
    assert reason in message


def error_of(source: str) -> str:
    begin = time.monotonic()
    with pytest.raises(DecodeError) as raised:
        next(live_ticks(source, Clock(HZ), patience_s=0.5))
    assert time.monotonic() - begin < 1.0 + SLACK_S
    message = str(raised.value)
    assert message.endswith("; see that it is there and not in use elsewhere")
    assert "\n" not in message
    assert message.count(". ") == 0
    return message


def test_what_is_not_there(tmp_path: Path) -> None:
    assert error_of("97").startswith("camera 97 cannot be opened (")
    assert error_of("http://127.0.0.1:9/x").startswith("http://127.0.0.1:9/x cannot be opened (")
    for path in (tmp_path / "no.mp4", "file:" + str(tmp_path / "no.mp4")):
        with pytest.raises(DecodeError, match=r"no\.mp4 is not there"):
            next(live_ticks(str(path), Clock(HZ)))


def test_a_slow_consumer_is_told_what_it_missed(tmp_path: Path, serve: Callable[..., str]) -> None:
    """It takes 0.25 s for each tick of 0.1 s: it sees what is newest, and how many it did not see."""
    told, _ = watch(serve(paced(movie(tmp_path, 0, 75), 2.5)), 22, each_s=0.25, lag_s=0.4)
    gaps = [piece for _, piece in told if isinstance(piece, Gap)]
    seen = [piece for _, piece in told if isinstance(piece, TickFrame)]
    assert {gap.reason for gap in gaps} == {"late"}
    assert max(gap.end - gap.first for gap in gaps) > 1  # one gap for all that was missed at a time
    assert len(seen) + sum(gap.end - gap.first for gap in gaps) >= 22
    assert 5 <= len(seen) <= 14
    assert numbers(told) == [(piece.tick, 3 * piece.tick) for piece in seen]
    for at, piece in told:
        if isinstance(piece, TickFrame):
            assert at - piece.tick / HZ <= 0.4 + 0.25 + SLACK_S / 2


# ---- the end


def test_closing_ends_the_thread_soon(tmp_path: Path, serve: Callable[..., str]) -> None:
    data = movie(tmp_path, 0, 60)
    _, flowing_s = watch(serve(paced(data, 2.0)), 2)
    assert flowing_s < SLACK_S
    silent = then_silence(at_once(data[: len(data) // 3]), 1.2)
    _, silent_s = watch(serve(silent), 3, patience_s=0.5)
    assert silent_s < 0.5 + SLACK_S
    live_ticks("http://127.0.0.1:9", Clock(HZ)).close()  # never begun


def test_an_interrupt_ends_the_thread(tmp_path: Path, serve: Callable[..., str]) -> None:
    url = serve(then_silence(at_once(movie(tmp_path, 0, 10)), 0.9))
    live = live_ticks(url, Clock(HZ), patience_s=0.7)
    next(live)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        list(live)
    timer.join()
    assert not reader_lives()
    assert list(live) == []


# ---- files


def same(pieces: list[TickFrame | Gap], frames: list[TickFrame]) -> bool:
    shown = [piece for piece in pieces if isinstance(piece, TickFrame)]
    return [(frame.tick, frame.pts_s) for frame in shown] == [(f.tick, f.pts_s) for f in frames] and all(
        np.array_equal(a.image, b.image) for a, b in zip(shown, frames, strict=True)
    )


def test_a_file_is_read_as_ever(tmp_path: Path) -> None:
    path = steady(tmp_path / "a.mp4", 3.0, bf="2")
    frames = list(tick_frames(path, Clock(4.0), rotation_deg=90))
    assert len(frames) == 12
    for source in (str(path), f"file:{path}"):
        pieces = []
        for piece in live_ticks(source, Clock(4.0), rotation_deg=90, lag_s=0.01):
            pieces.append(piece)
            time.sleep(0.01)  # nothing is late
        assert same(pieces, frames)
        assert len(pieces) == 12


def test_damage_in_a_file_is_a_gap_in_its_place(tmp_path: Path) -> None:
    keys = {"g": "30", "keyint_min": "30", "sc_threshold": "0"}  # a key frame a second; the one at 2 s is bad
    path = damaged(steady(tmp_path / "a.mkv", 4.0, **keys), 60)
    pieces = list(live_ticks(str(path), Clock(2.0)))
    firsts = [piece.first if isinstance(piece, Gap) else piece.tick for piece in pieces]
    assert firsts == [0, 1, 2, 3, 4, 6, 7]
    gap = pieces[4]
    assert isinstance(gap, Gap)
    assert (gap.first, gap.end) == (4, 6)
    assert "damaged at 2.00 s" in gap.reason
    told: list[tuple[int, int, str]] = []
    assert same(pieces, list(tick_frames(path, Clock(2.0), on_damage=lambda *run: told.append(run))))
    assert told == [(gap.first, gap.end, gap.reason)]


def test_a_file_that_breaks_off_ends_with_the_reason(tmp_path: Path) -> None:
    path = steady(tmp_path / "a.mkv", 4.0, g="30")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 5 // 8])
    pieces = list(live_ticks(str(path), Clock(2.0)))
    assert [read_bar_code(piece.image) for piece in pieces[:-1]] == [0, 15, 30, 45, 60]
    end = pieces[-1]
    assert isinstance(end, Gap)
    assert (end.first, end.end) == (5, 5)
    assert str(path) in end.reason


# ---- cameras, of which there is none here


def test_which_sources_are_live() -> None:
    assert all(
        map(is_live, ["0", "12", "rtsp://a/b", "http://a/b.m3u8", "https://a", "udp://@:5000", "tcp://a:1"])
    )
    assert not any(
        map(is_live, ["a.mp4", "./0", "/x/0", "file:a.mp4", "file:///a.mp4", "C:\\a.mp4", "a:b.mp4"])
    )


@pytest.mark.parametrize(
    ("platform", "file", "kind"),
    [("linux", "/dev/video1", "v4l2"), ("darwin", "1", "avfoundation"), ("win32", "video=Back", "dshow")],
)
def test_cameras_are_opened_as_each_system_names_them(
    monkeypatch: pytest.MonkeyPatch, platform: str, file: str, kind: str
) -> None:
    devices = [("Microphone", ["audio"]), ("Front", ["video"]), ("Back", ["video"])]
    found = [SimpleNamespace(name=name, media_types=media) for name, media in devices]
    asked: dict[str, Any] = {}
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr("av.device.enumerate_input_devices", lambda name: found)
    monkeypatch.setattr(av, "open", lambda file, **options: asked.update(options, file=file))
    live_source._opened("1", 5.0)
    assert (asked["file"], asked["format"], asked["timeout"]) == (file, kind, 5.0)
    assert ("framerate" in asked["options"]) == (platform == "darwin")


def test_a_camera_that_does_not_wait_is_asked_again() -> None:
    answers: list[Any] = [av.BlockingIOError(11, "not yet"), "a", av.BlockingIOError(11, "not yet"), "b"]

    def demux() -> Iterator[Any]:
        while answers:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            yield answer

    assert list(live_source._packets(SimpleNamespace(demux=demux))) == [None, "a", None, "b"]  # type: ignore[arg-type]
