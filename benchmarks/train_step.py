"""What a step of `dst train` costs beside the bare language model, and what cached features buy.

    python benchmarks/train_step.py        # four minutes on two cores; where there is a GPU, it takes that

Makes a synthetic corpus with its videos, a random checkpoint (`tiny` on a CPU, the dimensions of SmolVLM2-500M on a
GPU) and the feature cache. Then, in turns within one run of `train` each, so that all suffer alike from other work:

- `step`: a whole step (reading, collating, mask, heads, losses, backward, clipping, AdamW, log), and forward and
  backward passes of the same language model alone: on random embeddings, causal, in rows that are full, as many tokens
  as the step's windows have (padding left out), in as many passes. Rows of the windows' mean length have about the
  windows' own attention; rows of `max_seq_len` have more. In a second run each part of the step by itself.
- `one_sample_a_tick`: the same model trained on one sample a tick, the window of the 64 ticks up to it with that
  tick's labels alone, against windows of 64 ticks with all their labels.
- `end_to_end`: steps on windows of 64 ticks with cached features, with the vision tower run in each step on frames
  that lie in memory at the tower's size, and with their decoding too. `break_even_epochs`: how many epochs of each are
  as long as caching first (decoding, tower and writing) and as many epochs on the cache.

Prints JSON. Seconds are of the wall clock; those of `parts` are of a step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from pipeline.cache import cache_features
from pipeline.engines import Here
from pipeline.prepare import prepare
from pipeline.presets import init_model
from pipeline.sample.corpus import write_sample
from pipeline.shards import ShardCache
from pipeline.todo import CacheOptions
from pipeline.vision import VisionEncoder
from pipeline.workers import available_cores
from schemas.clock import Clock
from training import objective
from training.batch import Batch, collate
from training.data import SessionData, load_sessions, make_example
from training.dialog import build
from training.model import DSTSmolVLM
from training.optim import make_optimizer
from training.recipe import Recipe, load_recipe
from training.sampler import TrainingSteps
from training.tasks import count_labels, task_losses
from training.trainer import train

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TICK_HZ = 2.0
WINDOW_TICKS = 64
Frames = NDArray[np.uint8]


def now() -> float:
    """Seconds, once the GPU has done what it was given."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(work: Callable[[], object]) -> float:
    began = now()
    work()
    return now() - began


@dataclass(frozen=True)
class Size:
    """What one step of a recipe has: passes, windows and their tokens, ticks, positions with the padding."""

    epoch: int
    passes: int
    windows: int
    tokens: int
    ticks: int
    positions: int
    data_seconds: float  # for reading and collating it


@dataclass(frozen=True)
class Made:
    """Corpus, checkpoint and cache; ``extraction_s`` is what caching a tick took, all in all."""

    root: Path
    shards: Path
    model: Path
    encoder: VisionEncoder
    extraction_s: float


def make(root: Path, preset: str, sessions: int) -> Made:
    init_model(preset, root / "model")
    write_sample("assembly101", root / "corpus", sessions=sessions, seed=3)
    prepare("assembly101", root / "corpus", root / "labels", Clock(TICK_HZ))
    encoder = VisionEncoder(root / "model", DEVICE, batch_size=WINDOW_TICKS)
    encoder.encode(np.zeros((2, encoder.preprocessor.square, encoder.preprocessor.square, 3), np.uint8))
    began = now()
    summary = cache_features(
        root / "labels", root / "shards", Here(encoder), CacheOptions(workers=available_cores())
    )
    return Made(root, root / "shards", root / "model", encoder, (now() - began) / summary.ticks)


def sizes_of(recipe: Recipe, made: Made) -> Iterator[Size]:
    """All steps of a run, one after the other, without end."""
    cache = ShardCache(made.shards)
    _, builder = build(recipe, cache)
    steps = iter(TrainingSteps(load_sessions(cache, "train"), builder, recipe))
    epoch = 0
    while True:
        began = time.perf_counter()
        step = next(steps)
        seconds = time.perf_counter() - began
        yield Size(
            epoch=epoch,
            passes=len(step.passes),
            windows=sum(len(batch.names) for batch in step.passes),
            tokens=sum(int((batch.documents >= 0).sum()) for batch in step.passes),
            ticks=sum(len(batch.tick_at) for batch in step.passes),
            positions=sum(batch.tokens.numel() for batch in step.passes),
            data_seconds=seconds,
        )
        epoch = step.after.epoch


