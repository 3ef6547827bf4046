"""Images of a cache, with their points, as rows to learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.shards import LabelledSession, ShardCache
from schemas.errors import UserError
from training.counting.batch import CountingBatch, CountingExample, collate
from training.counting.recipe import Encoding


@dataclass(frozen=True)
class ImageData:
    """One image; its features stay in the cache's files. ``points`` float32 ``[N, 2]`` in -1..1, as they are marked."""

    cache: ShardCache
    labels: LabelledSession
    points: NDArray[np.float32]
    blind: bool

    @property
    def session_id(self) -> str:
        return self.labels.session_id

    @property
    def goal(self) -> str:
        return str(self.labels.meta["goal"])

    def features(self, marked: int = 0) -> NDArray[Any]:
        """Cached features ``[T, H]`` of the image, with so many marks drawn in where the cache has such; zeros for a
        blind run."""
        features = self.cache.features(self.labels.meta["video_id"], marked, 1)[0]
        return np.zeros_like(features) if self.blind else features


def load_images(cache: ShardCache, split: str, marks: Encoding, blind: bool = False) -> list[ImageData]:
    """All images of a split, in order of id.

    Raises:
        UserError: the cache has none, or not with marks as the model takes them.
    """
    sessions = [cache.session(session_id) for session_id in cache.session_ids]
    counted = [session for session in sessions if session.points is not None]
    if not counted:
        raise UserError(f"{cache.folder} holds no images to count in; prepare and cache some, such as fsc147")
    drawn = {session.meta["marks"] == "drawn" for session in counted}
    if (marks == "drawn") not in drawn or len(drawn) > 1:
        how = "--marks drawn" if marks == "drawn" else "--marks none"
        raise UserError(
            f"the images in {cache.folder} are not all as model.marks={marks} needs them; prepare them with {how} and "
            "cache them again"
        )
    found = [_image(cache, session, blind) for session in counted if session.meta["split"] == split]
    if not found:
        raise UserError(f"{cache.folder} has no image of the split {split!r}; prepare and cache some")
    return found


def _image(cache: ShardCache, labels: LabelledSession, blind: bool) -> ImageData:
    rows = sorted(labels.points or [], key=lambda row: row["point"])
    points = np.array([(row["x"], row["y"]) for row in rows], np.float32).reshape(-1, 2)
    return ImageData(cache, labels, points, blind)


def room_for(tokens: int) -> int:
    """Objects that an image of so many tokens has room for: of more, several share a token, hard to tell apart."""
    return int(0.8 * tokens)


class CountingPrompt:
    """Writes what is asked of an image, with a checkpoint's own tokenizer and chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.image_token, self.pad_token = tokenizer.convert_tokens_to_ids("<image>"), tokenizer.pad_token_id
        if self.image_token is None or self.image_token == tokenizer.unk_token_id:
            raise UserError("the checkpoint's tokenizer has no <image> token; give a SmolVLM2 checkpoint")
        self._written: dict[str, tuple[list[int], list[int]]] = {}

    @classmethod
    def of(cls, folder: Path) -> CountingPrompt:
        """With the tokenizer of a checkpoint."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(folder))

    def write(self, goal: str) -> tuple[list[int], list[int]]:
        """Tokens before and after the image, of a user's message that names what to mark."""
        if goal not in self._written:
            parts = [{"type": "text", "text": f"Mark each: {goal}"}, {"type": "image"}]
            text = self.tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
            before, image, after = str(text).rpartition("<image>")
            if not image:
                raise UserError(
                    "the checkpoint's chat template leaves images out; give a SmolVLM2 checkpoint"
                )
            encoded = (list(self.tokenizer.encode(t, add_special_tokens=False)) for t in (before, after))
            self._written[goal] = (next(encoded), next(encoded))
        return self._written[goal]

    def collate(self, examples: Sequence[CountingExample], marks: Encoding) -> CountingBatch:
        """Examples as a batch of a model with marks of that kind."""
        return collate(examples, self.image_token, self.pad_token, as_tokens=marks == "mark_tokens")


