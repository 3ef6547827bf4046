"""What a tick of the live assistant costs: early and late in a stream, beside the bare language model, and in memory.

    python benchmarks/stream.py        # six minutes on two cores; where there is a GPU, it takes that

Random checkpoints (the dimensions of `tiny`, and of SmolVLM2-500M), random features. Turn by turn in one run:

- `late_to_early`: ticks 5952 to 6015 of a stream (tick 6,000 among them) beside ticks 0 to 63 (tick 60) of another
  that begins just then, tick by tick in turns: medians of the ratio over windows.
- `to_bare`: a tick beside a forward pass of the same language model on as many tokens, on a cache of keys and values of
  the same length, without mask, heads or gate. The assistant is silent in both, so both have the same tokens.
- `memory`: what the process has grown by between tick 2,000 and tick 21,600, three hours at 2 Hz, with words said.
- `real_time`: seconds that a tick takes with decoding left out (resizing, vision tower, language model, heads), as a
  share of the half second that there is; words come on top, `word_s` each.

Prints JSON. Seconds are of the wall clock.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import DynamicCache

from pipeline.presets import init_model
from pipeline.vision import VisionEncoder
from schemas.task import Task
from training.assistant import Assistant
from training.gate import Thresholds
from training.model import DSTSmolVLM, from_backbone
from training.sequence import SequenceBuilder

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
WINDOW_TICKS = 64
TASK = Task("Assemble the toy", tuple(f"attach part {number}" for number in range(8)))
SILENT = Thresholds(2.0, 0.5)


def timed(do: Callable[[], Any]) -> float:
    """Seconds, until the GPU has done what it was given."""
    if CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    do()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Bench:
    def __init__(self, preset: str, folder: Path) -> None:
        init_model(preset, folder, seed=0)
        self.encoder = VisionEncoder(folder, DEVICE, batch_size=1)
        changes: dict[str, Any] = {
            "cached_tokens": self.encoder.tokens_per_frame,
            "window_ticks": WINDOW_TICKS,
            "vision": {"dtype": "float16"},
        }
        self.model: DSTSmolVLM = from_backbone(folder, changes, seed=0).to(DEVICE).eval()
        self.builder = SequenceBuilder.of(folder, self.model.config)
        shape = (WINDOW_TICKS, self.encoder.tokens_per_frame, self.encoder.dim)
        self.features = np.random.default_rng(0).normal(size=shape).astype(np.float16)

    def assistant(self, thresholds: Thresholds = SILENT) -> Assistant:
        return Assistant(self.model, self.builder, TASK, self.encoder, thresholds)

    def see(self, assistant: Assistant) -> float:
        features = self.features[assistant.next_tick % WINDOW_TICKS]
        return timed(lambda: assistant.see(features))

    def late_to_early(self, windows: int) -> dict[str, float]:
        late = self.assistant()
        while late.next_tick < 5952:
            late.see(self.features[late.next_tick % WINDOW_TICKS])
        ratios, seconds = [], []
        for _ in range(windows):
            early, pairs = self.assistant(), []
            for tick in range(WINDOW_TICKS):
                pairs.append(
                    (self.see(early), self.see(late)) if tick % 2 else (self.see(late), self.see(early))[::-1]
                )
            ratios.append(statistics.median(b for _, b in pairs) / statistics.median(a for a, _ in pairs))
            seconds.append(statistics.median(a for a, _ in pairs))
        return {"ratio": round(statistics.median(ratios), 3), "tick_s": round(statistics.median(seconds), 5)}

    @torch.inference_mode()
    def to_bare(self, windows: int) -> dict[str, float]:
        header = len(self.builder.window(TASK.goal, TASK.steps, np.zeros(8, np.int8), 0, 0, []).tokens)
        tokens = self.model.config.visual_tokens
        width = self.model.config.text_config.hidden_size
        random = torch.randn(1, header, width, device=DEVICE)
        ratios = []
        for _ in range(windows):
            assistant, cache = self.assistant(), DynamicCache()
            text = self.model.model.text_model

            def bare(count: int, cache: Any = cache, text: Any = text) -> float:
                return timed(
                    lambda: text(inputs_embeds=random[:, :count], past_key_values=cache, use_cache=True)
                )

            bare(header)
            assistant.see(self.features[0])
            bare(tokens)
            pairs = [
                (bare(tokens), self.see(assistant)) if tick % 2 else (self.see(assistant), bare(tokens))[::-1]
                for tick in range(1, WINDOW_TICKS)
            ]
            ratios.append(statistics.median(b for _, b in pairs) / statistics.median(a for a, _ in pairs))
        return {"ratio": round(statistics.median(ratios), 3)}

    def memory(self, ticks: int) -> dict[str, float]:
        assistant = self.assistant(Thresholds(0.0, 0.5, min_gap_ticks=20))
        process, sizes = psutil.Process(), {}
        while assistant.next_tick < ticks:
            assistant.see(self.features[assistant.next_tick % WINDOW_TICKS])
            if assistant.next_tick in (2000, ticks):
                sizes[assistant.next_tick] = process.memory_info().rss
        return {
            "growth_mb": round((sizes[ticks] - sizes[2000]) / 1e6, 1),
            "all_mb": round(sizes[ticks] / 1e6),
        }

    def real_time(self, ticks: int) -> dict[str, float]:
        frames = np.random.default_rng(1).integers(0, 255, size=(4, 720, 1280, 3), dtype=np.uint8)
        assistant = self.assistant()
        times = [
            timed(lambda tick=tick: assistant.step(frames[tick % 4], tick / 2.0))  # type: ignore[misc]
            for tick in range(ticks + 2)
        ][2:]
        talker = self.assistant(Thresholds(0.0, 2.0))
        talker.see(self.features[0])
        silent = statistics.median(self.see(self.assistant()) for _ in range(2))
        spoken = timed(lambda: talker.see(self.features[1]))
        return {
            "tick_s": round(statistics.median(times), 4),
            "share_of_half_a_second": round(statistics.median(times) / 0.5, 4),
            "word_s": round(max(0.0, spoken - silent) / 64, 4),  # an untrained model says all 64 tokens
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--windows", type=int, default=5, help="64 ticks each, of which medians are taken")
    parser.add_argument("--hours", type=float, default=3.0, help="of the stream whose memory is watched")
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else platform.processor(),
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as temporary:
        tiny = Bench("tiny", Path(temporary) / "tiny")
        found["tiny"] = {
            "late_to_early": tiny.late_to_early(arguments.windows),
            "to_bare": tiny.to_bare(arguments.windows),
            "memory": tiny.memory(round(arguments.hours * 7200)),
            "real_time": tiny.real_time(30),
        }
        large = Bench("smolvlm2-500m", Path(temporary) / "large")
        found["smolvlm2-500m"] = {"to_bare": large.to_bare(1), "real_time": large.real_time(8)}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
