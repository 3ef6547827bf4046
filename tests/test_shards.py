"""Shard files against the libraries that others read them with, and against files that no one should believe."""

from __future__ import annotations

import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from pipeline.shard_reader import ShardReader
from pipeline.shards import ShardCache, reader_of, writer_of
from schemas.errors import UserError
from schemas.shards import Fingerprint, Storage
from schemas.tables import TABLES

STORAGES: tuple[Storage, ...] = ("tar", "h5")
each_storage = pytest.mark.parametrize("storage", STORAGES)
Records = dict[str, dict[str, Any]]


def write(path: Path, records: Records) -> Path:
    with writer_of("h5" if path.suffix == ".h5" else "tar", path) as writer:
        for key, members in records.items():
            writer.add(key, members)
    return path


def frames_table(session_id: str, ticks: int, steps: int, first: int = 0, seed: int = 0) -> pa.Table:
    """Rows of the frames table with nulls, empty texts and texts beyond ASCII."""
    rng = np.random.default_rng(seed)
    words = [None, "", "Sehr gut: weiter!", "次へ 👍"]
    rows = [
        {
            "session_id": session_id,
            "split": "train",
            "tick": tick,
            "t_s": tick / 2,
            "speak": bool(rng.integers(2)),
            "response": words[rng.integers(4)],
            "dst_update": bool(rng.integers(2)),
            "dst_state": rng.integers(0, 3, steps).tolist(),
            "transitions": rng.integers(0, 4, steps).tolist(),
            "mistake": [None, False, True][rng.integers(3)],
        }
        for tick in range(first, first + ticks)
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["frames"])


def some_records() -> Records:
    rng = np.random.default_rng(5)
    return {
        "b/video/00000": {
            "vision": rng.normal(size=(64, 4, 8)).astype(np.float16),
            "pts": np.arange(64) / 2,
            "meta": {"video_id": "b/video", "weight": 0.1, "größe": [1, None, True]},
        },
        "b/video/00001": {
            "vision": rng.integers(-127, 128, (3, 4, 8)).astype(np.int8),
            "scale": rng.random((3, 4, 1)).astype(np.float32),
            "pts": np.array([32.0, np.nan, 33.0]),
            "meta": {},
        },
        f"a{'x' * 120}/session": {
            "frames": frames_table("session", 50, 3),
            "turns": [{"text": "次へ 👍"}],
            "steps": [],
        },
        "z": {"meta": {}},
    }


def assert_same(reader: ShardReader, records: Records) -> None:
    assert reader.keys == list(records)
    for key, members in records.items():
        assert reader.members(key) == list(members)
        for member, value in members.items():
            if isinstance(value, pa.Table):
                assert reader.table(key, member).equals(value)
            elif isinstance(value, np.ndarray):
                got = reader.array(key, member)
                assert (got.dtype, got.shape) == (value.dtype, value.shape)
                np.testing.assert_array_equal(got, value)
            else:
                assert reader.json(key, member) == value


# ---- what is written is read, by this reader and by others


@each_storage
def test_records_come_back(tmp_path: Path, storage: Storage) -> None:
    records = some_records()
    assert_same(reader_of(write(tmp_path / f"a.{storage}", records)), records)
    assert reader_of(write(tmp_path / f"empty.{storage}", {})).keys == []


_types = st.sampled_from(
    [np.float16, np.float32, np.float64, np.int8, np.uint8, np.int16, np.int32, np.int64]
)
_arrays = _types.flatmap(
    lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0))
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
_row = st.fixed_dictionaries(
    {
        "session_id": st.text(),
        "split": st.text(max_size=3),
        "tick": st.integers(-(2**31), 2**31 - 1),
        "t_s": st.floats(allow_nan=False),
        "speak": st.booleans(),
        "response": st.none() | st.text(),
        "dst_update": st.booleans(),
        "mistake": st.none() | st.booleans(),
    }
)


@st.composite
def _tables(draw: st.DrawFn) -> pa.Table:
    steps = draw(st.integers(0, 4))
    states = st.lists(st.integers(-128, 127), min_size=steps, max_size=steps)
    rows = draw(st.lists(_row, max_size=6))
    rows = [row | {"dst_state": draw(states), "transitions": draw(states)} for row in rows]
    return pa.Table.from_pylist(rows, schema=TABLES["frames"])


@each_storage
@given(array=_arrays, text=st.lists(_json), frames=_tables())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_anything_comes_back(
    tmp_path: Path, storage: Storage, array: NDArray[Any], text: list[Any], frames: pa.Table
) -> None:
    records = {"k": {"array": array, "text": text, "frames": frames}}
    assert_same(reader_of(write(tmp_path / f"a.{storage}", records)), records)


def test_webdataset_reads_a_tar(tmp_path: Path) -> None:
    records = some_records()
    path = write(tmp_path / "a.tar", records)
    found = {each["__key__"]: each for each in wds.WebDataset(str(path), shardshuffle=False).decode()}
    assert list(found) == list(records)
    for key, members in records.items():
        for member, value in members.items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(found[key][f"{member}.npy"], value)
            elif isinstance(value, pa.Table):
                assert pa.ipc.open_file(found[key][f"{member}.arrow"]).read_all().equals(value)
            else:
                assert found[key][f"{member}.json"] == value


def test_h5py_reads_an_h5(tmp_path: Path) -> None:
    records = some_records()
    with h5py.File(write(tmp_path / "a.h5", records)) as file:
        for key, members in records.items():
            group = file[key]
            assert set(group) == set(members)
            for member, value in members.items():
                if isinstance(value, np.ndarray):
                    np.testing.assert_array_equal(group[member][()], value)
                    assert group[member].dtype == value.dtype
                    assert (group[member].chunks, group[member].compression) == (None, None)
                elif isinstance(value, pa.Table):
                    assert rows_of(group[member]) == value.to_pylist()
                else:
                    assert json.loads(group[member][()]) == value


