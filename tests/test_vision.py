"""Preprocessing and features against transformers' own image processor and model; pooling worked by hand."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.image_processing_pil_smolvlm import (
    SmolVLMImageProcessorPil,
    get_resize_output_image_size,
)

from pipeline.grid import pool_tokens
from pipeline.preprocess import Preprocessor
from pipeline.presets import init_model
from pipeline.quantize import to_float16
from pipeline.vision import VisionEncoder, choose_compute
from schemas.errors import UserError

SIZES = [(128, 160), (160, 90), (64, 64), (37, 53), (53, 37), (240, 426), (128, 128), (9, 200), (200, 9)]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
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


def preprocessor_like(
    preset_edge: int, square: int, filter: str = "lanczos"
) -> tuple[Preprocessor, SmolVLMImageProcessorPil]:
    mean, std = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)
    reference = SmolVLMImageProcessorPil(
        size={"longest_edge": preset_edge},
        max_image_size={"longest_edge": square},
        image_mean=list(mean),
        image_std=list(std),
        resample={"lanczos": 1, "bicubic": 3}[filter],
    )
    return Preprocessor(preset_edge, square, mean, std, 1 / 255, filter), reference


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


def reference_values(processor: SmolVLMImageProcessorPil, frame: Frame) -> NDArray[np.float64]:
    """The resized picture ``[S, S, 3]`` that the processor normalised, 0 to 255."""
    pixels = reference_pixels(processor, frame).transpose(1, 2, 0).astype(np.float64)
    return 255 * (pixels * np.array(processor.image_std) + np.array(processor.image_mean))


def pil_bicubic(frame: Frame, longest_edge: int, square: int) -> NDArray[np.int64]:
    """Each resize first horizontally, then vertically: newer versions of PIL do it the other way on tall pictures."""
    picture = Image.fromarray(frame)
    first = get_resize_output_image_size(frame.transpose(2, 0, 1), longest_edge)
    for height, width in (first, (square, square)):
        picture = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture).astype(np.int64)


@pytest.mark.parametrize("edges", [(512, 128), (128, 128), (96, 128), (364, 98)], ids=str)
def test_bicubic_is_within_2_of_pil(edges: tuple[int, int]) -> None:
    preprocessor, processor = preprocessor_like(*edges, "bicubic")
    lanczos, _ = preprocessor_like(*edges)
    for frame in scenes([*SIZES, (90, 160), (101, 77), (240, 240), (360, 640), (640, 360)]):
        got = preprocessor.resize(frame)
        assert (got.shape, got.dtype) == ((edges[1], edges[1], 3), np.uint8)
        wanted = pil_bicubic(frame, *edges)
        assert np.abs(got - wanted).max() <= 2
        assert np.abs(got - wanted).mean() < 0.02
        if frame.shape[0] <= frame.shape[1]:
            assert np.abs(got - reference_values(processor, frame)).max() < 2.01
        if frame.shape[:2] != edges:
            assert np.abs(lanczos.resize(frame) - wanted).max() > 4  # so the other filter would be seen


@pytest.mark.parametrize("filter", ["lanczos", "bicubic"])
def test_a_picture_may_be_a_view_that_cannot_be_written(filter: str) -> None:
    preprocessor, _ = preprocessor_like(96, 64, filter)
    [frame] = scenes([(54, 96)])
    turned = np.rot90(frame)
    turned.flags.writeable = False
    np.testing.assert_array_equal(preprocessor.resize(turned), preprocessor.resize(turned.copy()))


def test_bicubic_does_not_depend_on_threads() -> None:
    preprocessor, _ = preprocessor_like(512, 128, "bicubic")
    [frame] = scenes([(360, 640)])
    before = torch.get_num_threads()
    try:
        pictures = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            pictures.append(preprocessor.resize(frame))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*pictures)


def test_lanczos_needs_no_torch() -> None:
    """A decode worker gets it as bytes, and starts in no time."""
    preprocessor, _ = preprocessor_like(96, 64)
    program = (
        "import pickle, sys, numpy as np\n"
        "picture = pickle.loads(sys.stdin.buffer.read()).resize(np.zeros((4, 6, 3), np.uint8))\n"
        "print(picture.shape, 'torch' in sys.modules)"
    )
    command, given_bytes = [sys.executable, "-c", program], pickle.dumps(preprocessor)
    done = subprocess.run(command, input=given_bytes, capture_output=True, check=True)
    assert done.stdout.decode().strip() == "(64, 64, 3) False"


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


# ---- batches


def noise(count: int, seed: int = 0) -> Frame:
    return np.random.default_rng(seed).integers(0, 256, (count, 128, 128, 3), dtype=np.uint8)


@pytest.fixture
def threads() -> Iterator[Any]:
    """Sets the number of torch's threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("device", DEVICES)
