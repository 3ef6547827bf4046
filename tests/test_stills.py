"""Pictures: what a file shows, marks drawn on it against a drawing of another kind, and what a broken one tells."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.stills import RADIUS, draw_marks, is_picture, marks_sha256, picture_ticks, read_picture
from pipeline.streams import DecodeError
from schemas.clock import Clock

Pixels = NDArray[np.uint8]
DIGITS = (6, 13)  # half the height and half the width that four digits take, and a pixel


def picture(height: int = 90, width: int = 120, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def saved(path: Path, image: Image.Image, **how: object) -> Path:
    image.save(path, **how)
    return path


# ---- what a file shows


@pytest.mark.parametrize("ending", ["png", "bmp", "webp"])
def test_pixels_come_back(tmp_path: Path, ending: str) -> None:
    wanted = picture()
    how = {"lossless": True} if ending == "webp" else {}
    got = read_picture(saved(tmp_path / f"x.{ending}", Image.fromarray(wanted), **how))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, wanted)


def test_a_jpeg_is_nearly_what_was_written(tmp_path: Path) -> None:
    wanted = picture(12, 16).repeat(8, axis=0).repeat(8, axis=1)
    how = {"quality": 95, "subsampling": 0}
    assert (
        np.abs(read_picture(saved(tmp_path / "x.jpg", Image.fromarray(wanted), **how)) - 1.0 * wanted).mean()
        < 3
    )


def test_the_kind_is_seen_in_the_file(tmp_path: Path) -> None:
    wanted = picture()
    np.testing.assert_array_equal(
        read_picture(saved(tmp_path / "x.jpg", Image.fromarray(wanted), format="PNG")), wanted
    )


def test_grey_pictures(tmp_path: Path) -> None:
    """Of 8 bits, of 1 bit, and of 16 bits, whose upper half is taken."""
    grey = picture()[:, :, 0]
    three = grey[:, :, None].repeat(3, axis=2)
    np.testing.assert_array_equal(read_picture(saved(tmp_path / "8.png", Image.fromarray(grey))), three)
    bits = Image.fromarray(grey > 127)
    np.testing.assert_array_equal(
        read_picture(saved(tmp_path / "1.png", bits)), np.where(three > 127, 255, 0)
    )
    deep = grey.astype(np.uint16) * 256 + picture(seed=1)[:, :, 0]
    np.testing.assert_array_equal(read_picture(saved(tmp_path / "16.png", Image.fromarray(deep))), three)


def test_a_palette_and_cmyk(tmp_path: Path) -> None:
    colours = np.array([[255, 0, 0], [0, 128, 255], [7, 8, 9]], np.uint8)
    places = np.random.default_rng(0).integers(0, 3, (20, 30), np.uint8)
    image = Image.fromarray(places, "P")
    image.putpalette(colours.tobytes())
    np.testing.assert_array_equal(read_picture(saved(tmp_path / "p.png", image)), colours[places])
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow are red
    red = read_picture(saved(tmp_path / "c.jpg", inks))
    assert np.abs(red - np.array([255.0, 0, 0])).max() < 4


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    colours, alpha = picture(), picture(seed=1)[:, :, :1]
    alpha[:30], alpha[30:60] = 0, 255
    drawn = Image.fromarray(np.concatenate([colours, alpha], axis=2))
    got = read_picture(saved(tmp_path / "x.png", drawn))
    share = alpha / 255
    assert np.abs(got - (share * colours + (1 - share) * 255)).max() <= 1
    assert (got[:30] == 255).all()
    np.testing.assert_array_equal(got[30:60], colours[30:60])


@pytest.mark.parametrize(
    ("orientation", "shown"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_a_picture_is_upright(tmp_path: Path, orientation: int, shown: object) -> None:
    """The eight orientations as the EXIF standard tells them: 6 is to be turned clockwise, 8 the other way."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "x.png", Image.fromarray(picture()), exif=exif)
    np.testing.assert_array_equal(read_picture(path), shown(picture()))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("uri", "wanted"),
    [
        ("a/b.jpg", True),
        ("a/B.JPEG", True),
        ("s3://bucket/x.png", True),
        ("x.webp", True),
        ("x.bmp", True),
        ("x.mp4", False),
        ("x.jpg/y.mp4", False),
        ("jpg", False),
        ("concat:a.jpg|b.jpg", False),
    ],
)
def test_what_is_called_a_picture(uri: str, wanted: bool) -> None:
    assert is_picture(uri) is wanted


# ---- broken files


def test_a_picture_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match=r"x\.jpg is not there$"):
        read_picture(tmp_path / "x.jpg")


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"\xff\xd8", b"no picture at all" * 99, b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_something_else(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(DecodeError, match=r"x\.jpg holds no JPEG, PNG, WebP or BMP picture"):
        read_picture(tmp_path / "x.jpg")


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").mkdir()
    with pytest.raises(DecodeError, match=r"x\.jpg cannot be read"):
        read_picture(tmp_path / "x.jpg")


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "bmp"])
def test_a_file_that_breaks_off(tmp_path: Path, ending: str) -> None:
    """At each of many places: never a picture of which a part is missing."""
    whole = saved(tmp_path / f"whole.{ending}", Image.fromarray(picture(40, 50))).read_bytes()
    path = tmp_path / f"x.{ending}"
    for size in {*range(0, len(whole) - 40, 97), len(whole) - 40}:
        path.write_bytes(whole[:size])
        with pytest.raises(DecodeError, match=f"x.{ending} "):
            read_picture(path)


