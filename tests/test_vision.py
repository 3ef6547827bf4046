"""Preprocessing and features against transformers' own image processor and model; pooling worked by hand."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import SmolVLMForConditionalGeneration
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from pipeline.presets import init_model
from pipeline.vision import Preprocessor, VisionEncoder, pool_tokens
from schemas.errors import UserError

SIZES = [(128, 160), (160, 90), (64, 64), (37, 53), (53, 37), (240, 426), (128, 128), (9, 200), (200, 9)]
Frame = NDArray[np.uint8]


def scenes(sizes: list[tuple[int, int]]) -> list[Frame]:
    """Smooth colours with noise and hard edges: what a resize filter can get wrong."""
    rng = np.random.default_rng(0)
    frames = []
    for height, width in sizes:
        y, x = np.mgrid[:height, :width]
        base = np.stack([200 * x / width, 255 * y / height, 255 * ((x // 5 + y // 7) % 2)], axis=2)
        frames.append(np.clip(base + rng.integers(-30, 31, base.shape), 0, 255).astype(np.uint8))
    return frames


def reference_processor(folder: Path) -> SmolVLMImageProcessorPil:
    return SmolVLMImageProcessorPil.from_pretrained(folder)


def reference_pixels(processor: SmolVLMImageProcessorPil, frame: Frame) -> NDArray[np.float32]:
    pixels = processor(frame, do_image_splitting=False, return_tensors="np")["pixel_values"]
    assert pixels.shape[:2] == (1, 1)
    return pixels[0, 0]


def normalised(preprocessor: Preprocessor, resized: Frame) -> NDArray[np.float64]:
    values = (resized * preprocessor.rescale - np.array(preprocessor.mean)) / np.array(preprocessor.std)
    return values.transpose(2, 0, 1)


def preprocessor_like(preset_edge: int, square: int) -> tuple[Preprocessor, SmolVLMImageProcessorPil]:
    mean, std = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)
    reference = SmolVLMImageProcessorPil(
        size={"longest_edge": preset_edge},
        max_image_size={"longest_edge": square},
        image_mean=list(mean),
        image_std=list(std),
    )
    return Preprocessor(preset_edge, square, mean, std, 1 / 255), reference


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_preprocessing_is_the_processors(tiny_model: Path, size: tuple[int, int]) -> None:
    [frame] = scenes([size])
    preprocessor = Preprocessor.read(tiny_model)
    resized = preprocessor.resize(frame)
    assert (resized.shape, resized.dtype) == ((128, 128, 3), np.uint8)
    wanted = reference_pixels(reference_processor(tiny_model), frame)
    np.testing.assert_allclose(normalised(preprocessor, resized), wanted, atol=1e-6)


@pytest.mark.parametrize("size", [(90, 160), (160, 90), (101, 77), (240, 240)], ids=str)
@pytest.mark.parametrize("edges", [(512, 128), (96, 128), (364, 98)], ids=str)
def test_first_resize_up_and_down(edges: tuple[int, int], size: tuple[int, int]) -> None:
    """The released checkpoints enlarge to 2048 first; here in small, with other means."""
    preprocessor, reference = preprocessor_like(*edges)
    [frame] = scenes([size])
    got = normalised(preprocessor, preprocessor.resize(frame))
    np.testing.assert_allclose(got, reference_pixels(reference, frame), atol=1e-6)
    straight, _ = preprocessor_like(edges[1], edges[1])
    if size[0] != size[1]:  # the first resize matters, so leaving it out would be seen
        assert np.abs(got - normalised(straight, straight.resize(frame))).max() > 0.01


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> SmolVLMForConditionalGeneration:
    return SmolVLMForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).eval()


def reference_features(
    model: SmolVLMForConditionalGeneration, folder: Path, frames: list[Frame]
) -> NDArray[np.float32]:
    processor = reference_processor(folder)
    pixels = np.stack([reference_pixels(processor, frame) for frame in frames])
    assert not (pixels == 0).all(axis=(1, 2, 3)).any()  # such a frame would be taken for padding
    with torch.inference_mode():
        features = model.get_image_features(torch.from_numpy(pixels)[:, None]).pooler_output
    return np.stack([one.numpy() for one in features])


def test_features_are_the_models(tiny_model: Path, reference: SmolVLMForConditionalGeneration) -> None:
    """Black and white ones too: black is -1 after normalisation, not the 0 that marks padding."""
    black, white = (np.full((90, 160, 3), value, np.uint8) for value in (0, 255))
    frames = [*scenes(SIZES), black, white]
    encoder = VisionEncoder(tiny_model, "cpu")
    got = encoder.encode(np.stack([encoder.preprocessor.resize(frame) for frame in frames]))
    wanted = reference_features(reference, tiny_model, frames)
    assert got.shape == wanted.shape == (len(frames), encoder.tokens, encoder.dim)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert np.abs(got[0] - got[1]).max() > 1e-3  # features do tell frames apart


def test_grey_is_no_padding(tiny_model: Path, reference: SmolVLMForConditionalGeneration) -> None:
    """The grey next to 0 after normalisation; norms enlarge the rounding of such small values."""
    frames = [np.full((90, 160, 3), value, np.uint8) for value in (127, 128)]
    encoder = VisionEncoder(tiny_model, "cpu")
    got = encoder.encode(np.stack([encoder.preprocessor.resize(frame) for frame in frames]))
    np.testing.assert_allclose(got, reference_features(reference, tiny_model, frames), rtol=1e-4, atol=1e-4)


def test_features_do_not_depend_on_the_batch(tiny_model: Path) -> None:
    encoder = VisionEncoder(tiny_model, "cpu")
    frames = np.stack([encoder.preprocessor.resize(frame) for frame in scenes(SIZES)])
    alone = np.concatenate([encoder.encode(frame[None]) for frame in frames])
    np.testing.assert_allclose(encoder.encode(frames), alone, atol=1e-5)


def test_pooling_worked_by_hand() -> None:
    grid = torch.arange(16, dtype=torch.float32)
    features = torch.stack([grid, 10 * grid], dim=1)[None]  # [1, 16, 2], row by row
    np.testing.assert_allclose(
        pool_tokens(features, 2)[0].numpy(), [[2.5, 25], [4.5, 45], [10.5, 105], [12.5, 125]]
    )
    np.testing.assert_allclose(pool_tokens(features, 4)[0].numpy(), [[7.5, 75]])
    assert torch.equal(pool_tokens(features, 1), features)


def test_pooling_of_81_tokens_and_several_frames() -> None:
    features = torch.randn(3, 81, 5, generator=torch.manual_seed(0))
    pooled = pool_tokens(features, 3)
    assert pooled.shape == (3, 9, 5)
    for frame in range(3):
        for row in range(3):
            for column in range(3):
                tokens = [9 * (3 * row + i) + 3 * column + j for i in range(3) for j in range(3)]
                mean = features[frame, tokens].mean(dim=0)
                torch.testing.assert_close(pooled[frame, 3 * row + column], mean)


def test_pooled_features_are_means_of_the_grid(
    tiny_model: Path, reference: SmolVLMForConditionalGeneration
) -> None:
    frames = scenes([(128, 160), (160, 90)])
    every = reference_features(reference, tiny_model, frames)
    assert every.shape[1] == 4
    one = VisionEncoder(tiny_model, "cpu", tokens_per_frame=1)
    assert (one.tokens, one.tokens_per_frame) == (4, 1)
    got = one.encode(np.stack([one.preprocessor.resize(frame) for frame in frames]))
    assert got.shape == (2, 1, one.dim)
    np.testing.assert_allclose(got[:, 0], every.mean(axis=1), atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 3, 5, 16, 64, -1])
def test_tokens_that_do_not_fit(tiny_model: Path, tokens: int) -> None:
    with pytest.raises(UserError, match=rf"--tokens-per-frame {tokens} .*2x2 grid; use 4, 1$"):
        VisionEncoder(tiny_model, "cpu", tokens_per_frame=tokens)


# ---- checkpoints


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "copy")


def change_weights(folder: Path, change: object) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file(change(weights), path, metadata={"format": "pt"})  # type: ignore[operator]


def test_no_preprocessor(model_copy: Path) -> None:
    (model_copy / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"copy has no preprocessor_config.json; .*--model"):
        VisionEncoder(model_copy, "cpu")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"resample": 3}, "asks for resample 3; only 1 "),
        ({"max_image_size": {"longest_edge": 512}}, "resizes to 512 pixels, but its tower takes 128"),
    ],
)
def test_preprocessing_that_is_not_the_models(
    model_copy: Path, change: dict[str, object], reason: str
) -> None:
    path = model_copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=reason):
        VisionEncoder(model_copy, "cpu")


def test_no_weights(model_copy: Path) -> None:
    (model_copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"copy has no \*\.safetensors file"):
        VisionEncoder(model_copy, "cpu")


@pytest.mark.parametrize("part", ["vision_model", "connector"])
def test_a_tensor_is_missing(model_copy: Path, part: str) -> None:
    names = [name for name in load_file(model_copy / "model.safetensors") if f".{part}." in name]
    change_weights(model_copy, lambda weights: {k: v for k, v in weights.items() if k != names[0]})
    with pytest.raises(UserError, match=f"lacks 1 tensors of the {part}, such as ") as raised:
        VisionEncoder(model_copy, "cpu")
    assert str(raised.value).endswith(names[0].split(f".{part}.")[1])


def test_another_kind_of_model(model_copy: Path) -> None:
    (model_copy / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(UserError, match=r"is not a SmolVLM checkpoint .*'llama'"):
        VisionEncoder(model_copy, "cpu")


def test_the_hash_is_of_tower_and_connector(tiny_model: Path, model_copy: Path) -> None:
    original = VisionEncoder(tiny_model, "cpu").sha256
    assert VisionEncoder(model_copy, "cpu").sha256 == original

    def changed(ending: str) -> str:
        def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            [name] = [name for name in weights if name.endswith(ending)]
            return {**weights, name: weights[name] + 0.5}

        folder = shutil.copytree(tiny_model, model_copy.parent / ending)
        change_weights(folder, change)
        return VisionEncoder(folder, "cpu").sha256

    assert changed("text_model.norm.weight") == original
    hashes = {
        original,
        changed("connector.modality_projection.proj.weight"),
        changed("vision_model.post_layernorm.bias"),
    }
    assert len(hashes) == 3


def test_weights_in_several_files(tiny_model: Path, model_copy: Path) -> None:
    weights = load_file(model_copy / "model.safetensors")
    (model_copy / "model.safetensors").unlink()
    for number in range(3):
        part = {name: weights[name] for name in sorted(weights)[number::3]}
        save_file(part, model_copy / f"model-{number + 1:05d}-of-00003.safetensors")
    assert VisionEncoder(model_copy, "cpu").sha256 == VisionEncoder(tiny_model, "cpu").sha256


def test_a_bfloat16_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    """As the released ones are saved: it is computed in float32 from the rounded weights."""
    folder = tmp_path / "bf16"
    model = SmolVLMForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    shutil.copy(tiny_model / "preprocessor_config.json", folder)
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    encoder = VisionEncoder(folder, "cpu")
    frames = scenes([(128, 160), (53, 37)])
    got = encoder.encode(np.stack([encoder.preprocessor.resize(frame) for frame in frames]))
    rounded = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    np.testing.assert_allclose(got, reference_features(rounded, folder, frames), atol=1e-5)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_init_model_is_deterministic(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)  # what was drawn before does not matter, nor is what is drawn after changed
    before = torch.random.get_rng_state()
    init_model("tiny", tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert hashes(tmp_path / "again") == hashes(tiny_model)
    init_model("tiny", tmp_path / "other", seed=1)
    other = hashes(tmp_path / "other")
    assert {name for name, digest in hashes(tiny_model).items() if other[name] != digest} == {
        "model.safetensors"
    }


def test_init_model_replaces_a_checkpoint_and_nothing_else(tiny_model: Path, tmp_path: Path) -> None:
    init_model("tiny", tmp_path / "model", seed=1)
    init_model("tiny", tmp_path / "model")
    assert hashes(tmp_path / "model") == hashes(tiny_model)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="exists and is not a checkpoint; give another --out"):
        init_model("tiny", tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
    with pytest.raises(UserError, match="unknown preset 'huge'; choose one of tiny, smolvlm2-256m"):
        init_model("huge", tmp_path / "huge")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]