def epochs_of(recipe: Recipe, made: Made, epochs: int) -> list[Size]:
    """The steps of the first whole epochs."""
    return list(itertools.takewhile(lambda size: size.epoch < epochs, sizes_of(recipe, made)))


def run_of(
    recipe: Recipe, made: Made, steps: int, between: Callable[[int], None] = lambda number: None
) -> list[float]:
    """Seconds of each whole step of a training run; ``between`` is called after each, out of its time.

    One more step is made, which validates and saves, and is not counted.
    """
    settings = recipe.train.model_copy(
        update={"steps": steps + 1, "eval_every": steps + 1, "save_every": None}
    )
    seconds: list[float] = []
    began = 0.0

    def start(step: int) -> None:
        nonlocal began
        began = now()

    def on_step(row: dict[str, float]) -> None:
        nonlocal began
        seconds.append(now() - began)
        if len(seconds) <= steps:
            between(len(seconds) - 1)
        began = now()

    with tempfile.TemporaryDirectory(dir=made.root) as out:
        recipe = recipe.model_copy(update={"train": settings})
        train(made.shards, recipe, Path(out, "run"), device=DEVICE, on_start=start, on_step=on_step)
    return seconds[:-1]


class Bare:
    """The language model alone: forward on random embeddings that want a gradient, as words' do, and backward."""

    def __init__(self, model: DSTSmolVLM, precision: torch.dtype) -> None:
        self.text = model.model.text_model.to(DEVICE).train()
        self.width = model.config.text_config.hidden_size
        self.precision = precision

    def __call__(self, size: Size, length: int) -> float:
        """Seconds for a step's tokens in rows of a length, in as many passes as the step has.

        The number of rows is the whole one that comes nearest, the seconds are corrected for what that adds or leaves.
        """
        rows = max(1, round(size.tokens / size.passes / length))
        embedded = torch.randn(rows, length, self.width, device=DEVICE, requires_grad=True)
        gradient = torch.randn(rows, length, self.width, device=DEVICE) / (rows * length)
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)  # as a plain loop would
        began = now()
        for _ in range(size.passes):
            self._pass(embedded, gradient)
        seconds = now() - began
        torch.use_deterministic_algorithms(deterministic)
        for parameter in self.text.parameters():
            parameter.grad = None
        return seconds * size.tokens / (size.passes * rows * length)

    def _pass(self, embedded: torch.Tensor, gradient: torch.Tensor) -> None:
        with torch.autocast(DEVICE, self.precision, enabled=CUDA):
            hidden = self.text(inputs_embeds=embedded, use_cache=False).last_hidden_state
        hidden.backward(gradient.to(hidden.dtype))


def whole_step(recipe: Recipe, made: Made, epochs: int, precision: torch.dtype) -> dict[str, Any]:
    """Steps against the bare language model, epoch by epoch; the first epoch warms up."""
    sizes = epochs_of(recipe, made, epochs + 1)
    length = round(sum(size.tokens for size in sizes) / sum(size.windows for size in sizes))
    model, _ = build(recipe, ShardCache(made.shards))
    bare = Bare(model, precision)
    alone: dict[int, list[float]] = {length: [], recipe.data.max_seq_len: []}

    def between(number: int) -> None:
        for row_length, seconds in alone.items():
            seconds.append(bare(sizes[number], row_length))

    whole = run_of(recipe, made, len(sizes), between)
    bare.text.to("cpu")  # it would count in the peak of the memory
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    counted = [number for number, size in enumerate(sizes) if size.epoch]
    by_epoch = {
        row_length: [
            sum(whole[n] for n in counted if sizes[n].epoch == epoch)
            / sum(seconds[n] for n in counted if sizes[n].epoch == epoch)
            for epoch in range(1, epochs + 1)
        ]
        for row_length, seconds in alone.items()
    }
    tokens = sum(sizes[n].tokens for n in counted)
    told = {
        "steps": len(counted),
        "tokens_a_step": round(tokens / len(counted)),
        "passes_a_step": round(sum(sizes[n].passes for n in counted) / len(counted), 1),
        "seconds": round(sum(whole[n] for n in counted) / len(counted), 4),
        "tokens_a_second": round(tokens / sum(whole[n] for n in counted)),
        "bare_seconds_in_rows_of": {
            str(row_length): round(sum(seconds[n] for n in counted) / len(counted), 4)
            for row_length, seconds in alone.items()
        },
        "to_bare_in_rows_of": {
            str(row_length): round(
                sum(whole[n] for n in counted) / sum(alone[row_length][n] for n in counted), 3
            )
            for row_length in by_epoch
        },
        "to_bare_by_epoch": {
            str(row_length): [round(r, 3) for r in ratios] for row_length, ratios in by_epoch.items()
        },
        "mean_window_tokens": length,
        "max_seq_len": recipe.data.max_seq_len,
        "padding": round(1 - tokens / sum(sizes[n].positions for n in counted), 4),
        "parts": parts(recipe, made, sizes, model),
    }
    return told | (on_gpu(model, tokens, sum(whole[n] for n in counted), length) if CUDA else {})


