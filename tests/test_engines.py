"""Encoders in this process and in others: the same files, and errors that say what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import av
import psutil
import pytest
from little import (
    Video,
    ended,
    family,
    files,
    finished_are_whole,
    kill,
    make_video,
    options,
    run,
    start,
    waited_for,
    write_tables,
)

from pipeline.cache import Summary, cache_features
from pipeline.encode import EncoderSpec
from pipeline.engines import Described, Processes, all_equal
from pipeline.vision import VisionEncoder
from schemas.errors import UserError


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> VisionEncoder:
    return VisionEncoder(tiny_model, "cpu")


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of six videos, in six shards at 24 ticks each."""
    folder = tmp_path_factory.mktemp("little")
    videos = [
        make_video(folder / "videos", name, 14 + number, seed=number) for number, name in enumerate("abcdef")
    ]
    return write_tables(folder / "labels", videos)


@pytest.fixture(scope="module")
def wanted(labels: Path, encoder: VisionEncoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of one encoder in this process."""
    out = tmp_path_factory.mktemp("here") / "out"
    assert run(labels, out, encoder, ticks=24).shards_made == 6
    return files(out)


def spec_of(model: Path) -> EncoderSpec:
    return EncoderSpec(model, str(model))


def encoders_of(process: psutil.Process) -> list[psutil.Process]:
    """The processes that were started as Python starts those with a copy of the work to do."""
    return [each for each in process.children() if "--multiprocessing-fork" in each.cmdline()]


def in_processes(labels: Path, out: Path, model: Path) -> Summary:
    with Processes(spec_of(model), ["cpu", "cpu"]) as engine:
        return cache_features(labels, out, engine, options(24, workers=1))


def test_processes_make_the_same_files(
    labels: Path, tiny_model: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    before = set(encoders_of(psutil.Process()))
    summary = in_processes(labels, tmp_path / "out", tiny_model)
    assert (summary.shards_made, summary.ticks, summary.failures) == (6, 99, [])
    assert files(tmp_path / "out") == wanted
    assert set(encoders_of(psutil.Process())) == before


def test_an_encoder_that_is_killed(
    labels: Path, tiny_model: Path, encoder: VisionEncoder, wanted: dict[str, str], tmp_path: Path
) -> None:
    """The run ends with its name, and so does the other encoder; what was finished stays."""
    out, killed = tmp_path / "out", []

    def on_tick(ticks: int) -> None:
        if list(out.glob("labels-*")) and not killed:
            killed.append(encoders_of(psutil.Process())[-1])
            killed[0].kill()

    with Processes(spec_of(tiny_model), ["cpu", "cpu"]) as engine:
        told = r"the encoder's process (\d+) ended with exit code -9, .* finished shards are kept"
        with pytest.raises(UserError, match=told) as error:
            cache_features(labels, out, engine, options(24, workers=1), on_tick=on_tick)
        assert f"process {killed[0].pid} ended" in str(error.value)
        assert encoders_of(psutil.Process()) == []  # before the lock is free, for they would go on to write
    finished_are_whole(out)
    made = len(list(out.glob("ledger/vision-*")))
    assert 0 < made < 6
    again = run(labels, out, encoder, ticks=24)
    assert (again.shards_kept, again.shards_made) == (made, 6 - made)
    assert files(out) == wanted


def test_what_goes_wrong_here_ends_the_encoders(labels: Path, tiny_model: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(ticks: int) -> None:
        raise Stop

    with Processes(spec_of(tiny_model), ["cpu"]) as engine:
        with pytest.raises(Stop):
            cache_features(labels, tmp_path / "out", engine, options(24), on_tick=stop)
        assert encoders_of(psutil.Process()) == []


def test_a_run_of_several_processes_that_is_killed(
    tiny_model: Path, encoder: VisionEncoder, tmp_path: Path
) -> None:
    """The first process alone, while an encoder waits for a video that does not come: nothing of it lives on."""
    folder, out = tmp_path / "videos", tmp_path / "out"
    mine = [make_video(folder, name, 14, seed) for seed, name in enumerate("abcd")]
    labels, fifo = write_tables(tmp_path / "labels", mine), mine[-1].path
    run(labels, tmp_path / "here", encoder, ticks=24)
    fifo.rename(folder / "aside")
    os.mkfifo(fifo)
    process = start(in_processes, labels, out, tiny_model, output=tmp_path / "said")
    with waited_for(fifo):
        assert len(family(process)) >= 3
        kill(process, whole_group=False)
    assert process.exitcode == -signal.SIGKILL
    finished_are_whole(out)
    (folder / "aside").replace(fifo)
    assert run(labels, out, encoder, ticks=24).failures == []
    assert files(out) == files(tmp_path / "here")


def test_a_checkpoint_without_weights(tiny_model: Path, tmp_path: Path) -> None:
    """Told as by an encoder in this process."""
    empty = shutil.copytree(tiny_model, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=rf"{empty} has no \*\.safetensors file") as here:
        VisionEncoder(empty, "cpu")
    with pytest.raises(UserError) as there:
        Processes(spec_of(empty), ["cpu", "cpu"])
    assert str(there.value) == str(here.value)
    assert encoders_of(psutil.Process()) == []


def test_encoders_that_do_not_agree(encoder: VisionEncoder) -> None:
    one = Described.of(encoder)
    half = dataclasses.replace(one, compute="bfloat16")
    assert all_equal([one, one], None) == one
    with pytest.raises(UserError, match=r"would compute in bfloat16 and float32, .* choose with --compute"):
        all_equal([one, half], None)
    with pytest.raises(UserError, match="loaded different checkpoints; give each the same --model"):
        all_equal([one, dataclasses.replace(one, vision_sha256="0")], None)


# ---- memory

HOURS, TICK_HZ, RATE = 3, 1.0, 30


def write_hours(path: Path) -> None:
    """The packets of a clip of ten seconds, over and over."""
    clip = path.with_name("clip.mp4")
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"preset": "ultrafast", "g": str(2 * RATE)}
        for number in range(10 * RATE):
            frame = av.VideoFrame(64, 48, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([number % 256]) * plane.buffer_size)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(clip)) as source, av.open(str(path), "w") as long:
        stream = source.streams.video[0]
        packets = [
            (bytes(each), each.pts, each.dts, each.is_keyframe) for each in source.demux(stream) if each.size
        ]
        copied = long.add_stream_from_template(stream)
        assert stream.time_base is not None
        frame_lasts, clip_lasts = round(1 / RATE / stream.time_base), round(10 / stream.time_base)
        for begin in range(0, HOURS * 360 * clip_lasts, clip_lasts):
            for data, pts, dts, is_keyframe in packets:
                packet = av.Packet(data)
                packet.stream, packet.time_base, packet.duration = copied, stream.time_base, frame_lasts
                packet.pts, packet.dts, packet.is_keyframe = pts + begin, dts + begin, is_keyframe
                long.mux(packet)


def in_this_process(labels: Path, out: Path, model: Path) -> None:
    run(labels, out, VisionEncoder(model, "cpu"), ticks=10**6, workers=1)


def test_memory_of_a_long_video(tiny_model: Path, tmp_path: Path) -> None:
    """Three hours take no more than minutes do: what comes from the decoder is written chunk by chunk."""
    ticks = round(HOURS * 3600 * TICK_HZ)
    write_hours(tmp_path / "long.mp4")
    video = Video("long", tmp_path / "long.mp4", ticks, (("long/all", 0, ticks),))
    labels, out = write_tables(tmp_path / "labels", [video], tick_hz=TICK_HZ), tmp_path / "out"
    process = start(in_this_process, labels, out, tiny_model, output=tmp_path / "said")
    begun = most = 0  # bytes once a tenth is written, and at most
    while process.is_alive():
        now = memory_of(process.pid)
        most = max(most, now)
        if not begun and any(path.stat().st_size > 1e6 for path in out.glob(".work/*/*/video-*.tar")):
            begun = now
        process.join(0.05)
    assert ended(process) == 0
    entry = json.loads((out / "ledger" / "vision-00000.json").read_text())
    assert entry["videos"]["long"]["ticks"] == ticks
    assert 0 < begun <= most < 2e9
    assert most - begun < 150e6  # all frames as the tower takes them are 530 MB


def memory_of(pid: int | None) -> int:
    """Bytes that a process and all that it started have in memory; what they share counts for each."""
    try:
        first = psutil.Process(pid)
        return sum(each.memory_info().rss for each in [first, *first.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0
