"""What the bytes of a packet tell about the picture in it, for the formats whose bytes are understood here."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from pipeline.h264 import FrameNumbers, is_recovery_point

if TYPE_CHECKING:
    import av

_MOST_PADDING = 8  # zero bytes behind a NAL unit that has its length in front


class Picture(NamedTuple):
    """What the bytes of one packet tell about the picture in it. When in doubt: not clean, and used."""

    clean: bool = False  # decoding may start here: every picture shown after it is right whatever was before
    recovery: bool = False  # the same, or a recovery point says so, which some encoders put in wrongly
    used: bool = True  # pictures behind it may be predicted from it
    parameters: bool = False  # holds parameter sets, which stay in force behind it
    layer: int = 0  # temporal layer: an unused one is used by none of its layer, but may be by higher ones
    broken: bool = False  # no whole picture has such bytes
    lost_before: bool = False  # a picture that others are predicted from is missing before this one


Examine = Callable[["av.Packet"], Picture]


def examiner(stream: av.VideoStream) -> Examine:
    """The reader of a stream's packets, in decoding order; of a codec not known here it certifies nothing."""
    from av.codec.codec import Properties

    codec = stream.codec_context.codec
    extradata = bytes(stream.codec_context.extradata or b"")
    read: Callable[[bytes], Picture]
    if codec.canonical_name == "h264":
        read = _H264(extradata).picture
    elif codec.canonical_name == "hevc":
        read = _Hevc(extradata).picture
    elif codec.properties & Properties.INTRA_ONLY.value:  # type: ignore[operator]  # an integer, in truth
        read = _intra_only
    else:
        read = _READERS.get(codec.canonical_name, _unknown)

    def examine(packet: av.Packet) -> Picture:
        picture = read(bytes(packet))
        return picture._replace(parameters=True) if packet.has_sidedata("new_extradata") else picture

    return examine


def _unknown(data: bytes) -> Picture:
    return Picture()


def _intra_only(data: bytes) -> Picture:
    return Picture(clean=True, recovery=True, used=False)


# ---- H.264 and HEVC: a packet is a list of NAL units, each with its length in front or behind a start code


class _NalUnits:
    """Where the units of a packet are; ``length`` is the size of the length in front of each, 0 for start codes."""

    def __init__(self, length: int) -> None:
        self.length = length

    def of(self, data: bytes) -> list[tuple[int, int]] | None:
        """Begin and end of each; None if the lengths do not fit."""
        if self.length == 0:
            starts, at = [], data.find(b"\0\0\1")
            while at >= 0:
                starts.append(at + 3)
                at = data.find(b"\0\0\1", at + 3)
            return [(a, b - 3) for a, b in pairwise([*starts, len(data) + 3]) if b - 3 > a]
        units: list[tuple[int, int]] = []
        at = 0
        while at < len(data):
            begin = at + self.length
            end = begin + int.from_bytes(data[at:begin], "big")
            if end > len(data) or end == begin:
                return None if data[at:].strip(b"\0") or len(data) - at > _MOST_PADDING else units
            units.append((begin, end))
            at = end
        return units

    def holds_zeros(self, data: bytes, begin: int, end: int) -> bool:
        """Three zero bytes inside a unit, which both formats rule out: a lost block of the file, mostly."""
        at = data.find(b"\0\0\0", begin, end)
        if at < 0:
            return False
        tail = len(data[at:end].lstrip(b"\0"))
        return bool(tail) or (self.length > 0 and end - at > _MOST_PADDING)


class _H264:
    def __init__(self, extradata: bytes) -> None:
        prefixed = extradata[:1] == b"\x01" and len(extradata) > 6  # avcC; a start code begins with 0
        self._units = _NalUnits((extradata[4] & 3) + 1 if prefixed else 0)
        self._numbers = FrameNumbers()
        if not prefixed:
            for begin, end in self._units.of(extradata) or []:
                self._parameters(extradata[begin:end])
            return
        at = 5
        for mask in (0x1F, 0xFF):  # a list of sequence, then of picture parameter sets
            count, at = (extradata[at : at + 1] or b"\0")[0] & mask, at + 1
            for _ in range(count):
                size = int.from_bytes(extradata[at : at + 2], "big")
                self._parameters(extradata[at + 2 : at + 2 + size])
                at += 2 + size

    def _parameters(self, unit: bytes) -> None:
        if unit and unit[0] & 0x1F in (7, 8):
            self._numbers.parameters(unit)

    def picture(self, data: bytes) -> Picture:
        units = self._units.of(data)
        if units is None:
            return Picture(broken=True)
        idr = recovery = used = parameters = broken = lost = sliced = False
        for begin, end in units:
            kind = data[begin] & 0x1F
            if 1 <= kind <= 5:
                idr, used = idr or kind == 5, used or bool(data[begin] & 0x60)
                lost = lost or (not sliced and self._numbers.lost_before(data[begin : begin + 24]))
                broken = broken or self._units.holds_zeros(data, begin, end)
                sliced = True
            elif kind == 6:
                recovery = recovery or is_recovery_point(data[begin:end])
            elif kind in (7, 8):
                parameters = True
                self._numbers.parameters(data[begin:end])
        return Picture(idr, idr or recovery, used or not sliced, parameters, broken=broken, lost_before=lost)