def on_gpu(model: DSTSmolVLM, tokens: int, seconds: float, length: int) -> dict[str, Any]:
    """Floating-point operations that the language model needs, a second; heads and vision are left out."""
    text = model.config.text_config
    weights = sum(p.numel() for name, p in model.model.text_model.named_parameters() if "embed" not in name)
    each = 6 * weights + 6 * text.num_hidden_layers * text.hidden_size * length
    return {
        "tflops": round(each * tokens / seconds / 1e12, 1),
        "peak_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }


def parts(recipe: Recipe, made: Made, sizes: list[Size], model: DSTSmolVLM) -> dict[str, float]:
    """Seconds a step of each part, from a run whose functions are watched; `data` is what reading in this
    process takes, `other` what is left of the step."""
    seconds: dict[str, float] = defaultdict(float)
    watched = {
        "mask": (Batch, "block_mask" if CUDA else "additive_mask"),
        "language model": (type(model.model.text_model), "forward"),
        "model": (DSTSmolVLM, "forward"),
        "losses": (objective, "task_losses"),
        "backward": (Accelerator, "backward"),
        "clip": (torch.nn.utils, "clip_grad_norm_"),
        "optimizer": (torch.optim.AdamW, "step"),
    }
    counted = [number for number, size in enumerate(sizes) if size.epoch]

    each: dict[str, float] = {}

    def between(number: int) -> None:
        if number + 1 == counted[0]:
            seconds.clear()
        if number == counted[-1]:
            each.update({part: seconds[part] / len(counted) for part in watched})

    with ExitStack() as stack:
        for part, (owner, name) in watched.items():
            stack.enter_context(_watched(owner, name, seconds, part))
        whole = run_of(recipe, made, len(sizes), between)
    each["embedding and heads"] = each.pop("model") - each["mask"] - each["language model"]
    data = sum(sizes[n].data_seconds for n in counted) / len(counted)
    waited = 0 if recipe.data.workers else data  # processes of its own read while the step goes on
    other = sum(whole[n] for n in counted) / len(counted) - sum(each.values()) - waited
    each |= {"data": data, "other": other}
    return {part: round(value, 4) for part, value in each.items()}


@contextmanager
def _watched(owner: Any, name: str, seconds: dict[str, float], part: str) -> Iterator[None]:
    original = getattr(owner, name)

    def timed(*arguments: Any, **options: Any) -> Any:
        began = now()
        result = original(*arguments, **options)
        seconds[part] += now() - began
        return result

    with mock.patch.object(owner, name, timed):
        yield


class OneSampleATick:
    """Trains on (window up to a tick, labels of that tick), in random order, with the same model and losses."""

    def __init__(self, recipe: Recipe, made: Made, precision: torch.dtype) -> None:
        cache = ShardCache(made.shards)
        self.recipe, self.precision = recipe, precision
        self.model, self.builder = build(recipe, cache)
        self.model.to(DEVICE).train()
        self.tasks = recipe.tasks.active
        self.optimizer = make_optimizer(dict(self.model.named_parameters()), recipe.train)
        ticks = [
            (session, session.first_tick + n)
            for session in load_sessions(cache, "train")
            for n in range(session.num_ticks)
        ]
        order = np.random.default_rng(0).permutation(len(ticks))
        self.ticks = (ticks[n] for n in itertools.cycle(order))

    def step(self) -> int:
        """One step of the optimizer on as many samples as a step has rows; how many those are."""
        some = list(itertools.islice(self.ticks, self.recipe.data.batch_rows))
        batch = self._batch(some).to(DEVICE)
        totals = count_labels(batch, self.tasks, self.model.config.text_config.vocab_size)
        with torch.autocast(DEVICE, self.precision, enabled=CUDA):
            logits = self.model(batch, heads=tuple(self.tasks))
        losses = task_losses(logits, batch, self.tasks, totals)
        torch.stack([self.tasks[name].weight * loss for name, loss in losses.items()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.train.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return len(some)

    def _batch(self, some: list[tuple[SessionData, int]]) -> Batch:
        examples = []
        for session, tick in some:
            first = max(session.first_tick, tick + 1 - self.recipe.data.window_ticks)
            plan = (first, tick + 1 - first, session.state_before(first), session.words)
            examples.append(make_example(session, self.builder, *plan))
        return last_ticks(collate(examples, None, self.builder.pad_token))


def last_ticks(batch: Batch) -> Batch:
    """A batch of one window a row, with the labels of each window's last tick alone."""
    window = batch.window_of_tick
    last = torch.cat([window[1:] != window[:-1], torch.ones(1, dtype=torch.bool)])
    row = batch.response_at // batch.tokens.shape[1]
    spoken = batch.response_at >= batch.tick_at[last][row]
    return replace(
        batch,
        tick_at=batch.tick_at[last],
        window_of_tick=torch.arange(len(batch.names)),
        speaking=batch.speaking[last],
        dst_update=batch.dst_update[last],
        dst_state=batch.dst_state[last],
        near=batch.near[last],
        response_at=batch.response_at[spoken],
        response=batch.response[spoken],
    )


class Reader:
    """Stands in for the cache: features of ticks that are encoded when they are asked for."""

    def __init__(self, made: Made) -> None:
        self.encoder = made.encoder
        self.cached = ShardCache.features
        self.mode = "cached"
        cache = ShardCache(made.shards)
        sessions = [s for split in ("train", "val") for s in load_sessions(cache, split)]
        self.uris = {str(s.labels.meta["video_id"]): str(s.labels.meta["uri"]) for s in sessions}
        ends = {v: max(s.first_tick + s.num_ticks for s in sessions if _video(s) == v) for v in self.uris}
        self.frames = {video: self.decoded(video, 0, end) for video, end in ends.items()}
        for session in sessions[:3]:
            asked = (cache, _video(session), session.first_tick + session.num_ticks // 2, 8)
            features = {mode: self._read(mode, *asked).astype(np.float32) for mode in _MODES}
            for mode in _MODES[1:]:
                np.testing.assert_allclose(features[mode], features["cached"], rtol=0.02, atol=0.02)

    def read(self, cache: ShardCache, video: str, first: int, ticks: int) -> NDArray[Any]:
        return self._read(self.mode, cache, video, first, ticks)

    def _read(self, mode: str, cache: ShardCache, video: str, first: int, ticks: int) -> NDArray[Any]:
        if mode == "cached":
            return self.cached(cache, video, first, ticks)
        if mode == "tower":
            return self.encoder.encode(self.frames[video][first : first + ticks])
        return self.encoder.encode(self.decoded(video, first, ticks))

    def decoded(self, video: str, first: int, ticks: int) -> Frames:
        """Frames of ticks at the tower's size, decoded by one thread from the key frame before the first on."""
        found: list[Frames] = []
        with av.open(self.uris[video]) as container:
            # threads of its own may call for Python's lock to log while closing waits for them
            container.streams.video[0].thread_type = "SLICE"
            container.streams.video[0].codec_context.thread_count = 1
            container.seek(int(first / TICK_HZ * av.time_base))
            shown: Any = None
            for frame in container.decode(video=0):
                while shown is not None and (first + len(found)) / TICK_HZ < frame.time:
                    found.append(self.encoder.preprocessor.resize(shown.to_ndarray(format="rgb24")))
                    if len(found) == ticks:
                        return np.stack(found)
                shown = frame
            last = self.encoder.preprocessor.resize(shown.to_ndarray(format="rgb24"))
        return np.stack([*found, *[last] * (ticks - len(found))])  # the last one is shown to its end


_MODES = ("cached", "tower", "decoding and tower")


def _video(session: SessionData) -> str:
    return str(session.labels.meta["video_id"])


def against_others(
    recipe: Recipe, made: Made, rounds: int, precision: torch.dtype
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One run whose steps read the cache, run the tower, and decode, in turns; naive steps after each round."""
    reader, naive = Reader(made), OneSampleATick(recipe, made, precision)
    steps = rounds * len(_MODES)
    sizes = list(itertools.islice(sizes_of(recipe, made), steps))
    naive_samples, naive_seconds = [0], [0.0]
    naive.step()

    def between(number: int) -> None:
        reader.mode = _MODES[(number + 1) % len(_MODES)]
        if reader.mode == "cached":
            for _ in range(3):
                naive_seconds.append(seconds_of(lambda: naive_samples.append(naive.step())))

    with mock.patch.object(ShardCache, "features", lambda *asked: reader.read(*asked)):
        whole = run_of(recipe, made, steps, between)
    a_tick = {}
    for turn, mode in enumerate(_MODES):
        own = range(turn + len(_MODES), steps, len(_MODES))  # the first round warms up
        a_tick[mode] = sum(whole[n] for n in own) / sum(sizes[n].ticks for n in own)
    naive_tick = sum(naive_seconds[4:]) / sum(naive_samples[4:])
    return (
        {
            "window_ticks": recipe.data.window_ticks,
            "ticks_a_second": round(1 / a_tick["cached"]),
            "naive_ticks_a_second": round(1 / naive_tick, 1),
            "ratio": round(naive_tick / a_tick["cached"], 1),
        },
        {
            "milliseconds_a_tick": {mode: round(1e3 * value, 3) for mode, value in a_tick.items()},
            "extraction_milliseconds_a_tick": round(1e3 * made.extraction_s, 3),
            "to_cached": {mode: round(a_tick[mode] / a_tick["cached"], 2) for mode in _MODES[1:]},
            "break_even_epochs": {
                mode: round(made.extraction_s / (a_tick[mode] - a_tick["cached"]), 2) for mode in _MODES[1:]
            },
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="smolvlm2-500m" if CUDA else "tiny", help="of 'dst init-model'")
    parser.add_argument("--recipe", default="smolvlm2-500m-24gb" if CUDA else "tiny", help="name or file")
    parser.add_argument("--set", action="append", default=[], help="key=value in the recipe; may be repeated")
    parser.add_argument("--sessions", type=int, default=120, help="of the corpus")
    parser.add_argument("--epochs", type=int, default=3, help="that steps are compared with the bare model")
    parser.add_argument("--rounds", type=int, default=6, help="of cached, tower, decoding")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in the precision it trains in")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be 2 or more: the first one warms up")
    precision = torch.bfloat16 if CUDA and torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    with tempfile.TemporaryDirectory() as name:
        made = make(Path(name), arguments.preset, arguments.sessions)
        given = [f"model.init={made.model}", *arguments.set]
        recipe = load_recipe(arguments.recipe, given)
        longer = load_recipe(
            arguments.recipe, [*given, f"data.window_ticks={WINDOW_TICKS}", "data.workers=0"]
        )
        step = whole_step(recipe, made, arguments.epochs, precision)
        naive, end_to_end = against_others(longer, made, arguments.rounds, precision)
    if CUDA and arguments.peak_tflops:
        step["of_peak"] = round(step["tflops"] / arguments.peak_tflops, 3)
    chip = torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine()
    told = {
        "chip": chip,
        "threads": torch.get_num_threads(),
        "preset": arguments.preset,
        "recipe": " ".join([arguments.recipe, *arguments.set]),
        "step": step,
        "one_sample_a_tick": naive,
        "end_to_end": end_to_end,
    }
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
