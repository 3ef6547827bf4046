"""How fast `dst prepare` is and how much memory it takes, on a generated corpus.

    python benchmarks/prepare.py --dialogs 3000 --ticks 8400        # 25 million frames rows

Writes annotations and dialogues in Assembly101's layout (no video files), then runs `dst prepare` with one dialogue
a video and with ten on the same number of videos, with one worker and with one a core, in turn. Prints rows a second
and the peak of the resident memory of all its processes, and how much ten times the dialogues add to it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq

STEPS, TURNS = 12, 40
VIEW = "C10095_rgb"


def write_corpus(root: Path, videos: int, dialogs: int, ticks: int) -> None:
    """``dialogs`` dialogues a video of so many ticks at 2 Hz, each with twelve steps and forty turns."""
    rng = random.Random(0)
    labels = root / "annotations/coarse-annotations/coarse_labels"
    labels.mkdir(parents=True)
    (root / "dialogs").mkdir()
    seconds = ticks / 2 - 4  # a session begins 2 s before its first event and ends 2 s after its last
    with (root / "dialogs/generated.json").open("w") as file:
        for number in range(videos):
            borders = sorted(rng.uniform(0, seconds) for _ in range(STEPS - 1))
            borders = [2.0, *(2 + border for border in borders), 2 + seconds]
            rows = [
                f"{round(a * 30)}\t{round(b * 30)}\tattach part {n}\n"
                for n, (a, b) in enumerate(itertools.pairwise(borders))
            ]
            (labels / f"assembly_recording-{number:05d}.txt").write_text("".join(rows))
            record = {
                "video_uid": f"assembly_recording-{number:05d}__{VIEW}",
                "inferred_goal": "assemble the toy",
                "conversations": [_conversation(rng, seconds) for _ in range(dialogs)],
            }
            file.write(("[" if number == 0 else ",\n") + json.dumps(record))
        file.write("]")


def _conversation(rng: random.Random, seconds: float) -> dict[str, object]:
    turns = [
        {
            "role": rng.choice(("user", "assistant")),
            "time": round(2 + rng.uniform(0, seconds), 1),
            "content": "Well done, now take the next part and attach it to the chassis. " * 2,
            "labels": "initiative|instruction",
            "progress": "The time elapsed, what has been done and what the current step is. " * 5,
        }
        for _ in range(TURNS)
    ]
    return {"user_type": "talk_some", "conversation": turns}


def run(root: Path, out: Path, workers: int) -> tuple[float, float]:
    """Seconds, and the peak of the resident memory of all processes in MB."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "cli", "prepare", "--source", "assembly101", "--root", str(root)]
    command += ["--out", str(out), "--workers", str(workers)]
    began, peak = time.perf_counter(), 0
    code = "import cli; cli.app()"
    with subprocess.Popen([sys.executable, "-c", code, *command[3:]], stdout=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _resident(watched))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"dst prepare failed with status {process.returncode}")
    return time.perf_counter() - began, peak / 1e6


def _resident(process: psutil.Process) -> int:
    try:
        return sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dialogs", type=int, default=3000, help="ten a video")
    parser.add_argument("--ticks", type=int, default=8400, help="ticks a dialogue")
    parser.add_argument("--rounds", type=int, default=1, help="how often all of it is repeated")
    arguments = parser.parse_args()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        videos = arguments.dialogs // 10
        for dialogs in (1, 10):
            write_corpus(Path(name) / str(dialogs), videos, dialogs, arguments.ticks)
        peaks: dict[tuple[int, int], float] = {}
        for _ in range(arguments.rounds):
            for workers in sorted({1, cores}):
                for dialogs in (1, 10):
                    out = Path(name) / "labels"
                    seconds, peak = run(Path(name) / str(dialogs), out, workers)
                    rows = pq.ParquetFile(out / "assembly101/frames.parquet").metadata.num_rows
                    peaks[dialogs, workers] = max(peak, peaks.get((dialogs, workers), 0))
                    print(
                        f"{videos * dialogs} dialogues, {rows:,} frames rows, {workers} workers: {seconds:.1f} s, "
                        f"{rows / seconds:,.0f} rows a second, peak {peak:.0f} MB",
                        flush=True,
                    )
        for workers in sorted({1, cores}):
            ratio = peaks[10, workers] / peaks[1, workers]
            print(f"{workers} workers: ten times the dialogues take {ratio:.2f} times the memory")


if __name__ == "__main__":
    main()
