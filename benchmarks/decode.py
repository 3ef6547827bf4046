"""What decoding costs: the frames of all ticks, with and without skipping, against FFmpeg decoding everything.

    python benchmarks/decode.py --seconds 60 --rounds 3

Makes 720p H.264 clips at 25 pictures a second, with a key frame every 250 pictures or every 15, and with B pictures
that others are predicted from (a pyramid, x264's default: half of the pictures are used) or not. Reads each in turn
with `tick_frames` at 2 Hz (conversion to RGB included), with `tick_frames(skipping=False)`, and with
``ffmpeg -threads 2 -f null``, which shows no picture to anybody. Prints one JSON object: CPU seconds (user and
system, child processes too; the median of the rounds), and how many times as much ffmpeg takes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pipeline.decode import tick_frames
from schemas.clock import Clock

CLIPS = [(group, pyramid) for group in (250, 15) for pyramid in ("none", "normal")]


def make_clip(path: Path, seconds: int, group: int, pyramid: str) -> None:
    """A moving test picture with noise that changes from frame to frame, 5 Mbit/s.

    A tick comes every twelve and a half pictures, so that it falls anywhere in a group.
    """
    source = f"testsrc2=size=1280x720:rate=25:duration={seconds},noise=alls=6:allf=t"
    encoder = (
        f"libx264 -preset veryfast -g {group} -keyint_min {group} -sc_threshold 0 -bf 3 -b-pyramid {pyramid}"
    )
    encoder += " -b:v 5M -pix_fmt yuv420p"
    ffmpeg("-f", "lavfi", "-i", source, "-c:v", *encoder.split(), str(path))


def ffmpeg(*arguments: str) -> None:
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", *arguments]
    if subprocess.run(command).returncode:
        raise SystemExit(f"{' '.join(command)} failed")


def cpu_seconds(work: Callable[[], object]) -> float:
    before = sum(_used(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    work()
    return sum(_used(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) - before


def _used(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def read(path: Path, skipping: bool) -> int:
    return sum(1 for _ in tick_frames(path, Clock(2.0), skipping=skipping))


def measure(path: Path, rounds: int) -> dict[str, float]:
    ways: dict[str, Callable[[], object]] = {
        "skipping": lambda: read(path, True),
        "sequential": lambda: read(path, False),
        "ffmpeg": lambda: ffmpeg("-threads", "2", "-i", str(path), "-map", "0:v:0", "-f", "null", "-"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            seconds[name].append(cpu_seconds(work))
    result = {f"{name}_cpu_s": round(statistics.median(values), 3) for name, values in seconds.items()}
    for name in ("skipping", "sequential"):
        pairs = zip(seconds["ffmpeg"], seconds[name], strict=True)
        result[f"{name}_times_ffmpeg"] = round(statistics.median(a / b for a, b in pairs), 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=60, help="length of each clip")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is measured")
    arguments = parser.parse_args()
    if shutil.which("ffmpeg") is None:
        sys.exit(
            "The ffmpeg program is not on the PATH; install it (apt-get install ffmpeg) to compare with it."
        )
    with tempfile.TemporaryDirectory() as name:
        clips = {}
        for group, pyramid in CLIPS:
            path = Path(name) / f"{group}-{pyramid}.mp4"
            make_clip(path, arguments.seconds, group, pyramid)
            clips[f"key frame every {group}, pyramid {pyramid}"] = {
                "ticks": read(path, True),
                "mbit_per_s": round(path.stat().st_size * 8e-6 / arguments.seconds, 2),
                **measure(path, arguments.rounds),
            }
    machine = {"cores": os.cpu_count(), "machine": platform.machine()}
    print(json.dumps({"clips": clips, "rounds": arguments.rounds, **machine}, indent=2))


if __name__ == "__main__":
    main()
