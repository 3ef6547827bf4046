"""Features as float16 and int8: errors within their bounds in exact arithmetic, values worked by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from pipeline.quantize import to_float16, to_int8
from pipeline.vision import VisionEncoder
from schemas.errors import UserError

SHAPES = array_shapes(min_dims=3, max_dims=3, min_side=0, max_side=4).filter(lambda shape: shape[2] > 0)


def features(largest: float) -> st.SearchStrategy[NDArray[np.float32]]:
    """Also 0, -0 and values below the normal ones."""
    values = st.floats(-largest, largest, width=32)
    return st.one_of(
        arrays(np.float32, SHAPES, elements=values), arrays(np.float32, (2, 2, 8), elements=values)
    )


@settings(deadline=None)
@given(features(65504.0))
def test_float16_is_the_nearest(values: NDArray[np.float32]) -> None:
    half = to_float16(values, "v")
    assert (half.dtype, half.shape) == (np.float16, values.shape)
    assert half.tobytes() == b"".join(struct.pack("<e", value) for value in values.ravel().tolist())


@pytest.mark.parametrize("sign", [1, -1])
def test_float16_ends_at_65504(sign: int) -> None:
    row = np.zeros((1, 2, 4), np.float32)
    row[0, 1, 2] = 65504 * sign
    assert to_float16(row, "video v")[0, 1, 2] == 65504 * sign
    beyond = np.nextafter(np.float32(65504), np.float32(np.inf))  # float16 would round it to 65504
    row[0, 1, 2] = beyond * sign
    with pytest.raises(UserError, match=r"12\.5 % are beyond 65504"):
        to_float16(row, "video v")


def test_what_is_said_of_values_beyond() -> None:
    values = np.ones((2, 4, 25), np.float32)
    values[0, 0, :3], values[1, 2, 7] = -70_000, 81_234.5
    for convert, kind in ((to_float16, "float16"), (to_int8, "int8")):
        with pytest.raises(UserError) as raised:
            convert(values, "video cup_3")
        assert str(raised.value) == (
            f"video cup_3 has features that {kind} cannot hold: 2 % are beyond 65504, the largest is 81234.5; "
            "use --compute float32, or another checkpoint"
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("convert", "name"), [(to_float16, "float16"), (to_int8, "int8")])
def test_what_is_not_finite(convert: object, name: str, value: float) -> None:
    values = np.ones((5, 4, 10), np.float32)
    values[3, 1, 6] = value
    with pytest.raises(UserError) as raised:
        convert(values, "video cup_3")  # type: ignore[operator]
    assert str(raised.value) == (
        f"video cup_3 has features that {name} cannot hold: 0.5 % are NaN or infinite; "
        "use --compute float32, or another checkpoint"
    )


def test_int8_worked_by_hand() -> None:
    """Scales 1, 2 and 0; halves go to the even step."""
    tokens = np.array(
        [[127, 0.5, 1.5, 2.5, -0.5, -1.5], [3, 1, -254, 5, 126.9, -7.1], [0, 0, -0.0, 0, 0, 0]], np.float32
    )
    values, scale = to_int8(tokens[None], "v")
    assert (values.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (1, 3, 1))
    assert scale[0, :, 0].tolist() == [1, 2, 0]
    assert values[0].tolist() == [[127, 0, 2, 2, 0, -2], [2, 0, -127, 2, 63, -4], [0, 0, 0, 0, 0, 0]]


@settings(max_examples=300, deadline=None)
@given(features(65504.0))
def test_int8_is_within_half_a_step(tokens: NDArray[np.float32]) -> None:
    values, scale = to_int8(tokens, "v")
    assert (values.shape, scale.shape) == (tokens.shape, (*tokens.shape[:2], 1))
    exact = values.astype(np.float64) * scale.astype(np.float64)  # 8 and 24 bits: nothing is rounded
    assert (np.abs(exact - tokens.astype(np.float64)) <= scale.astype(np.float64) / 2).all()
    assert (values > -128).all()
    magnitude = np.abs(tokens).max(axis=-1, keepdims=True)
    assert ((scale == 0) == (magnitude == 0)).all()
    normal = magnitude > 1e-35
    np.testing.assert_array_equal(
        scale[normal], (magnitude[normal].astype(np.float64) / 127).astype(np.float32)
    )
    assert (np.abs(values.astype(np.int16)).max(axis=-1, keepdims=True)[normal] == 127).all()


def test_int8_of_values_next_to_a_half() -> None:
    """The numbers on either side of each half: float32 would round some of the quotients onto it."""
    largest = np.random.default_rng(0).uniform(1, 100, (200, 1)).astype(np.float32)
    halves = (np.arange(127, dtype=np.float64) + 0.5)[:-1] * (largest / np.float32(127)).astype(np.float64)
    near = halves.astype(np.float32)
    beside = [np.nextafter(near, np.float32(bound)) for bound in (-np.inf, np.inf)]
    tokens = np.concatenate([largest, near, *beside], axis=1)[None]
    values, scale = to_int8(tokens, "v")
    exact = values.astype(np.float64) * scale.astype(np.float64)
    assert (np.abs(exact - tokens.astype(np.float64)) <= scale.astype(np.float64) / 2).all()


def cosines(tokens: NDArray[np.float32]) -> NDArray[np.float64]:
    values, scale = to_int8(tokens, "v")
    again, exact = values.astype(np.float64) * scale, tokens.astype(np.float64)
    return (again * exact).sum(-1) / np.linalg.norm(again, axis=-1) / np.linalg.norm(exact, axis=-1)


def test_int8_keeps_the_direction(tiny_model: Path) -> None:
    """Of a tower's features, and of noise with tokens of very different sizes."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:128, :128]
    frames = [np.stack([2 * x, 2 * y, 255 * ((x // size + y // 9) % 2)], axis=2) for size in range(3, 19)]
    encoded = VisionEncoder(tiny_model, "cpu").encode(np.stack(frames).astype(np.uint8))
    noise = rng.standard_normal((16, 64, 960)) * 10.0 ** rng.integers(-4, 5, (16, 64, 1))
    assert cosines(encoded).min() >= 0.9999
    assert cosines(noise.astype(np.float32)).min() >= 0.9999
