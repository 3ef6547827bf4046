"""A trained counter on pictures: where the next object is, whether all are marked, and how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.quantize import as_cached
from pipeline.stills import Point, draw_marks, read_picture
from pipeline.streams import DecodeError
from pipeline.vision import VisionEncoder
from schemas.errors import UserError
from training.assistant import encoder_of
from training.checkpoint import checkpoint_to_use
from training.counting.batch import CountingExample
from training.counting.data import CountingPrompt, room_for
from training.counting.model import TASKS, CountingSmolVLM
from training.counting.recipe import CountingRecipe
from training.counting.rollout import Subject, roll_out
from training.model import load_checkpoint
from training.runs import counting_recipe

Picture = NDArray[np.uint8] | str | Path
"""RGB uint8 ``[H, W, 3]``, upright, or the path of a picture."""


@dataclass(frozen=True)
class Counted:
    """What a counter found in one picture.

    Attributes:
        marks: x and y in pixels, in the order they were made.
        done: probability of all being marked, before each mark and after the last.
        is_cut_off: whether it ended since it may make no more marks, and does not believe to be done.
    """

    marks: list[tuple[float, float]]
    done: list[float]
    is_cut_off: bool

    @property
    def count(self) -> int:
        return len(self.marks)


class Counter:
    """Counts what it is asked for in a picture, by marking one after the other.

        counter = Counter.load(Path("out/runs/counting"))
        counter.count("discs.jpg", "red discs").count
        counter.predict_coordinates("discs.jpg", [(31, 40), (102, 38)], "red discs")

    Marks are x and y in pixels of the picture, in the order they were made. Pictures go the way of the feature cache
    that it was trained on, so that it says of them what it says of the cache. What to count may be left away where it
    was trained on one category.
    """

    def __init__(self, model: CountingSmolVLM, prompt: CountingPrompt, encoder: VisionEncoder) -> None:
        self.model, self.prompt, self.encoder = model.eval(), prompt, encoder

    @classmethod
    def load(cls, source: Path, checkpoint: str | None = None, device: str = "cpu") -> Counter:
        """From a run of `dst train`, by default its ``best_joint`` checkpoint, or a folder that `dst export` wrote.

        Raises:
            UserError: neither of both, not of counting, or a blind one; no such checkpoint, or its vision tower is not
                to be had.
        """
        folder = checkpoint_to_use(source, checkpoint, CountingRecipe.best)
        if counting_recipe(source, "counting in a picture").data.blind:
            raise UserError(f"{source} is a blind control, which has never seen a picture; give another run")
        model = load_checkpoint(CountingSmolVLM, folder).to(device)
        encoder = encoder_of(folder, model, device, model.config.tiles)
        return cls(model, CountingPrompt.of(folder), encoder)

    @property
    def most(self) -> int:
        """Objects that a picture has room for, as `training.counting.data.room_for`."""
        return room_for(self.model.config.cached_tokens)

    def predict_coordinates(
        self, image: Picture, marks: Sequence[Point], what: str | None = None
    ) -> tuple[float, float]:
        """Where the next object is, x and y in pixels.

        Raises:
            UserError: as `predict`.
        """
        picture = pixels_of(image)
        out = self._look(picture, marks, what, ("coord",))
        return in_pixels(out["coord"][0].tolist(), picture)

    def predict_done(self, image: Picture, marks: Sequence[Point], what: str | None = None) -> float:
        """The probability that all objects are marked.

        Raises:
            UserError: as `predict`.
        """
        return float(self._look(pixels_of(image), marks, what, ("done",))["done"].sigmoid())

    def predict(
        self, image: Picture, marks: Sequence[Point], what: str | None = None
    ) -> tuple[tuple[float, float], float]:
        """`predict_coordinates` and `predict_done` in one pass.

        Raises:
            UserError: no picture, or a mark that does not lie in it.
        """
        picture = pixels_of(image)
        out = self._look(picture, marks, what, TASKS)
        return in_pixels(out["coord"][0].tolist(), picture), float(out["done"].sigmoid())

    def count(self, image: Picture, what: str | None = None) -> Counted:
        """Mark one object after the other, until all are believed to be marked, or ``max_marks`` of its recipe.

        Raises:
            UserError: no picture, or a checkpoint from before the first validation.
        """
        threshold, picture = threshold_of(self.model.config), pixels_of(image)
        [rollout] = roll_out(
            self.model, self.prompt, [self.subject(picture, self.category(what))], until=threshold
        )
        marks = [in_pixels(mark, picture) for mark in rollout.marks]
        return Counted(marks, rollout.done, is_cut_off=rollout.done[-1] < threshold)

    def category(self, what: str | None) -> str:
        """What to count: as given, or the only category it was trained on.

        Raises:
            UserError: nothing was given, and there are several.
        """
        if what is not None and what.strip():
            return what
        goals = self.model.config.goals or []
        if what is None and len(goals) == 1:
            return goals[0]
        raise UserError(
            f"it was trained on {len(goals)} categories, such as {', '.join(goals[:3])}; name the one to count"
        )

    def subject(self, image: Picture, what: str) -> Subject:
        """A picture to roll out on; one that is given by its path is read each time it is looked at."""

        def look(marks: NDArray[np.float32]) -> NDArray[np.float16]:
            picture = pixels_of(image)
            drawn = marks if self.model.config.marks == "drawn" else marks[:0]
            return self.features(picture, [in_pixels(mark, picture) for mark in drawn])

        return Subject(what, look)

    def features(self, picture: NDArray[np.uint8], drawn: Sequence[Point] = ()) -> NDArray[np.float16]:
        """What a cache would hold of a picture with these marks drawn in, ``[T, H]``."""
        shown = self.encoder.preprocessor.resize(draw_marks(picture, drawn, len(drawn)))
        kept: Any = self.model.config.vision["dtype"]
        return as_cached(self.encoder.encode(shown[None]), kept, "the picture")[0]

    @torch.inference_mode()
    def _look(
        self, picture: NDArray[np.uint8], marks: Sequence[Point], what: str | None, heads: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        places = _as_places(marks, picture)
        drawn = self.model.config.marks == "drawn"
        before, after = self.prompt.write(self.category(what))
        no_label = np.zeros(1, np.float32)
        example = CountingExample(
            name="",
            prompt=before,
            closing=after,
            features=self.features(picture, marks if drawn else ()),
            points=places[:0],
            shown=places,
            marked=np.array([len(places)]),
            coord_weight=no_label,
            done_weight=no_label,
        )
        batch = self.prompt.collate([example], self.model.config.marks).to(self.model.device)
        return self.model(batch, heads)


def threshold_of(config: Any) -> float:
    """The probability from which all are marked, as it was chosen in training.

    Raises:
        UserError: none was: the checkpoint is from before the first validation.
    """
    if config.done_threshold is None:
        raise UserError(
            "the checkpoint has no threshold: it was saved before the first validation; train on, or give another"
        )
    return float(config.done_threshold)


def pixels_of(image: Picture) -> NDArray[np.uint8]:
    """RGB uint8 ``[H, W, 3]``.

    Raises:
        UserError: the file is not there or holds no whole picture, or it is another array.
    """
    if isinstance(image, str | Path):
        try:
            return read_picture(image)
        except DecodeError as error:
            raise UserError(f"{error}; give a whole JPEG, PNG, WebP or BMP picture") from None
    if not isinstance(image, np.ndarray):
        raise UserError(f"a picture is a path, or RGB uint8 [H, W, 3], not {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(f"a picture is RGB uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    return image


def _as_places(marks: Sequence[Point], picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels to -1..1, ``[k, 2]``."""
    height, width = picture.shape[:2]
    try:
        pixels = np.array(marks, np.float64)
    except (TypeError, ValueError):
        pixels = np.empty(0)
    if len(marks) and pixels.shape != (len(marks), 2):
        raise UserError(f"marks are pairs of x and y in pixels, not {str(list(marks))[:80]}")
    pixels = pixels.reshape(-1, 2)
    inside = ((pixels >= 0) & (pixels <= (width, height))).all(1)
    if not inside.all():
        number = int(np.flatnonzero(~inside)[0])
        x, y = pixels[number]
        raise UserError(
            f"mark {number + 1} at ({x:g}, {y:g}) does not lie in the picture of {width} x {height} pixels; give x and "
            "y in pixels from its upper left corner"
        )
    return (2 * pixels / (width, height) - 1).astype(np.float32)


def in_pixels(place: Sequence[float], picture: NDArray[np.uint8]) -> tuple[float, float]:
    height, width = picture.shape[:2]
    x, y = place
    return (float(x) + 1) / 2 * width, (float(y) + 1) / 2 * height
