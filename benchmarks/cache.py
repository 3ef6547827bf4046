"""Does the cache's stage take longer than its slower half, and how does it compare with extracting JPEGs first?

    python benchmarks/cache.py            # needs the program ffmpeg

Encodes some 360p clips, then measures in turn, for towers that are faster and slower than decoding:
- `whole`: `cache_features` on all of them;
- `decode`: the same frames from the same decode processes, thrown away;
- `encode`: the same number of frames through the tower;
- `jpeg`: ffmpeg writes a JPEG for each tick, then they are read, resized and encoded, all cores used in both steps.
A tower is a clock that takes its time for each frame and no processor's, as a GPU does; those of `--layers` are real
ones on the CPU, which share the cores with the decoders. Prints JSON: frames a second and the ratios.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from made_labels import TICK_HZ, write_labels
from numpy.typing import NDArray
from PIL import Image
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from pipeline.cache import cache_features
from pipeline.decode_worker import VideoTask
from pipeline.engines import Here
from pipeline.feed import Feed, Frames
from pipeline.presets import init_model
from pipeline.todo import CacheOptions
from pipeline.vision import VisionEncoder
from pipeline.workers import available_cores
from schemas.clock import Clock

HEIGHT, WIDTH, RATE = 360, 640, 30
CORES = available_cores()
Videos = list[tuple[str, str, int]]


def write_clip(path: Path, seconds: int, seed: int) -> None:
    """Soft shapes that move, with noise, in H.264 with B-frames and a key frame every 250 frames."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "23", "preset": "fast", "g": "250"}
        for number in range(seconds * RATE):
            shift = number * 3.0
            waves = [
                np.sin((x * a + y * b + shift * c) / 40) for a, b, c in ((1, 2, 1), (2, -1, 2), (-1, 1, 3))
            ]
            picture = 128 + 90 * np.stack(waves, axis=2) + rng.normal(0, 4, (HEIGHT, WIDTH, 1))
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


class Elsewhere(VisionEncoder):
    """A tower that encodes so many frames a second on another device; its features are zeros."""

    def __init__(self, folder: Path, frames_a_second: float) -> None:
        super().__init__(folder, "cpu")
        self._rate, self._free_at = frames_a_second, 0.0

    def start(self, frames: NDArray[np.uint8]) -> tuple[float, int]:  # type: ignore[override]
        self._free_at = max(time.perf_counter(), self._free_at) + self.batch_size / self._rate
        return self._free_at, len(frames)

    def finish(self, pending: tuple[float, int]) -> NDArray[np.float32]:  # type: ignore[override]
        time.sleep(max(0.0, pending[0] - time.perf_counter()))
        return np.zeros((pending[1], self.tokens_per_frame, self.dim), np.float32)


def real_tower(folder: Path, layers: int) -> VisionEncoder:
    """The tiny checkpoint with a tower of so many layers, on the CPU."""
    config = SmolVLMConfig.from_pretrained(folder)
    config.vision_config.num_hidden_layers = layers
    torch.manual_seed(0)
    SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    return VisionEncoder(folder, "cpu")


def whole(labels: Path, out: Path, encoder: VisionEncoder) -> None:
    shutil.rmtree(out, ignore_errors=True)
    summary = cache_features(labels, out, Here(encoder), CacheOptions(workers=CORES))
    if summary.failures:
        raise SystemExit(summary.failures[0].reason)


def decode(videos: Videos, encoder: VisionEncoder) -> None:
    tasks = (VideoTask(n, uri, 0, ticks - 1, "pyav") for n, (_, uri, ticks) in enumerate(videos))
    with Feed(encoder.preprocessor, Clock(TICK_HZ), workers=CORES, limit_s=120) as feed:
        got = sum(len(event.images) for event in feed.events(tasks) if isinstance(event, Frames))
    if got != sum(ticks for _, _, ticks in videos):
        raise SystemExit(f"{got} frames were decoded")


