"""Frames to features: SmolVLM2's vision tower and connector, and pooling of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.grid import cut, lay_out, pool_tokens, pool_window
from pipeline.preprocess import Preprocessor, read_config
from schemas.errors import UserError

if TYPE_CHECKING:
    import torch

    from schemas.shards import ComputeType, Filter

PARTS = {"model.vision_model.": "vision_model", "model.connector.": "connector"}
_COMPUTE_TYPES: tuple[ComputeType, ...] = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Pending:
    """A batch that `VisionEncoder.start` began; `VisionEncoder.finish` takes it."""

    features: (
        torch.Tensor
    )  # float32 in this computer's memory, of the frames and perhaps of padding after them
    frames: int
    copied: torch.cuda.Event | None  # when a GPU has written the features


class VisionEncoder:
    """Vision tower and connector of a checkpoint; the language model is not loaded.

    With ``tiles`` n, a frame is n x n pictures for the tower; their tokens are laid out as one grid of the whole frame,
    row by row.

    A frame's features do not depend on the frames around it: a GPU sees batches of one shape only, short ones padded,
    and on a CPU each frame is computed alone, by one thread, several frames at once. So a CPU's features do not depend
    on the number of its threads either (sums would be split otherwise); they do on its kind.

    Attributes:
        name: where to find the checkpoint again.
        tokens: features a frame after the connector (before pooling), of all its tiles.
        dim: width of a feature, the language model's hidden size.
        compute: the type that weights and activations have.
        batch_size: the most frames that `start` takes, and the most pictures that the tower gets at once.
        sha256: hash of all weights as the checkpoint holds them, names and shapes included.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        tokens_per_frame: int | None = None,
        name: str | None = None,
        *,
        filter: Filter = "lanczos",
        compute: ComputeType | None = None,
        batch_size: int = 16,
        tiles: int = 1,
    ) -> None:
        """Load from a local checkpoint folder; ``name`` is what the user calls it, where that differs.

        Args:
            compute: None chooses by what the device can do.

        Raises:
            UserError: no SmolVLM checkpoint, weights missing, a number of tokens the grid does not pool to, or a
                type that the device cannot compute in.
        """
        import torch
        from transformers import SmolVLMConfig

        raw = read_config(folder / "config.json")
        if "vision_config" not in raw or "scale_factor" not in raw:
            raise UserError(f"{folder} is not a SmolVLM checkpoint (model type {raw.get('model_type')!r})")
        config = SmolVLMConfig.from_pretrained(folder)
        self.name = name or str(folder)
        self.preprocessor = Preprocessor.read(folder, filter, tiles)
        if self.preprocessor.square != config.vision_config.image_size:
            raise UserError(
                f"{folder} resizes to {self.preprocessor.square} pixels, but its tower takes "
                f"{config.vision_config.image_size}; mend max_image_size in preprocessor_config.json"
            )
        self._patches = config.vision_config.image_size // config.vision_config.patch_size
        side = self._patches // config.scale_factor * tiles
        self.tokens, self.dim = side * side, config.text_config.hidden_size
        self.tokens_per_frame = self.tokens if tokens_per_frame is None else tokens_per_frame
        self.pool = pool_window(side, self.tokens_per_frame)
        self.device, self.batch_size = device, batch_size
        self.compute = choose_compute(device) if compute is None else _checked_compute(compute, device)
        self._type: torch.dtype = getattr(torch, self.compute)
        self._is_gpu = torch.device(device).type == "cuda"
        self._threads = ThreadPoolExecutor(torch.get_num_threads())  # those of a CPU; a GPU starts none
        self._tower, self._connector, self.sha256 = _load(folder, config)
        for module in (self._tower, self._connector):
            module.to(device, self._type).eval()
        self._mean = torch.tensor(self.preprocessor.mean, device=device)
        self._std = torch.tensor(self.preprocessor.std, device=device)

    def start(self, frames: NDArray[np.uint8]) -> Pending:
        """Begin to encode a batch. A GPU goes on with it after this has returned; a CPU is done by then.

        Args:
            frames: uint8 ``[n, side, side, 3]`` from `Preprocessor.resize`, n at most ``batch_size``. They may be
                overwritten once this has returned.

        Raises:
            UserError: the GPU has not enough memory.
        """
        import torch

        side = self.preprocessor.side
        if len(frames) > self.batch_size or frames.shape[1:] != (side, side, 3) or frames.dtype != np.uint8:
            raise ValueError(f"frames are {frames.dtype} {frames.shape}")
        try:
            pictures = cut(frames, self.preprocessor.tiles)
            return self._start_on_gpu(pictures) if self._is_gpu else self._encode_on_cpu(pictures)
        except torch.OutOfMemoryError:
            raise UserError(
                f"{self.device} has not enough memory for {self.batch_size} frames at once; give a smaller --batch-size"
            ) from None

    def finish(self, pending: Pending) -> NDArray[np.float32]:
        """Wait for a batch.

        Returns:
            float32 ``[n, tokens_per_frame, dim]``, after the connector, averaged over the token grid.
        """
        if pending.copied is not None:
            pending.copied.synchronize()
        return np.array(pending.features[: pending.frames].numpy())  # a copy: pinned memory is scarce

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features of any number of frames, as `start` and `finish` give them for batches."""
        features = np.empty((len(frames), self.tokens_per_frame, self.dim), np.float32)
        for first in range(0, len(frames), self.batch_size):
            batch = frames[first : first + self.batch_size]
            features[first : first + len(batch)] = self.finish(self.start(batch))
        return features

    def _start_on_gpu(self, pictures: NDArray[np.uint8]) -> Pending:
        """Of `cut` frames."""
        import torch

        # Pinned memory is copied while this thread goes on; torch gives it out again only after the copy is done.
        frames, *one = pictures.shape
        batch = torch.empty((self.batch_size, *one), dtype=torch.uint8, pin_memory=True)
        rows = batch.numpy()
        rows[:frames], rows[frames:] = pictures, 0
        # float32 means float32, not the patches in TF32; and one kernel, not whichever is found to be fastest
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            # the tower gets as many pictures at once however many tiles a frame has
            there = batch.to(self.device, non_blocking=True).flatten(0, 2).split(self.batch_size)
            features = self._whole(torch.cat([self._features(some) for some in there]))
            here = torch.empty(features.shape, dtype=torch.float32, pin_memory=True)
            here.copy_(features, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))
        return Pending(here, frames, copied)

    def _encode_on_cpu(self, pictures: NDArray[np.uint8]) -> Pending:
        """Of `cut` frames."""
        import torch

        frames, tiles = len(pictures), self.preprocessor.tiles
        parts = torch.empty((frames, tiles, tiles, self.tokens // tiles**2, self.dim))
        features = torch.empty((frames, self.tokens_per_frame, self.dim))

        def encode(place: tuple[int, ...]) -> None:
            with torch.inference_mode():  # which is each thread's own
                parts[place] = self._features(torch.tensor(pictures[place])[None])[0]

        with _one_thread_an_operation():
            list(self._threads.map(encode, np.ndindex(pictures.shape[:3])))  # raises what a thread raised
            for number in range(frames):
                features[number] = self._whole(parts[number].flatten(0, 1))[0]
        return Pending(features, frames, None)

    def _whole(self, parts: torch.Tensor) -> torch.Tensor:
        """Features of the tiles of n frames to those of the frames, float32 ``[n, tokens_per_frame, dim]``."""
        return pool_tokens(lay_out(parts, self.preprocessor.tiles), self.pool)

    def _features(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 ``[n, S, S, 3]`` to float32 ``[n, tokens, dim]``, both on the device; of a frame or a tile.

        The tower's parts are called one by one: as a whole it looks at a mask of patches, for which a GPU's host
        would have to wait. No patch is masked here.
        """
        import torch

        pixels = (frames.to(torch.float32) * self.preprocessor.rescale - self._mean) / self._std
        pixels = pixels.permute(0, 3, 1, 2).to(self._type).contiguous()
        every_patch = torch.ones(
            (len(frames), self._patches, self._patches), dtype=torch.bool, device=frames.device
        )
        hidden = self._tower.embeddings(pixel_values=pixels, patch_attention_mask=every_patch)
        hidden = self._tower.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        features: torch.Tensor = self._connector(self._tower.post_layernorm(hidden))
        return features.to(torch.float32)