def test_a_frame_is_encoded_alike_at_every_place(tiny_model: Path, device: str) -> None:
    """To the bit: alone, at each of 16 places among other frames, and beside black ones."""
    encoder = VisionEncoder(tiny_model, device)
    [frame] = noise(1)
    alone = encoder.encode(frame[None])[0]
    for place in range(16):
        batch = noise(16, seed=1 + place) if place % 2 else np.zeros((16, 128, 128, 3), np.uint8)
        batch[place] = frame
        features = encoder.finish(encoder.start(batch))
        np.testing.assert_array_equal(features[place], alone)
        assert np.abs(features[(place + 1) % 16] - alone).max() > 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_any_frames_in_any_order(tiny_model: Path, device: str) -> None:
    encoders = [VisionEncoder(tiny_model, device, batch_size=size) for size in (1, 3, 16)]
    pool = noise(5)
    wanted = [np.stack([encoder.encode(frame[None])[0] for frame in pool]) for encoder in encoders]

    @settings(deadline=None)
    @given(st.lists(st.integers(0, 4), max_size=20), st.integers(0, 2))
    def check(chosen: list[int], which: int) -> None:
        features = encoders[which].encode(pool[chosen])
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, wanted[which][chosen])

    check()


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer as wide as a released checkpoint's: sums so long that several threads would share one."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    vision = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 1, "intermediate_size": 64}
    text = {"hidden_size": 576, "num_attention_heads": 9, "num_hidden_layers": 1, "intermediate_size": 64}
    config = SmolVLMConfig(
        vision_config={**vision, "image_size": 512, "patch_size": 16},
        text_config={"model_type": "llama", **text, "vocab_size": 130, "pad_token_id": 0},
        scale_factor=4,
        image_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    processor = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize(("model", "side", "count"), [("tiny_model", 128, 9), ("wide_model", 512, 3)])
def test_features_do_not_depend_on_threads_or_batch_size(
    model: str, side: int, count: int, threads: Any, request: pytest.FixtureRequest
) -> None:
    """On a CPU, to the bit."""
    folder, found = request.getfixturevalue(model), []
    frames = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    for number, size in [(1, 1), (1, 16), (2, 2), (2, 16), (5, 4)]:
        threads(number)
        found.append(VisionEncoder(folder, "cpu", batch_size=size).encode(frames).tobytes())
        assert torch.get_num_threads() == number  # the caller's number is not changed
    assert len(set(found)) == 1


def test_the_number_of_threads_comes_back_after_an_error(
    tiny_model: Path, threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = VisionEncoder(tiny_model, "cpu")
    threads(3)

    def fails(hidden: torch.Tensor) -> torch.Tensor:
        raise MemoryError("no room")

    monkeypatch.setattr(encoder._connector, "forward", fails)
    with pytest.raises(MemoryError, match="no room"):
        encoder.encode(noise(2))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("device", DEVICES)
def test_batches_on_their_way(tiny_model: Path, device: str) -> None:
    """Finished in another order than started; the frames' memory is used again at once."""
    encoder = VisionEncoder(tiny_model, device, batch_size=4)
    batches = [noise(4, seed=1), noise(3, seed=2), noise(1, seed=3)]
    wanted = [encoder.encode(batch) for batch in batches]
    room = np.empty((4, 128, 128, 3), np.uint8)
    pending = []
    for batch in batches:
        room[: len(batch)] = batch
        pending.append(encoder.start(room[: len(batch)]))
        room[:] = 77
    for number in (2, 0, 1):
        np.testing.assert_array_equal(encoder.finish(pending[number]), wanted[number])


def test_frames_that_are_no_batch(tiny_model: Path) -> None:
    encoder = VisionEncoder(tiny_model, "cpu", batch_size=4)
    for frames in (noise(5), noise(2)[:, :64], noise(2).astype(np.float32), noise(1)[0]):
        with pytest.raises(ValueError, match="frames are "):
            encoder.start(frames)


class FakeEvent:
    """Of a stream that has not come so far until somebody waits."""

    def __init__(self) -> None:
        self.waited = False

    def record(self, stream: object) -> None:
        assert stream == "the stream of cpu"

    def synchronize(self) -> None:
        self.waited = True


def test_too_little_memory_on_the_gpu(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = VisionEncoder(tiny_model, "cpu", batch_size=8)

    def fails(frames: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    encoder._is_gpu = True
    monkeypatch.setattr(encoder, "_start_on_gpu", fails)
    with pytest.raises(
        UserError, match=r"not enough memory for 8 frames at once; give a smaller --batch-size"
    ):
        encoder.encode(np.zeros((3, 128, 128, 3), np.uint8))


def test_what_is_sent_to_a_gpu(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path, taken by the CPU: every batch has one shape, what is not a frame is 0, and its end is waited for."""
    encoder = VisionEncoder(tiny_model, "cpu", batch_size=4)
    frames = noise(6)
    wanted = encoder.encode(frames)
    encoder._is_gpu = True
    empty, sent, pinned = torch.empty, [], []

    def not_pinned(*shape: object, pin_memory: bool = False, **options: object) -> torch.Tensor:
        made = empty(*shape, **options)
        if pin_memory:
            pinned.append(made.fill_(99))  # as memory that was used before
        return made

    features = encoder._features

    def seen(batch: torch.Tensor) -> torch.Tensor:
        assert not torch.backends.cudnn.allow_tf32
        sent.append(batch.numpy().copy())
        return features(batch)

    monkeypatch.setattr(torch, "empty", not_pinned)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(encoder, "_features", seen)
    before = torch.backends.cudnn.allow_tf32
    got = [encoder.finish(pending) for pending in (encoder.start(frames[:4]), encoder.start(frames[4:]))]
    np.testing.assert_allclose(np.concatenate(got), wanted, atol=1e-5)
    padded = np.concatenate([frames[4:], np.zeros((2, 128, 128, 3), np.uint8)])
    np.testing.assert_array_equal(np.stack(sent), np.stack([frames[:4], padded]))
    assert torch.backends.cudnn.allow_tf32 == before
    pending = encoder.start(frames[:1])
    assert not pending.copied.waited
    encoder.finish(pending)[:] = 0  # the caller's own
    assert pending.copied.waited
    assert pinned[-1][0].abs().max() > 0
    assert len(pinned) == 6  # frames and features of each batch


# ---- what it computes in


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [
        ((5, 2), "float32"),
        ((6, 1), "float32"),
        ((7, 0), "float16"),
        ((7, 5), "float16"),
        ((8, 0), "bfloat16"),
        ((8, 9), "bfloat16"),
        ((9, 0), "bfloat16"),
        ((10, 0), "bfloat16"),
    ],
    ids=str,
)
def test_compute_by_capability(
    capability: tuple[int, int], wanted: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability
    )
    assert choose_compute("cuda:1") == wanted
    assert choose_compute("cpu") == "float32"
    assert asked == ["cuda:1"]
    if capability < (8, 0):
        with pytest.raises(
            UserError, match=rf"bfloat16 needs .* 8\.0 or more, cuda:1 has {capability[0]}\.{capability[1]}; "
        ):
            VisionEncoder(tiny_model, "cuda:1", compute="bfloat16")


def test_an_unknown_compute(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="unknown --compute 'int4'; use float32, bfloat16, float16"):
        VisionEncoder(tiny_model, "cpu", compute="int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_half_precision_is_the_models(tiny_model: Path, compute: str) -> None:
    """Against transformers in the same type; pixels are normalised in float32 before they are rounded."""
    encoder = VisionEncoder(tiny_model, "cpu", compute=compute)
    assert encoder.compute == compute
    frames = scenes(SIZES)
    got = encoder.encode(np.stack([encoder.preprocessor.resize(frame) for frame in frames]))
    assert got.dtype == np.float32
    dtype = getattr(torch, compute)
    model = SmolVLMForConditionalGeneration.from_pretrained(tiny_model, dtype=dtype).eval()
    processor = reference_processor(tiny_model)
    pixels = torch.from_numpy(np.stack([reference_pixels(processor, frame) for frame in frames]))
    with torch.inference_mode():
        found = [model.get_image_features(one[None, None].to(dtype)).pooler_output[0] for one in pixels]
    wanted = np.stack([one.float().numpy() for one in found])
    exact = reference_features(
        SmolVLMForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).eval(),
        tiny_model,
        frames,
    )
    rounding = np.abs(exact - wanted).mean()
    assert rounding > 1e-3  # the type shows
    assert np.abs(got - wanted).mean() < rounding / 4


def test_float16_weights_that_overflow(model_copy: Path) -> None:
    """What comes of it is refused, not written."""

    def enlarged(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = "model.connector.modality_projection.proj.weight"
        return {**weights, name: weights[name] * 1e7}

    change_weights(model_copy, enlarged)
    frames = noise(2)
    features = VisionEncoder(model_copy, "cpu", compute="float16").encode(frames)
    with pytest.raises(UserError, match=r"video v .*NaN or infinite; use --compute float32"):
        to_float16(features, "video v")
    with pytest.raises(UserError, match=r"video v .* beyond 65504"):
        to_float16(VisionEncoder(model_copy, "cpu").encode(frames), "video v")


# ---- pooling


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
        (
            {"resample": 3},
            r"preprocessor_config\.json asks for resample 3 \(bicubic\); add --preprocess bicubic",
        ),
        ({"resample": 2}, r"asks for resample 2; only 1 \(Lanczos\) and 3 \(bicubic\) are supported"),
        ({"size": {"height": 512, "width": 512}}, "preprocessor_config.json lacks size, or its longest_edge"),
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


@pytest.mark.parametrize("resample", [1, 3])
def test_bicubic_when_asked_for(model_copy: Path, resample: int) -> None:
    """By the user, or by the user and the checkpoint; it is another fingerprint."""
    lanczos = Preprocessor.read(model_copy)
    path = model_copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": resample}))
    encoder = VisionEncoder(model_copy, "cpu", filter="bicubic")
    ours, theirs = encoder.preprocessor.fingerprint(), lanczos.fingerprint()
    assert {key for key in ours if ours[key] != theirs[key]} == {"filter", "resized_sha256"}
    assert (ours["filter"], theirs["filter"]) == ("bicubic", "lanczos")
    [frame] = scenes([(90, 160)])
    wanted = np.asarray(Image.fromarray(frame).resize((128, 72), 3).resize((128, 128), 3))
    assert np.abs(encoder.preprocessor.resize(frame).astype(int) - wanted).max() <= 2


def test_an_unknown_filter(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="unknown --preprocess 'cubic'; use lanczos or bicubic"):
        Preprocessor.read(tiny_model, "cubic")  # type: ignore[arg-type]


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


@pytest.mark.parametrize("part", ["vision_model", "connector"])
def test_a_tensor_of_another_shape(model_copy: Path, part: str) -> None:
    name = min(name for name in load_file(model_copy / "model.safetensors") if f".{part}." in name)
    change_weights(model_copy, lambda weights: {**weights, name: weights[name][:1].clone()})
    with pytest.raises(UserError, match=rf"1 tensors of the {part} .* config\.json, such as .*{name[-12:]};"):
        VisionEncoder(model_copy, "cpu")


def test_a_tensor_too_many(model_copy: Path) -> None:
    change_weights(model_copy, lambda weights: {**weights, "model.connector.norm": torch.ones(1)})
    with pytest.raises(UserError, match=r"1 tensors of the connector .* such as norm;"):
        VisionEncoder(model_copy, "cpu")


def test_the_language_model_is_not_read(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes load one checkpoint; only the part they need goes through their memory."""
    read: list[str] = []
    opened = safetensors.safe_open

    class Spy:
        def __init__(self, path: Path, **options: Any) -> None:
            self._file = opened(path, **options)

        def __enter__(self) -> Spy:
            self._inside = self._file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self._file.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self._inside.keys())

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self._inside.get_tensor(name)

    monkeypatch.setattr(safetensors, "safe_open", Spy)
    VisionEncoder(tiny_model, "cpu")
    every = load_file(tiny_model / "model.safetensors")
    assert sorted(read) == sorted(n for n in every if "vision_model" in n or "connector" in n)
    assert any("text_model" in name for name in every)


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
    with pytest.raises(
        UserError, match="unknown preset 'huge'; choose one of tiny, tiny-grid, smolvlm2-256m"
    ):
        init_model("huge", tmp_path / "huge")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]
