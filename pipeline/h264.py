"""What the NAL units of an H.264 packet tell: where decoding may start, and whether a picture before it is lost."""

from __future__ import annotations

from dataclasses import dataclass, field

_HIGH_PROFILES = {44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244}  # tell their colour format


class Bits:
    """Reads bits and exp-Golomb numbers; raises EOFError past the end."""

    def __init__(self, data: bytes) -> None:
        raw = data.replace(b"\0\0\3", b"\0\0")  # the 3 keeps data from looking like a start code
        self._value, self._left = int.from_bytes(raw, "big"), 8 * len(raw)

    def u(self, bits: int) -> int:
        self._left -= bits
        if self._left < 0:
            raise EOFError
        return self._value >> self._left & (1 << bits) - 1

    def ue(self) -> int:
        zeros = 0
        while not self.u(1):
            zeros += 1
        return (1 << zeros) - 1 + self.u(zeros)

    def se(self) -> int:
        code = self.ue()
        return (code + 1) // 2 if code % 2 else -(code // 2)


@dataclass(frozen=True)
class _Sequence:
    frame_num_bits: int
    gaps_allowed: bool
    separate_planes: bool


@dataclass
class FrameNumbers:
    """Follows ``frame_num``, which counts reference pictures, through a stream's packets in decoding order."""

    _sequences: dict[int, _Sequence] = field(default_factory=dict)
    _sequence_of: dict[int, int] = field(default_factory=dict)
    _last: int | None = None  # frame_num of the last reference picture

    def parameters(self, unit: bytes) -> None:
        """A parameter set, from its NAL header on; one that is malformed is left out."""
        bits = Bits(unit[1:])
        try:
            if unit[0] & 0x1F == 7:
                number, sequence = _sequence(bits)
                self._sequences[number] = sequence
            else:
                number = bits.ue()
                self._sequence_of[number] = bits.ue()
        except EOFError:
            return

    def lost_before(self, unit: bytes) -> bool:
        """Whether a reference picture before this slice is missing; False where that cannot be told."""
        idr, reference = unit[0] & 0x1F == 5, bool(unit[0] & 0x60)
        bits = Bits(unit[1:24])
        try:
            bits.ue()  # first macroblock
            bits.ue()  # slice type
            sequence = self._sequences[self._sequence_of[bits.ue()]]
            if sequence.separate_planes:
                bits.u(2)
            number = bits.u(sequence.frame_num_bits)
        except (EOFError, KeyError):
            return False
        last = self._last
        if idr or reference:
            self._last = number
        if idr or last is None or sequence.gaps_allowed:
            return False
        return number not in (last, (last + 1) % (1 << sequence.frame_num_bits))


def _sequence(bits: Bits) -> tuple[int, _Sequence]:
    profile = bits.u(8)
    bits.u(16)  # constraints, level
    number = bits.ue()
    separate_planes = False
    if profile in _HIGH_PROFILES:
        colour_format = bits.ue()
        if colour_format == 3:
            separate_planes = bool(bits.u(1))
        bits.ue(), bits.ue(), bits.u(1)  # depths, lossless
        if bits.u(1):
            for matrix in range(12 if colour_format == 3 else 8):
                if bits.u(1):
                    _skip_scaling(bits, 16 if matrix < 6 else 64)
    frame_num_bits = bits.ue() + 4
    order_type = bits.ue()
    if order_type == 0:
        bits.ue()
    elif order_type == 1:
        bits.u(1), bits.se(), bits.se()
        for _ in range(bits.ue()):
            bits.se()
    bits.ue()  # reference pictures
    return number, _Sequence(frame_num_bits, bool(bits.u(1)), separate_planes)


def _skip_scaling(bits: Bits, size: int) -> None:
    last = 8
    for _ in range(size):
        following = (last + bits.se()) % 256
        if following == 0:  # the rest repeats the last
            return
        last = following


def is_recovery_point(unit: bytes) -> bool:
    """Whether an SEI unit says that pictures are right from this one on, not only from some pictures later."""
    at = 1
    while at + 2 < len(unit):
        kind, at = _sei_number(unit, at)
        size, at = _sei_number(unit, at)
        if kind == 6:
            return at < len(unit) and bool(unit[at] & 0x80)  # exp-Golomb 0 is the single bit 1
        at += size
    return False


def _sei_number(unit: bytes, at: int) -> tuple[int, int]:
    number = 0
    while at < len(unit):
        number, at = number + unit[at], at + 1
        if unit[at - 1] < 255:
            break
    return number, at