def test_a_header_that_claims_too_much(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bmp", Image.fromarray(picture(8, 8)))
    data = bytearray(path.read_bytes())
    data[18:26] = (30_000).to_bytes(4, "little") * 2  # width and height
    path.write_bytes(data)
    with pytest.raises(DecodeError, match=r"x\.bmp claims more than [\d,]+ pixels; make it smaller$"):
        read_picture(path)


def test_damage_is_a_picture_or_an_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "x.jpg"
    for kind, how in (("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {})):
        whole = saved(path, Image.fromarray(picture(24, 32)), format=kind, **how).read_bytes()
        for _ in range(60):
            data = np.frombuffer(whole, np.uint8).copy()
            data[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
            path.write_bytes(data.tobytes())
            with suppress(DecodeError):
                got = read_picture(path)
                assert (got.dtype, got.ndim, got.shape[2]) == (np.uint8, 3, 3)


# ---- marks


POINTS = [
    (30.0, 40.0),
    (60.25, 40.5),
    (68.0, 47.9),
    (0.0, 0.0),
    (119.5, 89.5),
    (-8.0, 50.0),
    (90.0, 96.5),
    (300.0, 9.0),
]


def drawn_by_hand(image: Pixels, x: float, y: float) -> tuple[Pixels, NDArray[np.bool_]]:
    """Pixel by pixel: 60 parts of green and 40 of what was there; and where digits may lie."""
    got, digits = image.copy(), np.zeros(image.shape[:2], bool)
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            away = abs(row - y), abs(column - x)
            if np.hypot(*away) <= 12:
                mixed = [
                    0.6 * green + 0.4 * was
                    for green, was in zip((0, 255, 0), image[row, column], strict=True)
                ]
                got[row, column] = [int(value + 0.5) for value in mixed]
            digits[row, column] = away[0] <= DIGITS[0] and away[1] <= DIGITS[1]
    return got, digits


def test_marks_are_green_discs() -> None:
    """Also at the border and beyond it, and where one lies on another."""
    image = picture()
    drawn = draw_marks(image, POINTS, 0)
    np.testing.assert_array_equal(drawn, image)
    for number, (x, y) in enumerate(POINTS, 1):
        wanted, digits = drawn_by_hand(drawn, x, y)
        drawn = draw_marks(image, POINTS, number)
        np.testing.assert_array_equal(drawn[~digits], wanted[~digits])
        ink = (drawn != wanted).any(axis=2)
        assert (drawn[ink] == 0).all()  # of the digits, and nothing else
        assert ink.sum() >= 10 or not (12 < x < 108 and 12 < y < 78)
    np.testing.assert_array_equal(image, picture())


def number_at(image: Pixels, point: tuple[int, int]) -> bytes:
    """Where black is around a point of a white picture."""
    x, y = point
    return (image[y - 5 : y + 6, x - 13 : x + 14] == 0).all(axis=2).tobytes()


def test_a_mark_has_its_number() -> None:
    """Each another one, the same wherever it lies, near the middle of the disc, and of as many digits as it has."""
    white = np.full((120, 1000, 3), 255, np.uint8)
    far = [(40, 60)] * 150
    first = [number_at(draw_marks(white, [*far[:n], (500, 60)], n + 1), (500, 60)) for n in range(150)]
    assert len(set(first)) == 150
    assert number_at(draw_marks(white, [*far[:11], (700, 70)], 12), (700, 70)) == first[11]
    for number, width in ((7, 6), (88, 12), (100, 18)):
        black = np.frombuffer(first[number - 1], bool).reshape(11, 27)
        rows, columns = np.nonzero(black)
        assert np.abs([rows.min() + rows.max() - 10, columns.min() + columns.max() - 26]).max() <= 1
        assert width - 3 <= np.ptp(columns) + 1 <= width


def test_a_picture_as_ticks(tmp_path: Path) -> None:
    path, points = saved(tmp_path / "x.png", Image.fromarray(picture())), POINTS[:4]
    ticks = list(picture_ticks(path, Clock(4.0), 99, 0, points))
    assert [(each.tick, each.pts_s) for each in ticks] == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    for each in ticks:
        np.testing.assert_array_equal(each.image, draw_marks(picture(), points, each.tick))
    assert [each.tick for each in picture_ticks(path, Clock(4.0), 2, 0, points)] == [0, 1, 2]
    [alone] = picture_ticks(path, Clock(4.0), 5)
    np.testing.assert_array_equal(alone.image, picture())
    turned = list(picture_ticks(path, Clock(4.0), 99, 90, points))
    np.testing.assert_array_equal(turned[4].image, np.rot90(ticks[4].image))
    with pytest.raises(DecodeError, match="is not there"):
        next(picture_ticks(tmp_path / "y.png", Clock(4.0), 0))


def test_what_tells_marks_apart() -> None:
    assert marks_sha256(None) is None
    told = [
        marks_sha256(marks)
        for marks in ([], [(1, 2)], [(2, 1)], [(1, 2), (3, 4)], [(3, 4), (1, 2)], [(1.5, 2)])
    ]
    assert len(set(told)) == 6
    assert marks_sha256([[1.0, 2.0]]) == marks_sha256(((1, 2),)) == told[1]
    assert RADIUS == 12


def test_pictures_need_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from pipeline.stills import read_picture, draw_marks\n"
        "drawn = draw_marks(read_picture(sys.argv[1]), [(5, 5)], 1)\n"
        "print(drawn.shape, {'torch', 'av', 'transformers'} & set(sys.modules))"
    )
    path = saved(tmp_path / "x.png", Image.fromarray(picture()))
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "(90, 120, 3) set()"
