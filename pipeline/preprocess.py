"""A frame to the square picture that the vision tower takes. What imports this need not load torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from schemas.errors import UserError

if TYPE_CHECKING:
    from schemas.shards import Filter

_FILTERS: dict[Filter, int] = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Preprocessor:
    """What SmolVLM's image processor does to one frame when it does not split it into tiles.

    Two resizes, first to ``longest_edge`` with the aspect kept, then to a ``square``; after that
    ``(value / 255 - mean) / std``. The first resize upscales small frames, as the processor does.

    With ``tiles`` n the picture is n times as large each way, so that n x n tiles of a ``square`` can be cut from it;
    the first resize is then to no less than that, or it would lose what the tiles are to show. Of a square picture
    these are the processor's tiles where that splits it into n x n.

    The filter ``lanczos`` is PIL's, which the released checkpoints ask for: exactly the processor's pixels.
    ``bicubic`` is torch's, which takes a quarter of the time: within 2 of 255 of PIL's bicubic, where that too goes
    first horizontally, then vertically (newer versions of PIL turn it round for tall pictures).
    """

    longest_edge: int
    square: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float
    filter: Filter = "lanczos"
    tiles: int = 1

    @classmethod
    def read(cls, folder: Path, filter: Filter = "lanczos", tiles: int = 1) -> Preprocessor:
        """From a checkpoint's ``preprocessor_config.json``.

        A checkpoint that asks for Lanczos may be given bicubic, which comes near it; one that asks for bicubic is
        not given Lanczos.

        Raises:
            UserError: the file is missing, lacks something, or asks for a filter that ``filter`` does not stand for.
        """
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            raise UserError(
                f"{folder} has no preprocessor_config.json; give a SmolVLM2 checkpoint with --model"
            )
        raw = read_config(path)
        lacking = {"size", "max_image_size", "image_mean", "image_std"} - raw.keys()
        lacking |= {key for key in ("size", "max_image_size") if "longest_edge" not in raw.get(key, {})}
        if lacking:
            raise UserError(
                f"{path} lacks {min(lacking)}, or its longest_edge; give a SmolVLM2 checkpoint with --model"
            )
        _check_filter(filter, raw.get("resample", _FILTERS["lanczos"]), path)
        return cls(
            longest_edge=raw["size"]["longest_edge"],
            square=raw["max_image_size"]["longest_edge"],
            mean=tuple(raw["image_mean"]),
            std=tuple(raw["image_std"]),
            rescale=raw.get("rescale_factor", 1 / 255),
            filter=filter,
            tiles=tiles,
        )

    @property
    def side(self) -> int:
        """Of the resized picture, in pixels."""
        return self.tiles * self.square

    def resize(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """One frame RGB uint8 ``[H, W, 3]`` to uint8 ``[side, side, 3]``, in one thread."""
        resize = _lanczos if self.filter == "lanczos" else _bicubic
        return resize(image, [self._first_size(*image.shape[:2]), (self.side, self.side)])

    def _first_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the first resize: the shorter edge is cut to an integer, then made even."""
        longer = self.longest_edge if self.tiles == 1 else max(self.longest_edge, self.side)
        aspect = width / height
        edge = int(longer / aspect) if width >= height else int(longer * aspect)
        shorter = max(edge + edge % 2, 1)
        return (longer, shorter) if height > width else (shorter, longer)

    def fingerprint(self) -> dict[str, int | float | str | list[float]]:
        """What features depend on, the number of tiles apart, which a cache tells by itself."""
        return {
            "filter": self.filter,
            "longest_edge": self.longest_edge,
            "square": self.square,
            "mean": list(self.mean),
            "std": list(self.std),
            "rescale": self.rescale,
            "resized_sha256": replace(self, tiles=1)._resized_sha256(),
        }

    def _resized_sha256(self) -> str:
        """Of fixed pictures, tall and wide: it tells when another version of a library resizes otherwise, as Pillow 13
        does tall pictures."""
        digest = hashlib.sha256()
        for height, width in ((192, 32), (32, 192)):
            values = np.arange(height * width * 3) * 7919 % 251
            digest.update(self.resize(values.astype(np.uint8).reshape(height, width, 3)).tobytes())
        return digest.hexdigest()


def _check_filter(filter: Filter, resample: object, path: Path) -> None:
    if filter not in _FILTERS:
        raise UserError(f"unknown --preprocess {filter!r}; use {' or '.join(_FILTERS)}")
    if resample not in _FILTERS.values():
        raise UserError(
            f"{path} asks for resample {resample}; only 1 (Lanczos) and 3 (bicubic) are supported"
        )
    if resample == _FILTERS["bicubic"] and filter != "bicubic":
        raise UserError(f"{path} asks for resample 3 (bicubic); add --preprocess bicubic")


def _lanczos(image: NDArray[np.uint8], sizes: list[tuple[int, int]]) -> NDArray[np.uint8]:
    picture = Image.fromarray(image)
    for height, width in sizes:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _bicubic(image: NDArray[np.uint8], sizes: list[tuple[int, int]]) -> NDArray[np.uint8]:
    import torch
    from torch.nn.functional import interpolate

    # The colours stay last in memory: torch has a fast kernel for that, which starts no threads.
    picture = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]
    for size in sizes:
        picture = interpolate(picture, size=size, mode="bicubic", antialias=True)
    resized: NDArray[np.uint8] = picture[0].permute(1, 2, 0).numpy()
    return resized


def read_config(path: Path) -> dict[str, Any]:
    """The object in a checkpoint's JSON file; empty where the file holds something else.

    Raises:
        UserError: it is not JSON.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download the checkpoint again") from None
    return raw if isinstance(raw, dict) else {}