def encode(count: int, encoder: VisionEncoder) -> None:
    side = encoder.preprocessor.square
    frames = np.random.default_rng(0).integers(0, 256, (encoder.batch_size, side, side, 3), np.uint8)
    pending = encoder.start(frames)
    for _ in range(encoder.batch_size, count, encoder.batch_size):
        following = encoder.start(frames)
        encoder.finish(pending)
        pending = following
    encoder.finish(pending)


def jpeg(videos: Videos, folder: Path, encoder: VisionEncoder) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, uri, _ in videos:
        (folder / name).mkdir(parents=True)
        command = [
            "ffmpeg",
            "-v",
            "error",
            "-threads",
            "2",
            "-i",
            uri,
            "-vf",
            f"fps={TICK_HZ:g}",
            "-q:v",
            "2",
        ]
        subprocess.run([*command, str(folder / name / "%06d.jpg")], check=True)
    with ThreadPoolExecutor(CORES) as pool:
        for name, _, ticks in videos:
            paths = sorted((folder / name).glob("*.jpg"))
            if abs(len(paths) - ticks) > 1:  # ffmpeg rounds
                raise SystemExit(f"ffmpeg wrote {len(paths)} pictures for {ticks} ticks")
            for first in range(0, len(paths), encoder.batch_size):
                some = paths[first : first + encoder.batch_size]
                resized = pool.map(
                    lambda path: encoder.preprocessor.resize(np.asarray(Image.open(path))), some
                )
                encoder.encode(np.stack(list(resized)))


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=60, help="of each clip")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[1000, 120, 40], help="of the towers")
    parser.add_argument("--layers", type=int, nargs="+", default=[], help="of real towers")
    arguments = parser.parse_args()
    if shutil.which("ffmpeg") is None:
        raise SystemExit("the program ffmpeg is not on the PATH; install it to compare with it")
    results = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        ticks = round(arguments.seconds * TICK_HZ)
        videos = [(f"clip-{n}", str(root / f"clip-{n}.mp4"), ticks) for n in range(arguments.clips)]
        for seed, (_, uri, _) in enumerate(videos):
            write_clip(Path(uri), arguments.seconds, seed)
        write_labels(root / "labels/made", videos)
        init_model("tiny", root / "tower")
        towers: dict[str, VisionEncoder] = {
            f"{rate:g} frames a second": Elsewhere(root / "tower", rate) for rate in arguments.rates
        }
        for layers in arguments.layers:
            shutil.copytree(root / "tower", root / f"tower-{layers}")
            towers[f"{layers} layers"] = real_tower(root / f"tower-{layers}", layers)
        frames = ticks * len(videos)
        for name, tower in towers.items():
            measures: dict[str, Callable[[], None]] = {
                "whole": partial(whole, root / "labels", root / "out", tower),
                "decode": partial(decode, videos, tower),
                "encode": partial(encode, frames, tower),
                "jpeg": partial(jpeg, videos, root / "jpeg", tower),
            }
            seconds: dict[str, list[float]] = {key: [] for key in measures}
            for _ in range(arguments.rounds):
                for key, work in measures.items():
                    seconds[key].append(timed(work))
            results.append(_result(name, frames, seconds))
    print(json.dumps(results, indent=1))


def _result(tower: str, frames: int, seconds: dict[str, list[float]]) -> dict[str, object]:
    rounds = list(zip(*seconds.values(), strict=True))
    over = [whole / max(decode, encode) for whole, decode, encode, _ in rounds]
    gain = [jpeg / whole for whole, _, _, jpeg in rounds]
    return {
        "tower": tower,
        "frames_a_second": {
            key: round(frames / statistics.median(taken), 1) for key, taken in seconds.items()
        },
        "whole_over_the_slower_half": round(statistics.median(over), 3),
        "throughput_over_jpeg_first": round(statistics.median(gain), 2),
    }


if __name__ == "__main__":
    main()
