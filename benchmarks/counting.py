"""What a label costs where one causal pass learns from all marks, beside an image that is drawn on and encoded anew.

    python benchmarks/counting.py        # a minute on two cores; where there is a GPU, it takes that

Random models, random features and pixels; images of N objects. What is compared, each with a forward and a backward
pass of the language model for `coord` and one for `done`, as `objective: independent` takes them:

- `all_marks`: features from the cache, all N marks as tokens. The two passes have N labels of coord and N + 1 of done.
- `drawn_anew`: for each task one image with some of the marks drawn in, through vision tower and connector (forward
  alone, the tower learns nothing), then the language model. A label each.
- `from_cache`: the same without the tower, as it is with `token_embed`, or with `drawn` marks on a cache of them.

`operations` are counted while the passes run, multiplications and additions each, of a label; on tensors that hold
nothing for the larger model. `to_all_marks` says how many times more than `all_marks`; `tower_each_step` is what that
would be if `all_marks` too ran the tower in each step, once an image. `seconds` are of a label, in turns A B C A B C on
`tiny-grid`. Resizing, drawing, reading and the optimizers' steps are left out, of which all but `all_marks` have more.

Prints JSON. Seconds are of the wall clock.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.presets import PRESETS
from training.counting.batch import CountingBatch, CountingExample, collate
from training.counting.data import done_shares
from training.counting.model import TASKS, CountingSmolVLM, CountingSmolVLMConfig
from training.counting.recipe import CountingTasks

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PROMPT = 16
"""Tokens before and after the image."""


def make_model(preset: str, marks: str, attention: str) -> CountingSmolVLM:
    """A random model of a preset's dimensions with its vision tower."""
    chosen = PRESETS[preset]
    side = chosen.vision["image_size"] // chosen.vision["patch_size"] // chosen.scale_factor
    config = CountingSmolVLMConfig(
        text_config={**chosen.text, "vocab_size": max(chosen.vocab, 1024), "pad_token_id": 0},
        vision_config=chosen.vision,
        scale_factor=chosen.scale_factor,
        cached_tokens=side * side,
        marks=marks,
        with_vision=True,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    return CountingSmolVLM(config).train()


class Bench:
    """The three ways on images of N objects.

    Args:
        is_counted: made of tensors that hold nothing, with an attention of which each product is counted.
    """

    def __init__(self, preset: str, count: int, images: int, is_counted: bool) -> None:
        self.is_counted, self.count, self.images = is_counted, count, images
        device, attention = ("cpu", "eager") if is_counted else (DEVICE, "sdpa")
        with torch.device(device):
            self.by_tokens, self.by_pictures = (
                make_model(preset, marks, attention) for marks in ("mark_tokens", "drawn")
            )
        vision = self.by_pictures.config.vision_config
        self.pixels = torch.rand(images, 3, vision.image_size, vision.image_size, device=device)
        self.tasks = CountingTasks().active
        self.whole = self._batch(np.arange(count + 1), as_tokens=True).to(device)
        self.single = self._batch(np.array([count // 2]), as_tokens=False).to(device)

    @property
    def labels(self) -> dict[str, int]:
        """Of a step of each way."""
        return {
            "all_marks": self.images * (2 * self.count + 1),
            "drawn_anew": self.images * 2,
            "from_cache": self.images * 2,
        }

    @property
    def ways(self) -> dict[str, Callable[[], None]]:
        return {"all_marks": self.all_marks, "drawn_anew": self.drawn_anew, "from_cache": self.from_cache}

    def all_marks(self) -> None:
        for task in TASKS:
            self._learn(self.by_tokens, self.whole, task)

    def drawn_anew(self) -> None:
        for task in TASKS:
            self.encode()
            self._learn(self.by_pictures, self.single, task)

    def from_cache(self) -> None:
        for task in TASKS:
            self._learn(self.by_pictures, self.single, task)

    @torch.no_grad()
    def encode(self) -> torch.Tensor:
        """Pictures ``[n, 3, S, S]`` through vision tower and connector, part by part: as a whole the tower looks at a
        mask of patches, of which none is masked here."""
        tower = self.by_pictures.model.vision_model
        hidden = tower.embeddings.patch_embedding(self.pixels).flatten(2).transpose(1, 2)
        hidden = hidden + tower.embeddings.position_embedding.weight
        hidden = tower.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        features: torch.Tensor = self.by_pictures.model.connector(tower.post_layernorm(hidden))
        return features

    def _learn(self, model: CountingSmolVLM, batch: CountingBatch, task: str) -> None:
        if self.is_counted:  # what picks rows by weight cannot see weights; the loss costs next to nothing
            with mock.patch.object(CountingBatch, "only", lambda batch, tasks: batch):
                torch.cat([out.flatten() for out in model(batch, (task,)).values()]).sum().backward()
            return
        losses = model.task_losses(
            model(batch, (task,)), batch, self.tasks, model.count_labels(batch, self.tasks)
        )
        losses[task].backward()

    def _batch(self, marked: np.ndarray, as_tokens: bool) -> CountingBatch:
        rng = np.random.default_rng(0)
        config = self.by_tokens.config
        shape = (config.cached_tokens, config.text_config.hidden_size)
        done = done_shares(self.count, (0.5, 0.25, 0.25)) if as_tokens else np.ones(1, np.float32)
        examples = []
        for number in range(self.images):
            points = rng.uniform(-1, 1, (self.count, 2)).astype(np.float32)
            examples.append(
                CountingExample(
                    name=str(number),
                    prompt=list(range(2, PROMPT)),
                    closing=[1, 1],
                    features=rng.normal(size=shape).astype(np.float16),
                    points=points,
                    shown=points if as_tokens else points[:0],
                    marked=marked,
                    coord_weight=(marked < self.count).astype(np.float32),
                    done_weight=done,
                )
            )
        return collate(examples, image_token=1, pad_token=0, as_tokens=as_tokens)


def operations(work: Callable[[], object]) -> int:
    """Multiplications and additions."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def counted(preset: str, counts: Sequence[int]) -> dict[str, Any]:
    """Operations of a label by N, in millions."""
    found: dict[str, Any] = {}
    for count in counts:
        with FakeTensorMode(allow_non_fake_inputs=True):
            bench = Bench(preset, count, 1, is_counted=True)
            each = {name: operations(way) / bench.labels[name] for name, way in bench.ways.items()}
            tower = operations(bench.encode)
        with_tower = each["all_marks"] + tower / bench.labels["all_marks"]
        found[str(count)] = {
            "operations": {name: round(number / 1e6, 1) for name, number in each.items()},
            "to_all_marks": {
                name: round(number / each["all_marks"], 1)
                for name, number in each.items()
                if name != "all_marks"
            },
            "tower_each_step": round(each["drawn_anew"] / with_tower, 1),
        }
    return found


def timed(preset: str, counts: Sequence[int], images: int, rounds: int) -> dict[str, Any]:
    """Seconds of a label by N: medians over the rounds, and of the ratios within them."""
    found: dict[str, Any] = {}
    for count in counts:
        bench = Bench(preset, count, images, is_counted=False)
        for way in bench.ways.values():
            way()
        seconds: dict[str, list[float]] = {name: [] for name in bench.ways}
        for _ in range(rounds):
            for name, way in bench.ways.items():
                seconds[name].append(seconds_of(way) / bench.labels[name])
        found[str(count)] = {
            "seconds": {name: round(statistics.median(each), 6) for name, each in seconds.items()},
            "to_all_marks": {
                name: round(
                    statistics.median(a / b for a, b in zip(each, seconds["all_marks"], strict=True)), 1
                )
                for name, each in seconds.items()
                if name != "all_marks"
            },
        }
    return found


def seconds_of(work: Callable[[], object]) -> float:
    """Until the GPU has done what it was given."""
    if CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[5, 10, 20, 56], help="objects of an image")
    parser.add_argument("--images", type=int, default=8, help="of a step that is timed")
    parser.add_argument("--rounds", type=int, default=7, help="turns of the three ways")
    arguments = parser.parse_args()
    found = {
        "device": torch.cuda.get_device_name() if CUDA else platform.processor(),
        "torch": torch.__version__,
        "tiny-grid": {
            "counted": counted("tiny-grid", arguments.counts),
            "timed": timed("tiny-grid", arguments.counts, arguments.images, arguments.rounds),
        },
        "smolvlm2-500m": {"counted": counted("smolvlm2-500m", arguments.counts)},
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
