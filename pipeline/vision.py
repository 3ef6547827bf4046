"""Frames to features: SmolVLM2's preprocessing, vision tower and connector, and pooling of tokens."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from schemas.errors import UserError

if TYPE_CHECKING:
    import torch

_PARTS = {"model.vision_model.": "vision_model", "model.connector.": "connector"}


@dataclass(frozen=True)
class Preprocessor:
    """What SmolVLM's image processor does to one frame when it does not split it into tiles.

    Two Lanczos resizes, first to ``longest_edge`` with the aspect kept, then to a ``square``; after that
    ``(value / 255 - mean) / std``. The first resize upscales small frames, as the processor does.
    """

    longest_edge: int
    square: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float

    @classmethod
    def read(cls, folder: Path) -> Preprocessor:
        """From a checkpoint's ``preprocessor_config.json``.

        Raises:
            UserError: the file is missing or asks for another filter than Lanczos.
        """
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            raise UserError(
                f"{folder} has no preprocessor_config.json; give a SmolVLM2 checkpoint with --model"
            )
        raw = _read_json(path)
        lacking = {"size", "max_image_size", "image_mean", "image_std"} - raw.keys()
        if lacking:
            raise UserError(f"{path} lacks {min(lacking)}; give a SmolVLM2 checkpoint with --model")
        if raw.get("resample", 1) != Image.Resampling.LANCZOS:
            raise UserError(f"{path} asks for resample {raw['resample']}; only 1 (Lanczos) is supported")
        return cls(
            longest_edge=raw["size"]["longest_edge"],
            square=raw["max_image_size"]["longest_edge"],
            mean=tuple(raw["image_mean"]),
            std=tuple(raw["image_std"]),
            rescale=raw.get("rescale_factor", 1 / 255),
        )

    def resize(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """One frame RGB uint8 ``[H, W, 3]`` to uint8 ``[S, S, 3]``."""
        height, width = image.shape[:2]
        longest = (self._scaled(height, width), self.longest_edge)
        size = longest if height > width else longest[::-1]  # PIL takes (width, height)
        picture = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
        return np.asarray(picture.resize((self.square, self.square), Image.Resampling.LANCZOS))

    def _scaled(self, height: int, width: int) -> int:
        """The shorter edge after the first resize: cut to an integer, then made even."""
        aspect = width / height
        edge = int(self.longest_edge / aspect) if width >= height else int(self.longest_edge * aspect)
        return max(edge + edge % 2, 1)

    def fingerprint(self) -> dict[str, int | float | str | list[float]]:
        return {
            "filter": "lanczos",
            "longest_edge": self.longest_edge,
            "square": self.square,
            "mean": list(self.mean),
            "std": list(self.std),
            "rescale": self.rescale,
        }


class VisionEncoder:
    """Vision tower and connector of a checkpoint; the language model is not loaded.

    Attributes:
        name: where to find the checkpoint again.
        tokens: features a frame after the connector (before pooling).
        dim: width of a feature, the language model's hidden size.
        sha256: hash of all weights, names and shapes included.
    """

    def __init__(
        self, folder: Path, device: str, tokens_per_frame: int | None = None, name: str | None = None
    ) -> None:
        """Load from a local checkpoint folder; ``name`` is what the user calls it, where that differs.

        Raises:
            UserError: no SmolVLM checkpoint, weights missing, or a number of tokens the grid does not pool to.
        """
        import torch
        from transformers import SmolVLMConfig
        from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector, SmolVLMVisionTransformer

        raw = _read_json(folder / "config.json")
        if "vision_config" not in raw or "scale_factor" not in raw:
            raise UserError(f"{folder} is not a SmolVLM checkpoint (model type {raw.get('model_type')!r})")
        config = SmolVLMConfig.from_pretrained(folder)
        self.name = name or str(folder)
        self.preprocessor = Preprocessor.read(folder)
        if self.preprocessor.square != config.vision_config.image_size:
            raise UserError(
                f"{folder} resizes to {self.preprocessor.square} pixels, but its tower takes "
                f"{config.vision_config.image_size}; mend max_image_size in preprocessor_config.json"
            )
        side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
        self.device, self.tokens, self.dim = device, side * side, config.text_config.hidden_size
        self.tokens_per_frame = self.tokens if tokens_per_frame is None else tokens_per_frame
        self.pool = _pool_window(side, self.tokens_per_frame)
        with torch.device("meta"):
            self._modules: dict[str, Any] = {
                "vision_model": SmolVLMVisionTransformer._from_config(config.vision_config),
                "connector": SmolVLMConnector(config),
            }
        weights = _load_weights(folder)
        digest = hashlib.sha256()
        for name, module in self._modules.items():
            state = weights[name]
            missing = set(module.state_dict()) - set(state)
            if missing:
                raise UserError(
                    f"{folder} lacks {len(missing)} tensors of the {name}, such as {min(missing)}"
                )
            for key in sorted(state):
                tensor = state[key].contiguous()
                digest.update(f"{name}.{key} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.view(torch.uint8).numpy().data)
            module.load_state_dict({k: v.to(torch.float32) for k, v in state.items()}, assign=True)
            module.to(device).eval()
        self.sha256 = digest.hexdigest()

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features of resized frames.

        Args:
            frames: uint8 ``[N, S, S, 3]`` from `Preprocessor.resize`.

        Returns:
            float32 ``[N, tokens_per_frame, dim]``, after the connector, averaged over the token grid.
        """
        import torch

        with torch.inference_mode():
            pixels = torch.from_numpy(frames).to(self.device).permute(0, 3, 1, 2).to(torch.float32)
            mean = torch.tensor(self.preprocessor.mean, device=self.device)[:, None, None]
            std = torch.tensor(self.preprocessor.std, device=self.device)[:, None, None]
            pixels = ((pixels * self.preprocessor.rescale - mean) / std).contiguous()
            hidden = self._modules["vision_model"](pixel_values=pixels).last_hidden_state
            features = pool_tokens(self._modules["connector"](hidden), self.pool)
            return features.float().cpu().numpy()


def pool_tokens(features: torch.Tensor, window: int) -> torch.Tensor:
    """Average ``window x window`` neighbours of the square token grid: ``[N, s*s, d]`` to ``[N, (s/w)**2, d]``."""
    count, tokens, dim = features.shape
    side = math.isqrt(tokens)
    grid = features.view(count, side // window, window, side // window, window, dim)
    return grid.mean(dim=(2, 4)).reshape(count, -1, dim)


def _pool_window(side: int, tokens_per_frame: int) -> int:
    allowed = [(side // window) ** 2 for window in range(1, side + 1) if side % window == 0]
    if tokens_per_frame not in allowed:
        names = ", ".join(map(str, allowed))
        raise UserError(
            f"--tokens-per-frame {tokens_per_frame} does not fit the {side}x{side} grid; use {names}"
        )
    return side // math.isqrt(tokens_per_frame)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download the checkpoint again") from None
    return raw if isinstance(raw, dict) else {}


def _load_weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Only the tensors of tower and connector; the others are never read from disk."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no *.safetensors file; download the whole checkpoint")
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in _PARTS.values()}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                    for prefix, name in _PARTS.items():
                        if key.startswith(prefix):
                            found[name][key.removeprefix(prefix)] = tensors.get_tensor(key)
        except SafetensorError as error:
            raise UserError(f"{file} is not whole ({error}); download it again") from None
    return found