class _Hevc:
    def __init__(self, extradata: bytes) -> None:
        prefixed = extradata[:1] == b"\x01" and len(extradata) > 22  # hvcC
        self._units = _NalUnits((extradata[21] & 3) + 1 if prefixed else 0)

    def picture(self, data: bytes) -> Picture:
        units = self._units.of(data)
        if units is None:
            return Picture(broken=True)
        kind_of_slices, layer, parameters, broken = -1, 0, False, False
        for begin, end in units:
            if end - begin < 2 or data[begin] & 1 or data[begin + 1] >> 3:  # of another view or quality
                continue
            kind = data[begin] >> 1 & 0x3F
            parameters = parameters or 32 <= kind <= 34
            if kind < 32:
                kind_of_slices, layer = kind, (data[begin + 1] & 7) - 1
                broken = broken or self._units.holds_zeros(data, begin, end)
        clean = 16 <= kind_of_slices <= 21
        unused = 0 <= kind_of_slices < 16 and kind_of_slices % 2 == 0
        return Picture(clean, clean, not unused, parameters, layer, broken)


# ---- codecs whose key frames forget everything before


def _vp8(data: bytes) -> Picture:
    key = bool(data) and data[0] & 0x11 == 0x10  # bit 0: not key, bit 4: shown
    return Picture(key, key)


def _vp9(data: bytes) -> Picture:
    """Bits: marker 10, profile (two, a reserved one more for profile 3), show existing, not key, shown."""
    if not data or data[0] >> 6 != 2:
        return Picture()
    rest = data[0] & 0xF
    if data[0] & 0x30 == 0x30:
        rest = (data[0] & 7) << 1 | (data[1:2] or b"\0")[0] >> 7
    key = rest >> 1 == 0b001
    return Picture(key, key)


def _av1(data: bytes) -> Picture:
    """Open bitstream units: a key frame that is shown at once, with its sequence header."""
    at, has_sequence = 0, False
    while at < len(data):
        header = data[at]
        kind, size, shift = header >> 3 & 0xF, 0, 0
        at += 2 if header & 4 else 1
        while header & 2 and at < len(data):
            size, shift, at = size | (data[at] & 0x7F) << shift, shift + 7, at + 1
            if data[at - 1] < 0x80:
                break
        has_sequence = has_sequence or kind == 1
        if kind in (3, 6):  # a frame's header, alone or with the frame: show existing 0, type 00, shown 1
            key = has_sequence and at < len(data) and data[at] >> 4 == 0b0001
            return Picture(key, key)
        at = at + size if header & 2 else len(data)
    return Picture()


# ---- MPEG-1, 2 and 4: pictures behind start codes; B pictures are never used


def _mpeg12(data: bytes) -> Picture:
    at = data.find(b"\0\0\1\0")
    broken = _zeros_inside(data)
    if at < 0 or at + 6 > len(data):
        return Picture(broken=broken)
    kind = data[at + 5] >> 3 & 7
    header = data.find(b"\0\0\1\xb3", 0, at) >= 0
    clean = kind == 1 and header  # the header puts the quantiser matrices back
    return Picture(clean, clean, kind != 3, header, broken=broken)


def _mpeg4(data: bytes) -> Picture:
    at = data.find(b"\0\0\1\xb6")
    broken = _zeros_inside(data)
    if at < 0 or at + 5 > len(data) or data.find(b"\0\0\1\xb6", at + 4) >= 0:  # none, or two in one packet
        return Picture(broken=broken)
    kind = data[at + 4] >> 6
    header = data.find(b"\0\0\1\x20", 0, at) >= 0  # of the video object layer, as all encoders number it
    return Picture(kind == 0, kind == 0, kind != 2, header, broken=broken)


def _zeros_inside(data: bytes) -> bool:
    """Three zero bytes with neither a start code nor the end behind them."""
    at = data.find(b"\0\0\0")
    while at >= 0:
        rest = data[at:].lstrip(b"\0")
        if rest and rest[0] != 1:
            return True
        at = data.find(b"\0\0\0", len(data) - len(rest)) if rest else -1
    return False


_READERS: dict[str, Callable[[bytes], Picture]] = {
    "vp8": _vp8,
    "vp9": _vp9,
    "av1": _av1,
    "mpeg1video": _mpeg12,
    "mpeg2video": _mpeg12,
    "mpeg4": _mpeg4,
}