def rows_of(group: h5py.Group) -> list[dict[str, Any]]:
    """A table in an HDF5 file, with nothing but h5py."""

    def text(name: str) -> list[str | None]:
        values = json.loads(group[f"{name}_values"][()])
        return [values[at] if at >= 0 else None for at in group[name][()]]

    def boolean(name: str) -> list[bool | None]:
        return [{-1: None, 0: False, 1: True}[value] for value in group[name][()]]

    columns = {name: text(name) for name in ("session_id", "split", "response")}
    columns |= {name: boolean(name) for name in ("speak", "dst_update", "mistake")}
    columns |= {name: group[name][()].tolist() for name in ("tick", "t_s", "dst_state", "transitions")}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    """In another process, at another time, from arrays and tables that lie otherwise in memory."""
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path; import numpy as np, pyarrow as pa\n"
        "from test_shards import frames_table, some_records, write\n"
        "records = some_records()\n"
        "vision = records['b/video/00000']['vision']\n"
        "records['b/video/00000']['vision'] = np.asfortranarray(vision)\n"
        "session = records[[*records][2]]\n"
        "more = pa.concat_tables([frames_table('x', 3, 3, seed=9), session['frames'], frames_table('y', 7, 3)])\n"
        "session['frames'] = more.combine_chunks().slice(3, 50)\n"
        "for name in ('b.tar', 'b.h5'): write(Path(sys.argv[1]) / name, records)\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "PYTHONPATH": "."}
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, env=environment, check=True)
    for storage in STORAGES:
        ours = write(tmp_path / f"a.{storage}", some_records())
        assert ours.read_bytes() == (tmp_path / f"b.{storage}").read_bytes()


def test_a_tar_names_no_one(tmp_path: Path) -> None:
    with tarfile.open(write(tmp_path / "a.tar", some_records())) as tar:
        about = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar}
    assert about == {(0, 0, 0, "", "", 0o644)}


@each_storage
@pytest.mark.parametrize("key", ["", "/a", "a/", "../a", "a/../b", "a.b", "a\0b", "a b", "ä", "a//b"])
def test_keys_that_cannot_name_a_record(tmp_path: Path, storage: Storage, key: str) -> None:
    with (
        pytest.raises(UserError, match=r"no record can be called .* an id of its own"),
        writer_of(storage, tmp_path / "a") as writer,
    ):
        writer.add(key, {"meta": {}})


@each_storage
def test_what_a_writer_refuses(tmp_path: Path, storage: Storage) -> None:
    with writer_of(storage, tmp_path / f"a.{storage}") as writer:
        writer.add("k", {"meta": {}})
        with pytest.raises(UserError, match=r"would hold two records 'k'; give each"):
            writer.add("k", {"meta": {}})
        for array in (np.array([object()]), np.zeros(3, ">f4"), np.zeros(3, np.complex64), np.array(["a"])):
            with pytest.raises(TypeError, match="which no shard holds"):
                writer.add(f"x{array.dtype.kind}{array.dtype.itemsize}", {"array": array})
        if storage == "h5":
            with pytest.raises(UserError, match=r"two records would share k/meta"):
                writer.add("k/meta", {"meta": {}})
            uneven = frames_table("s", 2, 1).to_pylist()
            uneven[1]["dst_state"] = [0, 1]
            with pytest.raises(
                UserError, match=r"column dst_state of a session has lists of 1 and of 2 states"
            ):
                writer.add("s", {"frames": pa.Table.from_pylist(uneven, schema=TABLES["frames"])})


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    """Also by libhdf5, which says it in its own way. A limit on the size of files stands for the disk."""
    code = (
        "import resource, signal, sys; from pathlib import Path; import numpy as np\n"
        "from pipeline.shards import writer_of\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "for storage in ('tar', 'h5'):\n"
        "    try:\n"
        "        with writer_of(storage, Path(sys.argv[1]) / storage) as writer:\n"
        "            for n in range(10): writer.add(f'k{n}', {'array': np.ones(100_000, np.uint8)})\n"
        "    except OSError as error: print(storage, error.errno)\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["tar", "27", "h5", "27"]


# ---- reading by memory map


@each_storage
def test_arrays_are_views_of_the_file(tmp_path: Path, storage: Storage) -> None:
    path = write(tmp_path / f"a.{storage}", some_records())
    reader = reader_of(path)
    for array in (
        reader.array("b/video/00000", "vision"),
        reader.table(reader.keys[2], "frames")["t_s"].chunk(0).to_numpy(),
    ):
        assert not array.flags.writeable
        assert array.flags.aligned
        assert any(begin <= array.ctypes.data < end for begin, end in maps_of(path))
    assert reader.array("b/video/00000", "vision").ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="read-only"):
        reader.array("b/video/00000", "vision")[0] = 1


def maps_of(path: Path) -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    return [(int(begin, 16), int(end, 16)) for begin, end in spans]


@each_storage
def test_views_outlive_their_reader_and_its_file(tmp_path: Path, storage: Storage) -> None:
    records = some_records()
    path = write(tmp_path / f"a.{storage}", records)
    reader = reader_of(path)
    array = reader.array("b/video/00000", "vision")
    del reader
    path.unlink()
    np.testing.assert_array_equal(array, records["b/video/00000"]["vision"])


@each_storage
def test_no_descriptors_are_kept(tmp_path: Path, storage: Storage) -> None:
    path = write(tmp_path / f"a.{storage}", some_records())
    before = len(os.listdir("/proc/self/fd"))
    readers = [reader_of(path) for _ in range(50)]
    held = [reader.array("b/video/00000", "vision") for reader in readers]
    assert len(held) == 50
    assert len(os.listdir("/proc/self/fd")) == before


# ---- files that are not what they seem


