"""Features to the types a cache keeps: float16, or int8 with a scale for each token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from schemas.errors import UserError
from schemas.shards import FeatureType

_LARGEST = float(np.finfo(np.float16).max)
_STEPS = np.float32(127)
_SMALLEST = np.finfo(np.float32).tiny


def to_float16(features: NDArray[np.float32], what: str) -> NDArray[np.float16]:
    """Features rounded to float16.

    Args:
        what: whose features they are, for the message.

    Raises:
        UserError: values that are not finite or beyond 65504.
    """
    _check_range(features, "float16", what)
    return features.astype(np.float16)


def to_int8(features: NDArray[np.float32], what: str) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Features in 255 steps, each token with a scale of its own: ``values * scale`` is within half a step of them.

    A token's scale is its largest magnitude / 127, and 0 where all of it is 0. Halves go to the even step.

    Args:
        features: float32 ``[n, tokens, dim]``.
        what: whose features they are, for the message.

    Returns:
        int8 ``[n, tokens, dim]`` and float32 ``[n, tokens, 1]``.

    Raises:
        UserError: values that are not finite, or beyond 65504: they are read as float16.
    """
    _check_range(features, "int8", what)
    magnitude = np.maximum(features.max(axis=-1, keepdims=True), -features.min(axis=-1, keepdims=True))
    # Below float32's normal numbers a scale would be too coarse: the quotient could pass 127.
    scale = np.where(magnitude > 0, np.maximum(magnitude / _STEPS, _SMALLEST), np.float32(0))
    divisor = np.where(scale > 0, scale, 1).astype(np.float64)  # float32 rounds some quotients onto a half
    values = np.empty(features.shape, np.int8)
    for tick in range(len(features)):  # one at a time stays in the processor's cache
        values[tick] = np.rint(features[tick] / divisor[tick])
    return values, scale


def as_cached(features: NDArray[np.float32], dtype: FeatureType, what: str) -> NDArray[np.float16]:
    """Features as a reader gets them from a cache of that type.

    Raises:
        UserError: values that the type cannot hold.
    """
    if dtype == "float16":
        return to_float16(features, what)
    values, scale = to_int8(features, what)
    return np.multiply(values, scale, dtype=np.float32).astype(np.float16)


def _check_range(features: NDArray[np.float32], kind: str, what: str) -> None:
    largest = float(max(features.max(initial=0), -features.min(initial=0)))
    if not np.isfinite(largest):
        share = float(np.mean(~np.isfinite(features)))
        raise UserError(
            f"{what} has features that {kind} cannot hold: {_percent(share)} are NaN or infinite; "
            "use --compute float32, or another checkpoint"
        )
    if largest > _LARGEST:
        share = float(np.mean(np.abs(features) > _LARGEST))
        raise UserError(
            f"{what} has features that {kind} cannot hold: {_percent(share)} are beyond 65504, the largest is "
            f"{largest:.6g}; use --compute float32, or another checkpoint"
        )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