def choose_compute(device: str) -> ComputeType:
    """The fastest type that a device computes in by itself: bfloat16 from Ampere on, float16 on Volta and Turing."""
    import torch

    if torch.device(device).type != "cuda":
        return "float32"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return "bfloat16"
    return "float16" if capability >= (7, 0) else "float32"


def _checked_compute(compute: ComputeType, device: str) -> ComputeType:
    import torch

    if compute not in _COMPUTE_TYPES:
        raise UserError(f"unknown --compute {compute!r}; use {', '.join(_COMPUTE_TYPES)}")
    if compute == "bfloat16" and torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise UserError(
                f"--compute bfloat16 needs a GPU of compute capability 8.0 or more, {device} has {major}.{minor}; "
                "use float16 or float32"
            )
    return compute


@contextmanager
def _one_thread_an_operation() -> Iterator[None]:
    """Threads that torch meets in here for the first time stay so; this one gets its number back."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load(folder: Path, config: Any) -> tuple[Any, Any, str]:
    """Tower and connector with their weights as stored, and the weights' hash."""
    import torch
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector, SmolVLMVisionTransformer

    with torch.device("meta"):
        modules: dict[str, Any] = {
            "vision_model": SmolVLMVisionTransformer._from_config(config.vision_config),
            "connector": SmolVLMConnector(config),
        }
    weights = load_weights(folder)
    for name, module in modules.items():
        state = weights[name]
        wanted = {key: tensor.shape for key, tensor in module.state_dict().items()}
        if missing := wanted.keys() - state.keys():
            raise UserError(f"{folder} lacks {len(missing)} tensors of the {name}, such as {min(missing)}")
        if other := [key for key in sorted(state) if state[key].shape != wanted.get(key)]:
            raise UserError(
                f"{folder} holds {len(other)} tensors of the {name} that do not go with its config.json, such as "
                f"{other[0]}; download the checkpoint again"
            )
        module.load_state_dict(state, assign=True)
    return modules["vision_model"], modules["connector"], _sha256_of(weights)


def vision_sha256(folder: Path) -> str | None:
    """The hash that a cache made with a checkpoint has in its fingerprint; None where that has no vision tower.

    Raises:
        UserError: a file of weights is missing or damaged.
    """
    weights = load_weights(folder)
    return _sha256_of(weights) if any(weights.values()) else None


def _sha256_of(weights: dict[str, dict[str, torch.Tensor]]) -> str:
    import torch

    digest = hashlib.sha256()
    for name in ("vision_model", "connector"):
        for key, tensor in sorted(weights[name].items()):
            digest.update(f"{name}.{key} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Only the tensors of tower and connector; the others are never read from disk."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no *.safetensors file; download the whole checkpoint")
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in PARTS.values()}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                    for prefix, name in PARTS.items():
                        if key.startswith(prefix):
                            found[name][key.removeprefix(prefix)] = tensors.get_tensor(key)
        except SafetensorError as error:
            raise UserError(f"{file} is not whole ({error}); download it again") from None
    return found