def refused(path: Path, *parts: str) -> str:
    """The sentence with which all of a file is read and something in it refused."""
    with pytest.raises(UserError) as raised:
        read_all(reader_of(path))
    sentence = str(raised.value)
    assert sentence.startswith(f"{path} is not a whole shard (")
    assert sentence.endswith("; remove it and run 'dst cache-features' again")
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence
    return sentence


def read_all(reader: ShardReader) -> None:
    """Each member as what its name says."""
    for key in reader.keys:
        for member in reader.members(key):
            if member in ("vision", "pts", "scale", "array"):
                reader.array(key, member)
            elif member == "frames":
                reader.table(key, member)
            else:
                reader.json(key, member)


Entry = tuple[tarfile.TarInfo, bytes]


def tar_of(path: Path, entries: Iterable[Entry], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for info, data in entries:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def entry(name: str, data: bytes = b"{}", **about: Any) -> Entry:
    info = tarfile.TarInfo(name)
    for field, value in about.items():
        setattr(info, field, value)
    return info, data


@pytest.mark.parametrize(
    ("entries", "part"),
    [
        ([entry("k.meta.json", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "not a plain file"),
        ([entry("k.meta.json", b"", type=tarfile.LNKTYPE, linkname="x")], "not a plain file"),
        ([entry("k.meta.json", b"", type=tarfile.CHRTYPE)], "not a plain file"),
        ([entry("k.meta.json", b"", type=tarfile.FIFOTYPE)], "not a plain file"),
        ([entry("k", b"", type=tarfile.DIRTYPE)], "not a plain file"),
        ([entry("k.meta.json", type=tarfile.GNUTYPE_SPARSE)], "not a plain file"),
        ([entry("k.meta.json", pax_headers={"GNU.sparse.size": "1"})], "sets b'GNU.sparse.size'"),
        ([entry("k.meta.json", pax_headers={"linkpath": "x"})], "sets b'linkpath'"),
        ([entry("../k.meta.json")], "no record can be called '../k'"),
        ([entry("/etc/k.meta.json")], "no record can be called '/etc/k'"),
        ([entry(f"{'x/' * 90}../k.meta.json")], "no record can be called"),
        ([entry("k.x.meta.json")], "no record can be called 'k.x'"),
        ([entry("k.meta.pickle")], "'k.meta.pickle', which is no member"),
        ([entry("k.json")], "'k.json', which is no member"),
        ([entry("readme")], "no record can be called"),
        ([entry("k.meta.json"), entry("k.meta.json")], "it holds 'k' twice"),
        ([entry("k.meta.json"), entry("l.meta.json"), entry("k.turns.json")], "it holds 'k' twice"),
        ([entry("k.vision.json")], "k, vision: it is json, not npy"),
        ([entry("k.frames.arrow", b"ARROW1\0\0")], "k, frames: "),
        ([entry("k.meta.json", b"")], "k, meta: not JSON"),
        ([entry("k.meta.json", b"\xff")], "k, meta: not JSON"),
        ([entry("k.meta.json", b'"' + b"x" * 9)], "k, meta: not JSON"),
        ([entry("k.meta.json", b"[" * 100_000)], "k, meta: not JSON"),
        ([entry("k.meta.json", b'{"a":' * 100_000)], "k, meta: not JSON"),
        ([entry("k.meta.json", b"9" * 10_000)], "k, meta: not JSON"),
        ([entry("k.meta.json", b'["\\ud800"]')], "k, meta: not JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tars_that_are_refused(tmp_path: Path, entries: list[Entry], part: str) -> None:
    refused(tar_of(tmp_path / "a.tar", entries), part)


def test_a_tar_of_another_kind(tmp_path: Path) -> None:
    refused(tar_of(tmp_path / "a.tar", [entry("k.meta.json")], tarfile.GNU_FORMAT), "not of a POSIX tar")
    plain = tar_of(tmp_path / "b.tar", [entry("k.meta.json")]).read_bytes()
    (tmp_path / "c.tar").write_bytes(plain + plain)
    refused(tmp_path / "c.tar", "it ends inside")
    with tarfile.open(tmp_path / "d.tar", "w:gz") as tar:
        tar.addfile(entry("k.meta.json")[0])
    refused(tmp_path / "d.tar")
    path = tar_of(tmp_path / "e.tar", [entry("k.meta.json", mtime=12.5)])
    assert reader_of(path).json("k", "meta") == {}  # as webdataset's own writer writes them
    with wds.TarWriter(str(tmp_path / "f.tar")) as writer:
        writer.write({"__key__": "k/1", "vision.npy": np.ones((2, 3), np.float16), "meta.json": {"a": 1}})
    reader = reader_of(tmp_path / "f.tar")
    assert reader.array("k/1", "vision").tolist() == [[1, 1, 1], [1, 1, 1]]
    assert reader.json("k/1", "meta") == {"a": 1}


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


def plain_header(dtype: str, shape: str, fortran: bool = False) -> str:
    return f"{{'descr': '{dtype}', 'fortran_order': {fortran}, 'shape': {shape}, }}"


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}]), allow_pickle=True)
    return buffer.getvalue()


NPY = {
    "objects": (pickled(), "not a plain array"),
    "fortran": (npy(plain_header("<f4", "(2, 2)", True), bytes(16)), "not a plain array"),
    "big endian": (npy(plain_header(">f4", "(2, 2)"), bytes(16)), "not a plain array"),
    "complex": (npy(plain_header("<c8", "(2,)"), bytes(16)), "not a plain array"),
    "negative": (npy(plain_header("<f4", "(-2, -2)"), bytes(16)), "not a plain array"),
    "expression": (npy("__import__('os').abort()"), "not a plain array"),
    "nested": (npy("(" * 60_000), "not a plain array"),
    "too long": (npy(plain_header("<f4", "(2, 3)"), bytes(16)), "its size is not its array's"),
    "too short": (npy(plain_header("<f4", "(2, 1)"), bytes(16)), "its size is not its array's"),
    "huge": (npy(plain_header("<f4", "(999999999999999, 999999999999999)"), bytes(16)), "it breaks off"),
    "huge and empty": (npy(plain_header("<f4", "(0, 999999999999999, 999999999999999)")), "array"),
    "many dimensions": (npy(plain_header("<f4", "(" + "1, " * 70 + ")"), bytes(4)), "not a plain array"),
    "version 9": (npy(plain_header("<f4", "(4,)"), bytes(16), b"\x09\x00"), "not an .npy file"),
    "cut in its header": (npy(plain_header("<f4", "(4,)"), bytes(16))[:30], "it breaks off"),
    "cut in its first bytes": (b"\x93NUMPY\x01\x00", "not an .npy file"),
    "empty": (b"", "not an .npy file"),
}


@pytest.mark.parametrize("case", NPY)
def test_npy_files_that_are_refused(tmp_path: Path, case: str) -> None:
    data, part = NPY[case]
    refused(tar_of(tmp_path / "a.tar", [entry("k.array.npy", data), entry("k.meta.json", b"x" * 999)]), part)


@pytest.mark.parametrize(
    "array",
    [np.zeros((0, 4), np.float32), np.array(3.5), np.ones((1,), np.int8), np.ones((1, 2, 3, 4, 5), np.uint8)],
    ids=["empty", "number", "bytes", "5d"],
)
@pytest.mark.parametrize("version", [(1, 0), None])
def test_npy_files_of_numpy(tmp_path: Path, array: NDArray[Any], version: tuple[int, int] | None) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version)
    path = tar_of(tmp_path / "a.tar", [entry("k.array.npy", buffer.getvalue())])
    np.testing.assert_array_equal(reader_of(path).array("k", "array"), array)


def test_a_tar_cut_anywhere(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.tar", some_records()).read_bytes()
    path = tmp_path / "cut.tar"
    ends = sorted(
        {*range(0, len(whole), 512), *np.random.default_rng(0).integers(0, len(whole), 50).tolist()}
    )
    needed = (
        len(whole.rstrip(b"\0")) // 512 * 512 + 3 * 512
    )  # two blocks of zeros; more only pad to ten kilobytes
    assert needed < len(whole)
    for end in (end for end in ends if end < needed):
        path.write_bytes(whole[:end])
        refused(path)


def test_zeros_in_place_of_a_header(tmp_path: Path) -> None:
    """Which is how a tar ends: what lies behind must not go unnoticed."""
    whole = bytearray(write(tmp_path / "a.tar", some_records()).read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        headers = [member.offset for member in tar]
    for at in headers[
        :-1
    ]:  # the last is followed by nothing but zeros: that a record went there only the ledger tells
        path = tmp_path / "b.tar"
        path.write_bytes(whole[:at] + bytes(1024) + whole[at + 1024 :])
        refused(path, "it ends inside")


def test_bits_that_fell_over(tmp_path: Path) -> None:
    """In a header of a tar, in the index of an HDF5 file, in the text of a table."""
    for storage in STORAGES:
        path = write(tmp_path / f"a.{storage}", {"k": {"frames": frames_table("k", 9, 2), "meta": {"a": 1}}})
        whole = path.read_bytes()
        begin = 0 if storage == "tar" else whole.rindex(b'[["k",{"frames"')
        for at in (
            (begin + 2, begin + 126, begin + 150, begin + 157)
            if storage == "tar"
            else (begin + 3, begin + 40)
        ):
            for bit in (0, 4):
                path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
                refused(path, "a header" if storage == "tar" else "the checksum of its index is wrong")
        path.write_bytes(whole.replace("次へ".encode(), b"\xff" * 6))
        refused(path, "k, frames: ")


# ---- the same for HDF5


def signed(path: Path, change: Callable[[list[Any]], None]) -> Path:
    """A shard whose index was changed by someone who can compute a checksum."""
    write(
        path,
        {"k": {"array": np.arange(12, dtype=np.int32), "meta": {"a": 1}, "frames": frames_table("k", 4, 2)}},
    )
    data = path.read_bytes()
    size, at = (int(n) for n in re.findall(rb"json: (\d+) at (\d+)", data[:512])[0])
    index = json.loads(data[at : at + size])
    change(index)
    text = json.dumps(index).encode()
    sign = f"index.json: {len(text)} at {len(data)}, crc32 {zlib.crc32(text)}\n"
    head = f"dst shard of {len(data) + len(text)} bytes, {sign}".encode()
    path.write_bytes(head.ljust(512, b"\0") + data[512:] + text)
    return path


H5: dict[str, tuple[Callable[[list[Any]], object], str]] = {
    "beyond the end": (lambda index: index[0][1]["array"].__setitem__(2, 10**9), "k, array: it breaks off"),
    "longer than the file": (
        lambda index: index[0][1]["array"].__setitem__(1, [10**9]),
        "k, array: it breaks off",
    ),
    "negative offset": (lambda index: index[0][1]["array"].__setitem__(2, -8), "its index: "),
    "negative length": (lambda index: index[0][1]["array"].__setitem__(1, [-1]), "its index: "),
    "length that is text": (lambda index: index[0][1]["array"].__setitem__(1, "12"), "its index: "),
    "length that is a fraction": (lambda index: index[0][1]["array"].__setitem__(1, [1.5]), "its index: "),
    "many dimensions": (lambda index: index[0][1]["array"].__setitem__(1, [1] * 99), "k, array: "),
    "empty and huge": (lambda index: index[0][1]["array"].__setitem__(1, [0, 2**62, 2**62]), "k, array: "),
    "objects": (lambda index: index[0][1]["array"].__setitem__(0, "|O"), "k, array: not a plain array"),
    "another kind": (
        lambda index: index[0][1]["array"].__setitem__(0, "json"),
        "k, array: not a plain array",
    ),
    "a number for JSON": (lambda index: index[0][1]["meta"].__setitem__(0, "<f8"), "k, meta: not JSON"),
    "JSON with two lengths": (lambda index: index[0][1]["meta"].__setitem__(1, [2, 2]), "k, meta: not JSON"),
    "no table": (
        lambda index: index[0][1].__setitem__("frames", ["json", [2], 512]),
        "k, frames: not a table",
    ),
    "an array that is a table": (lambda index: index[0][1].__setitem__("array", {}), "k, array: not a plain"),
    "no such column": (lambda index: index[0][1]["frames"].pop("tick"), "column tick is not as it should be"),
    "wrong column": (lambda index: index[0][1]["frames"]["tick"].__setitem__(0, "<f4"), "column tick is not"),
    "shorter column": (lambda index: index[0][1]["frames"]["tick"].__setitem__(1, [3]), "k, frames: "),
    "texts that are states": (
        lambda index: index[0][1]["frames"].__setitem__("split", index[0][1]["frames"]["tick"]),
        "k, frames: ",
    ),
    "no texts": (lambda index: index[0][1]["frames"].pop("split_values"), "column split are not a list"),
    "bad name": (lambda index: index[0].__setitem__(0, "../k"), "no record can be called '../k'"),
    "bad member": (
        lambda index: index[0][1].__setitem__("a/b", index[0][1]["meta"]),
        "no record can be called 'k'",
    ),
    "twice": (lambda index: index.append(index[0]), "it holds a record twice"),
    "a mapping": (lambda index: index.__setitem__(0, {"k": 1}), "its index: "),
}


@pytest.mark.parametrize("case", H5)
def test_h5_indexes_that_are_refused(tmp_path: Path, case: str) -> None:
    change, part = H5[case]
    refused(signed(tmp_path / "a.h5", lambda index: (change(index), None)[1]), part)


def test_an_index_that_says_the_truth_is_read(tmp_path: Path) -> None:
    reader = reader_of(signed(tmp_path / "a.h5", lambda index: None))
    assert reader.array("k", "array").tolist() == list(range(12))
    assert reader.table("k", "frames").equals(frames_table("k", 4, 2))


def test_values_that_a_column_cannot_hold(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", {"k": {"frames": frames_table("k", 40, 2)}})
    whole = path.read_bytes()
    for column, value in (("speak", 2), ("mistake", -2), ("response", 77), ("response", -2), ("speak", -1)):
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            file["k/frames"][column][3] = value
        refused(path, "k, frames: ")


def test_other_h5_files(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["k/array"] = np.arange(3)
    refused(tmp_path / "a.h5", "HDF5 files of other programs are not read")
    whole = write(tmp_path / "b.h5", some_records()).read_bytes()
    rng = np.random.default_rng(0)
    for end in (0, 100, 511, 512, 513, *rng.integers(514, len(whole), 40).tolist()):
        (tmp_path / "b.h5").write_bytes(whole[:end])
        refused(tmp_path / "b.h5")
    with pytest.raises(UserError, match=r"gone\.h5 is not a whole shard \(No such file or directory\)"):
        reader_of(tmp_path / "gone.h5")


def test_asking_for_what_is_not_there(tmp_path: Path) -> None:
    for storage in STORAGES:
        reader = reader_of(write(tmp_path / f"a.{storage}", some_records()))
        with pytest.raises(UserError, match=r"it has no record 'x'"):
            reader.array("x", "vision")
        with pytest.raises(UserError, match=r"b/video/00000, scale: there is none"):
            reader.array("b/video/00000", "scale")


# ---- a cache of several shards

TOKENS, DIM = 4, 8
VIDEOS = {"b/video": 150, "a": 64, "c": 7, "d": 129}  # ticks
SHARD_OF = {"b/video": 0, "a": 0, "c": 1, "d": 2}
SESSIONS = {
    "one": ("b/video", 60, 90),
    "two/x": ("c", 0, 7),
    "three": ("d", 64, 65),
}  # video, first tick, ticks


def int8_of(features: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    scale = np.abs(features).max(axis=2, keepdims=True) / 127
    return np.rint(features / scale).astype(np.int8), scale.astype(np.float32)


def session_members(session_id: str, video: str, first: int, ticks: int, steps: int = 2) -> dict[str, Any]:
    row = {
        "session_id": session_id,
        "video_id": video,
        "source": "hand",
        "split": "train",
        "goal": "Tee kochen",
        "knowledge": None,
        "first_tick": first,
        "num_ticks": ticks,
        "tick_hz": 2.0,
        "num_steps": steps,
        "user_type": None,
        "dialog_origin": "human",
        "quality": 0.5,
    }
    step = {"session_id": session_id, "step": 0, "step_id": "s", "name": "pour", "parent": None}
    turn = {
        "session_id": session_id,
        "turn": 0,
        "tick": first,
        "t_s": first / 2,
        "role": "user",
        "text": "Na? 👍",
    }
    return {
        "frames": frames_table(session_id, ticks, steps, first),
        "turns": [turn | {"labels": [], "progress": None, "source_row": None}],
        "steps": [
            step | {"step": k, "spans": [{"start_s": 1.0, "end_s": 2.0}], "source_rows": []}
            for k in range(steps)
        ],
        "meta": row | {"uri": f"{video}.mp4", "rotation_deg": 0},
    }


def enter(folder: Path, name: str, videos: dict[str, int]) -> None:
    """The ledger's entry of a finished file."""
    data = (folder / name).read_bytes()
    about = {"needed": 1, "rotation_deg": 0, "identity": None}
    record = {
        "file": name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "key": "k",
        "videos": {video: {"ticks": ticks} | about for video, ticks in videos.items()},
    }
    (folder / "ledger").mkdir(exist_ok=True)
    (folder / "ledger" / f"{Path(name).stem}.json").write_text(json.dumps(record))


def make_cache(folder: Path, storage: Storage, dtype: str = "float16") -> dict[str, NDArray[np.float32]]:
    """A cache, and what was put into it. Every fifth tick of a video is unreadable."""
    folder.mkdir()
    about = {
        "model": "m",
        "vision_sha256": "0",
        "preprocessing": {},
        "tick_hz": 2.0,
        "tokens_per_frame": TOKENS,
    }
    Fingerprint.model_validate(about | {"dim": DIM, "dtype": dtype, "storage": storage}).write(folder)
    rng = np.random.default_rng(1)
    truth = {}
    for number in range(3):
        records: Records = {}
        videos = {video: ticks for video, ticks in VIDEOS.items() if SHARD_OF[video] == number}
        for video, ticks in videos.items():
            features = truth[video] = rng.normal(size=(ticks, TOKENS, DIM), scale=10).astype(np.float32)
            pts = np.arange(ticks) / 2
            pts[::5] = np.nan
            for chunk in range(math.ceil(ticks / 64)):
                here = slice(64 * chunk, 64 * chunk + 64)
                members: dict[str, Any] = {"vision": features[here].astype(np.float16)}
                if dtype == "int8":
                    members["vision"], members["scale"] = int8_of(features[here])
                meta = {"video_id": video, "first_tick": 64 * chunk, "num_ticks": len(pts[here])}
                records[f"{video}/{chunk:05d}"] = {**members, "pts": pts[here], "meta": meta}
        name = f"vision-{number:05d}.{storage}"
        write(folder / name, records)
        enter(folder, name, videos)
        labels = f"labels-{number:05d}.{storage}"
        of_it = {key: args for key, args in SESSIONS.items() if args[0] in videos}
        write(folder / labels, {key: session_members(key, *args) for key, args in of_it.items()})
        enter(folder, labels, {})
    return truth


@each_storage
def test_any_ticks_of_any_video(tmp_path: Path, storage: Storage) -> None:
    truth = make_cache(tmp_path / "cache", storage)
    cache = ShardCache(tmp_path / "cache")
    rng = np.random.default_rng(2)
    for video, features in truth.items():
        assert cache.num_ticks(video) == len(features)
        for first in [0, 63, 64, len(features) - 1, *rng.integers(0, len(features), 20).tolist()]:
            for count in {0, 1, 64, int(rng.integers(0, 200))}:
                end = min(first + count, len(features))
                wanted = features[first:end].astype(np.float16)
                if first >= len(features):
                    continue
                got = cache.features(video, first, end - first)
                assert got.dtype == np.float16
                np.testing.assert_array_equal(got, wanted)
                batch = np.full((len(wanted) + 2, TOKENS, DIM), 7, np.float16)
                assert cache.features(video, first, end - first, out=batch[1:-1]).base is batch
                np.testing.assert_array_equal(batch[1:-1], wanted)
                assert (batch[[0, -1]] == 7).all()
                readable = cache.readable(video, first, end - first)
                assert readable.tolist() == [tick % 5 != 0 for tick in range(first, end)]
    assert not cache.features("b/video", 70, 50).flags.writeable  # of one chunk: nothing was copied


@each_storage
def test_int8_is_value_times_scale(tmp_path: Path, storage: Storage) -> None:
    truth = make_cache(tmp_path / "cache", storage, "int8")
    cache = ShardCache(tmp_path / "cache")
    for video, features in truth.items():
        values, scale = int8_of(features)
        wanted = (values.astype(np.float64) * scale).astype(np.float32).astype(np.float16)
        got = cache.features(video, 0, len(features))
        assert got.dtype == np.float16
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(cache.features(video, 3, 2), wanted[3:5])
        assert np.abs(got - features).max() <= scale.max() / 2 + 0.03


@each_storage
def test_sessions(tmp_path: Path, storage: Storage) -> None:
    make_cache(tmp_path / "cache", storage)
    cache = ShardCache(tmp_path / "cache")
    assert cache.session_ids == sorted(SESSIONS)
    for session_id, (video, first, ticks) in SESSIONS.items():
        members = session_members(session_id, video, first, ticks)
        session = cache.session(session_id)
        assert (session.session_id, session.first_tick, session.num_ticks) == (session_id, first, ticks)
        assert (session.meta, session.turns, session.steps) == tuple(
            members[name] for name in ("meta", "turns", "steps")
        )
        assert session.frames.equals(members["frames"])
        assert session.column("dst_state").tolist() == members["frames"]["dst_state"].to_pylist()
        assert session.column("response").tolist() == members["frames"]["response"].to_pylist()
    with pytest.raises(UserError, match=r"holds no session 'four'"):
        cache.session("four")


def test_ticks_that_a_cache_lacks(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", "tar")
    cache = ShardCache(tmp_path / "cache")
    for video, first, count, tick in (
        ("d", 0, 130, 129),
        ("d", 200, 1, 200),
        ("d", -1, 3, -1),
        ("x", 0, 1, 0),
    ):
        with pytest.raises(UserError, match=f"has no features of {video} at tick {tick}; run 'dst cache-f"):
            cache.features(video, first, count)
        with pytest.raises(UserError, match=f"has no features of {video} at tick {tick}; run 'dst cache-f"):
            cache.readable(video, first, count)
    assert cache.num_ticks("x") == 0


def sum_of_features(cache: ShardCache, video: str) -> float:
    return float(cache.features(video, 0, cache.num_ticks(video)).astype(np.float64).sum())


@each_storage
def test_a_cache_in_other_processes(tmp_path: Path, storage: Storage) -> None:
    """As data loaders have it: with files mapped before, and with none."""
    truth = make_cache(tmp_path / "cache", storage)
    cache = ShardCache(tmp_path / "cache")
    sums = [sum_of_features(cache, video) for video in ("a", "c")]
    wanted = [float(truth[v].astype(np.float16).astype(np.float64).sum()) for v in VIDEOS]
    assert sums == [wanted[1], wanted[2]]
    pickled_cache = pickle.dumps(cache)
    assert len(pickled_cache) < 10_000  # not the files' bytes
    again = pickle.loads(pickled_cache)
    assert again.session("one").frames.equals(cache.session("one").frames)
    for way in ("fork", "spawn") if storage == "tar" else ("fork",):
        with multiprocessing.get_context(way).Pool(1) as pool:
            assert pool.starmap(sum_of_features, [(cache, video) for video in VIDEOS]) == wanted
            assert pool.starmap(sum_of_features, [(again, video) for video in VIDEOS]) == wanted


def test_only_finished_shards_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    make_cache(folder, "tar")
    for name in ("vision-00002", "labels-00001"):
        (folder / "ledger" / f"{name}.json").unlink()
    (folder / "labels-00009.tar").write_bytes(b"not yet")
    (folder / "old-00000.tar").write_bytes((folder / "vision-00000.tar").read_bytes())
    enter(folder, "old-00000.tar", {"a": 64, "d": 129})  # set aside while a new one is made
    cache = ShardCache(folder)
    assert cache.session_ids == ["one", "three"]
    assert (cache.num_ticks("d"), cache.num_ticks("c")) == (0, 7)
    with pytest.raises(UserError, match=r"has no features of d at tick 0"):
        cache.features("d", 0, 1)
    for number in range(3):
        (folder / "ledger" / f"labels-{number:05d}.json").unlink(missing_ok=True)
    with pytest.raises(
        UserError, match=r"cache holds no finished session; run 'dst cache-features' and read its"
    ):
        ShardCache(folder)
    (folder / "cache.json").unlink()
    with pytest.raises(UserError, match=r"holds no cache\.json, so it is not a feature cache"):
        ShardCache(folder)


@each_storage
def test_a_copy_that_is_not_whole(tmp_path: Path, storage: Storage) -> None:
    folder = tmp_path / "cache"
    make_cache(folder, storage)
    vision, labels = folder / f"vision-00000.{storage}", folder / f"labels-00000.{storage}"
    size = vision.stat().st_size
    vision.write_bytes(vision.read_bytes()[:-3])
    cache = ShardCache(folder)
    said = f"vision-00000.{storage} has {size - 3} bytes where the ledger says {size}, so it is not a whole shard;"
    with pytest.raises(UserError, match=said):
        cache.features("a", 0, 1)
    assert cache.features("c", 0, 1).shape == (1, TOKENS, DIM)  # of another shard
    vision.unlink()
    with pytest.raises(UserError, match=f"vision-00000.{storage} is not there; run 'dst cache-features'"):
        cache.features("a", 0, 1)
    labels.write_bytes(labels.read_bytes() + b"\0")
    with pytest.raises(UserError, match=f"labels-00000.{storage} has .* bytes where the ledger says"):
        ShardCache(folder)


def test_a_video_or_session_in_two_shards(tmp_path: Path) -> None:
    for kind, name in (("vision", "d"), ("labels", "three")):
        folder = tmp_path / kind
        make_cache(folder, "tar")
        (folder / f"{kind}-00003.tar").write_bytes((folder / f"{kind}-00002.tar").read_bytes())
        enter(folder, f"{kind}-00003.tar", {"d": 129} if kind == "vision" else {})
        with pytest.raises(UserError, match=f"{kind} holds '{name}' in two shards; run 'dst cache-features'"):
            ShardCache(folder)


CHUNKS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another type": lambda chunk: chunk.update(vision=chunk["vision"].astype(np.float32)),
    "fewer ticks": lambda chunk: chunk.update(vision=chunk["vision"][:-1]),
    "other tokens": lambda chunk: chunk.update(vision=chunk["vision"][:, :1]),
    "flat": lambda chunk: chunk.update(vision=chunk["vision"].reshape(-1)),
    "other times": lambda chunk: chunk.update(pts=chunk["pts"][:-1]),
    "short times": lambda chunk: chunk.update(pts=chunk["pts"].astype(np.float32)),
    "other scales": lambda chunk: chunk.update(scale=chunk["scale"][:, :, 0]),
    "no scales": lambda chunk: chunk.pop("scale"),
    "scales that are NaN": lambda chunk: chunk["scale"].__setitem__(3, np.nan),
    "scales that are too large": lambda chunk: chunk["scale"].__setitem__(3, 600.0),
}


@pytest.mark.parametrize("case", CHUNKS)
def test_chunks_that_are_not_as_the_fingerprint_says(tmp_path: Path, case: str) -> None:
    make_cache(tmp_path / "cache", "tar", "int8")
    path = tmp_path / "cache" / "vision-00001.tar"
    values, scale = int8_of(np.ones((7, TOKENS, DIM), np.float32))
    chunk = {"vision": values, "scale": scale, "pts": np.arange(7) / 2, "meta": {}}
    CHUNKS[case](chunk)
    write(path, {"c/00000": chunk})
    enter(tmp_path / "cache", path.name, {"c": 7})
    with pytest.raises(UserError, match=r"vision-00001\.tar.*c/00000.*(again|another checkpoint)$"):
        ShardCache(tmp_path / "cache").features("c", 0, 7)


def frames_with(name: str, change: Callable[[list[Any]], None]) -> Callable[[dict[str, Any]], None]:
    def apply(members: dict[str, Any]) -> None:
        rows = members["frames"].to_pylist()
        values = [row[name] for row in rows]
        change(values)
        rows = [row | {name: value} for row, value in zip(rows, values, strict=True)]
        members["frames"] = pa.Table.from_pylist(rows, schema=TABLES["frames"])

    return apply


LABELS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no goal": (lambda m: m["meta"].pop("goal"), "has sessions that are not rows of that table"),
    "goal is null": (lambda m: m["meta"].update(goal=None), "has sessions that are not rows"),
    "a list as meta": (lambda m: m.update(meta=[]), "has sessions that are not rows"),
    "ticks as text": (lambda m: m["meta"].update(num_ticks="7"), "has sessions that are not rows"),
    "ticks beyond int32": (lambda m: m["meta"].update(num_ticks=2**40), "has sessions that are not rows"),
    "a negative first tick": (
        lambda m: m["meta"].update(first_tick=-1),
        "has not one row of frames for each",
    ),
    "more ticks": (
        lambda m: m["meta"].update(num_ticks=8),
        "has not one row of frames for each of its ticks",
    ),
    "another session": (lambda m: m["meta"].update(session_id="other"), "calls itself 'other'"),
    "turns in a mapping": (lambda m: m.update(turns={"turns": m["turns"]}), "has turns that are not rows"),
    "a turn that is text": (lambda m: m.update(turns=["hello"]), "has turns that are not rows"),
    "a turn without text": (lambda m: m["turns"][0].pop("text"), "has turns that are not rows"),
    "a turn without progress": (lambda m: m["turns"][0].pop("progress"), "has turns that are not rows"),
    "a tick that is text": (lambda m: m["turns"][0].update(tick="2"), "has turns that are not rows"),
    "a step without spans": (lambda m: m["steps"][0].pop("spans"), "has steps that are not rows"),
    "fewer steps": (lambda m: m["steps"].pop(), "has not one of dst_state for each of its 1 steps"),
    "a state less": (frames_with("dst_state", lambda v: v[3].pop()), "has not one of dst_state for each"),
    "a transition less": (frames_with("transitions", lambda v: v[3].pop()), "has not one of transitions for"),
    "ticks out of order": (frames_with("tick", lambda v: v.reverse()), "has not one row of frames for each"),
    "other columns": (
        lambda m: m.update(frames=m["frames"].drop_columns(["mistake"])),
        "has other columns than this version writes",
    ),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_do_not_belong_together(tmp_path: Path, case: str) -> None:
    change, part = LABELS[case]
    make_cache(tmp_path / "cache", "tar")
    members = session_members("two/x", *SESSIONS["two/x"])
    change(members)
    write(tmp_path / "cache" / "labels-00001.tar", {"two/x": members})
    enter(tmp_path / "cache", "labels-00001.tar", {})
    cache = ShardCache(tmp_path / "cache")
    with pytest.raises(
        UserError, match=f"labels-00001.tar: session two/x {part}.*; run 'dst cache-features' again"
    ):
        cache.session("two/x")


def test_nulls_where_none_may_be(tmp_path: Path) -> None:
    """Which Arrow stores without a word."""
    rows = frames_table("s", 5, 2).to_pylist()
    for name, value in (("speak", None), ("session_id", None), ("dst_state", [0, None])):
        wrong = [*rows[:2], rows[2] | {name: value}, *rows[3:]]
        table = pa.Table.from_pylist(wrong, schema=TABLES["frames"])
        refused(write(tmp_path / "a.tar", {"s": {"frames": table}}), "s, frames: its column", "lacks values")


@each_storage
def test_a_cache_at_an_address(tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is asked for is copied here."""
    import fsspec

    monkeypatch.setenv("DST_COPIES", str(tmp_path / "copies"))
    truth = make_cache(tmp_path / "cache", storage)
    remote = fsspec.filesystem("memory")
    remote.put(str(tmp_path / "cache"), f"/{storage}-cache", recursive=True)
    cache = ShardCache(f"memory://{storage}-cache")
    assert cache.session_ids == sorted(SESSIONS)
    assert len(list((tmp_path / "copies").glob("*/*"))) == 3  # the labels
    np.testing.assert_array_equal(cache.features("c", 0, 7), truth["c"].astype(np.float16))
    assert len(list((tmp_path / "copies").glob("*/*"))) == 4
    remote.rm(f"/{storage}-cache", recursive=True)


# ---- the page


@pytest.mark.parametrize(("library", "storage"), [("webdataset", "tar"), ("h5py", "h5"), ("pipeline", "tar")])
def test_the_examples_of_the_page(tmp_path: Path, library: str, storage: Storage) -> None:
    """What they print of the first shard, against what was put into it."""
    root = Path(__file__).parents[1]
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs/cache.md").read_text(), re.DOTALL)
    [code] = [block for block in blocks if re.search(rf"^(import|from) {library}", block, re.MULTILINE)]
    (tmp_path / "out").mkdir()
    make_cache(tmp_path / "out/shards", storage)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root) if library == "pipeline" else ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    frames = frames_table("one", 90, 2, 60).to_pylist()
    first_state = frames[0]["dst_state"]
    if library == "pipeline":
        readable = sum(tick % 5 != 0 for tick in range(60, 150))
        assert (
            done.stdout == f"(90, {TOKENS}, {DIM}) {readable} {np.array(frames[-1]['dst_state'], np.int8)}\n"
        )
        return
    slash = "/" if library == "h5py" else ""
    ticks = {"a/00000": 64, "b/video/00000": 64, "b/video/00001": 64, "b/video/00002": 22}
    firsts = {key: 64 * int(key[-5:]) for key in ticks}
    times = {key: "nan" if first % 5 == 0 else first / 2 for key, first in firsts.items()}
    wanted = {f"{slash}{key} ({n}, {TOKENS}, {DIM}) {times[key]} {firsts[key]}" for key, n in ticks.items()}
    last = 1 if library == "webdataset" else sum(row["response"] is not None for row in frames)
    assert set(done.stdout.splitlines()) == wanted | {f"Tee kochen {first_state} {last}"}