def full_example(image: ImageData, prompt: CountingPrompt, shares: Sequence[float]) -> CountingExample:
    """An image with all its marks as tokens, labelled after each of them.

    Every number of marks counts as much as `sampled_examples` takes it on average: those of ``coord`` alike, those of
    ``done`` by their shares.
    """
    count = len(image.points)
    weights = coord_shares(count), done_shares(count, shares)
    return _example(image, prompt, np.arange(count + 1), image.points, *weights)


def examples_of(
    image: ImageData, prompt: CountingPrompt, shares: Sequence[float], marks: Encoding
) -> Iterator[CountingExample]:
    """An image with every number of marks, each counting as in `full_example`: in one row where marks are tokens."""
    if marks == "mark_tokens":
        yield full_example(image, prompt, shares)
        return
    coord, done = coord_shares(len(image.points)), done_shares(len(image.points), shares)
    for number in range(len(done)):
        here = slice(number, number + 1)
        yield marked_example(image, prompt, marks, number, coord[here], done[here])


def coord_shares(count: int) -> NDArray[np.float32]:
    """How often each number of marks 0..N is shown to the coord head, ``[N + 1]``: all alike but N."""
    weights = np.zeros(count + 1, np.float32)
    weights[:count] = 1 / max(1, count)
    return weights


def done_shares(count: int, shares: Sequence[float]) -> NDArray[np.float32]:
    """How often each number of marks 0..N is shown to the done head, ``[N + 1]``; without objects, always 0 marks."""
    at_end, before_end, anywhere = shares
    weights = np.full(count + 1, anywhere / (count + 1))
    weights[count] += at_end
    weights[max(0, count - 1)] += before_end
    return weights.astype(np.float32)


def sampled_examples(
    image: ImageData,
    prompt: CountingPrompt,
    shares: Sequence[float],
    marks: Encoding,
    rng: np.random.Generator,
) -> dict[str, CountingExample]:
    """An image with one number of marks for each task: for ``coord`` any of 0..N-1, for ``done`` by `done_shares`.

    Args:
        marks: ``token_embed`` or ``drawn``.

    Returns:
        One example for ``done``, and where there is an object, one for ``coord``.
    """
    count = len(image.points)
    probabilities = done_shares(count, shares).astype(np.float64)
    chosen = {"done": int(rng.choice(count + 1, p=probabilities / probabilities.sum()))}
    if count:
        chosen["coord"] = int(rng.integers(count))
    one, none = np.ones(1, np.float32), np.zeros(1, np.float32)
    return {
        task: marked_example(
            *(image, prompt, marks, number), *((one, none) if task == "coord" else (none, one))
        )
        for task, number in chosen.items()
    }


def marked_example(
    image: ImageData,
    prompt: CountingPrompt,
    marks: Encoding,
    number: int,
    coord_weight: NDArray[np.float32],
    done_weight: NDArray[np.float32],
) -> CountingExample:
    """An image with its first so many marks, read once."""
    drawn = number if marks == "drawn" else 0
    return _example(
        image, prompt, np.array([number]), image.points[:number], coord_weight, done_weight, drawn
    )


def _example(
    image: ImageData,
    prompt: CountingPrompt,
    marked: NDArray[np.int64],
    shown: NDArray[np.float32],
    coord_weight: NDArray[np.float32],
    done_weight: NDArray[np.float32],
    drawn: int = 0,
) -> CountingExample:
    before, after = prompt.write(image.goal)
    return CountingExample(
        name=image.session_id,
        prompt=before,
        closing=after,
        features=image.features(drawn),
        points=image.points,
        shown=shown,
        marked=marked,
        coord_weight=coord_weight,
        done_weight=done_weight,
    )


def noisy(example: CountingExample, deviation: float, rng: np.random.Generator) -> CountingExample:
    """The same with its marks a little off, as a rollout's own are.

    Args:
        deviation: as a share of the image's side.
    """
    off = rng.normal(0, 2 * deviation, example.shown.shape).astype(np.float32)
    return replace(example, shown=np.clip(example.shown + off, -1, 1))
