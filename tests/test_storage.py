"""Where a cache lies: each store seen by its own means, locks between real processes, transfers that die half-way."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pipeline import locks
from pipeline.copies import forget_copy, local_copy, remote_version
from pipeline.storage import Store, open_store
from schemas.errors import UserError

SPAWN = get_context("spawn")
LIMIT_S = 60


@pytest.fixture(scope="module")
def object_store() -> Iterator[str]:
    """The address of an S3 server with a bucket ``bucket``, which this process and its children take for S3."""
    from moto.server import ThreadedMotoServer  # here, as each process imports this module

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "something")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        s3_client().create_bucket(Bucket="bucket")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of local copies."""
    monkeypatch.setenv("DST_COPIES", str(tmp_path / "copies"))
    return tmp_path / "copies"


@pytest.fixture(params=["folder", "memory", "s3"])
def where(request: pytest.FixtureRequest, tmp_path: Path, copies: Path) -> str:
    """A place for a cache that is not there yet."""
    return make_place(request, request.param, tmp_path)


@pytest.fixture(params=["folder", "s3"])
def shared(request: pytest.FixtureRequest, tmp_path: Path, copies: Path) -> str:
    """A place that several processes see."""
    return make_place(request, request.param, tmp_path)


def s3_client() -> Any:
    import boto3

    return boto3.client("s3")


def make_place(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> str:
    if kind == "folder":
        return str(tmp_path / "cache" / "x")
    if kind == "memory":
        return f"memory://{tmp_path.name}/x"
    request.getfixturevalue("object_store")
    return f"s3://bucket/{tmp_path.name}/x"


def stored(where: str) -> dict[str, bytes]:
    """All that lies in a place, hidden files too, read without our code."""
    if where.startswith("memory://"):
        files = fsspec.filesystem("memory").store
        start = "/" + where.removeprefix("memory://") + "/"
        return {
            path.removeprefix(start): file.getvalue()
            for path, file in files.items()
            if path.startswith(start)
        }
    if where.startswith("s3://"):
        client, start = s3_client(), where.removeprefix("s3://bucket/") + "/"
        keys = [
            item["Key"] for item in client.list_objects_v2(Bucket="bucket", Prefix=start).get("Contents", [])
        ]
        return {
            key.removeprefix(start): client.get_object(Bucket="bucket", Key=key)["Body"].read()
            for key in keys
        }
    folder = Path(where)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(where: str, name: str, data: bytes) -> None:
    """Store bytes without our code."""
    if where.startswith("memory://"):
        fsspec.filesystem("memory").pipe_file(where.removeprefix("memory://") + "/" + name, data)
    elif where.startswith("s3://"):
        key = where.removeprefix("s3://bucket/") + "/" + name
        s3_client().put_object(Bucket="bucket", Key=key, Body=data)
    else:
        Path(where, name).parent.mkdir(parents=True, exist_ok=True)
        Path(where, name).write_bytes(data)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def visible(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not name.startswith(".lock")}


def work_file(store: Store, data: bytes) -> Path:
    path = store.work_folder() / "being-made"
    path.write_bytes(data)
    return path


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def never(sentence: str) -> None:
    raise AssertionError(sentence)


# ---- files


def test_files_come_back(where: str) -> None:
    store = open_store(where)
    assert store.url == where
    assert store.names() == []
    with store.lock(0, 1, never):
        made = work_file(store, noise(70_000))
        store.commit(made, "vision-00000.tar")
        assert not made.exists()
        store.write_text("cache.json", "a line\nété\n")
        store.write_text("deep/er/a b.txt", "")
        assert visible(stored(where)) == {
            "vision-00000.tar": noise(70_000),
            "cache.json": "a line\nété\n".encode(),
            "deep/er/a b.txt": b"",
        }
        store.commit(work_file(store, b"other"), "vision-00000.tar")
        assert stored(where)["vision-00000.tar"] == b"other"
    again = open_store(where + "/")
    assert again.names() == ["cache.json", "vision-00000.tar"]
    assert (again.names("deep"), again.names("deep/er")) == ([], ["a b.txt"])
    assert again.read_text("cache.json") == "a line\nété\n"
    assert again.sizes() == {"cache.json": 13, "vision-00000.tar": 5}
    assert again.sizes("deep/er") == {"a b.txt": 0}
    wanted = ["vision-00000.tar", "gone", "deep/er/a b.txt"]
    assert again.read_all(wanted) == {"vision-00000.tar": b"other", "deep/er/a b.txt": b""}
    assert again.read_all([]) == {}
    assert [
        again.has(name) for name in ("cache.json", "deep/er/a b.txt", "deep", "deep/er", "cache", "")
    ] == [
        *(True, True),
        *[False] * 4,
    ]
    again.remove("cache.json")
    again.remove("cache.json")
    assert sorted(visible(stored(where))) == ["deep/er/a b.txt", "vision-00000.tar"]


def test_what_others_wrote(where: str) -> None:
    """Names that begin with a dot are not shown; nothing is remembered of an earlier look."""
    store = open_store(where)
    for name in (".hidden", "b", ".a.tmp", "a", "c/d"):
        put(where, name, b"1")
        assert store.names() == sorted(n for n in stored(where) if n in ("a", "b"))
    put(where, "a", b"longer")
    assert (store.sizes()["a"], store.read_text("a")) == (6, "longer")
    put(where, "a", b"\xff\xfe")
    with pytest.raises(UserError, match="/a is not text"):
        store.read_text("a")


def test_what_is_not_there(where: str) -> None:
    store = open_store(where)
    put(where, "folder/file", b"1")
    for look in (store.read_text, store.local):
        for name in ("nothing", "folder"):
            with pytest.raises(UserError, match=re.escape(f"{where}/{name} is not ")) as raised:
                look(name)
            assert "\n" not in str(raised.value)
    assert store.names("nowhere") == []


def test_free_room(where: str, tmp_path: Path) -> None:
    free = open_store(where).free_bytes()
    if where.startswith("/"):
        room = os.statvfs(tmp_path)
        assert free == pytest.approx(room.f_bavail * room.f_frsize, rel=0.1)
    else:
        assert free is None


def test_paths_and_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(str(tmp_path), "a folder/x", b"1")
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "a folder", "a folder", Path("a folder"), f"file://{tmp_path}/a%20folder"):
        assert open_store(place).names() == ["x"]
    for lost in ("s3:/bucket/x", Path("s3://bucket/x")):
        with pytest.raises(UserError, match="neither a path nor an address; write s3://bucket/x"):
            open_store(lost)
    assert not (tmp_path / "s3:").exists()
    with pytest.raises(UserError, match="names no place in the store; write memory://bucket/folder"):
        open_store("memory://")


# ---- local copies


def test_a_local_file_is_its_own_copy(tmp_path: Path, copies: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"1")
    store = open_store(tmp_path)
    assert store.local("a.tar") == local_copy(str(path)) == local_copy(f"file://{path}") == path
    forget_copy(str(path))
    forget_copy(f"file://{path}")
    assert path.read_bytes() == b"1"
    assert not copies.exists()


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_copies_of_remote_files(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path, copies: Path
) -> None:
    where = make_place(request, kind, tmp_path)
    store = open_store(where)
    put(where, "a.tar", noise(200_000))
    put(where, "b.tar", b"another")
    path = store.local("a.tar")
    assert (path.read_bytes(), path.suffix, path.parent) == (noise(200_000), ".tar", path.parent)
    assert local_copy(f"{where}/b.tar").read_bytes() == b"another"

    version = remote_version(f"{where}/a.tar")
    assert version == remote_version(f"{where}/a.tar") != remote_version(f"{where}/b.tar")
    path.write_bytes(b"marked")  # would be overwritten if it were fetched once more
    assert local_copy(f"{where}/a.tar") == path
    assert path.read_bytes() == b"marked"

    put(where, "a.tar", noise(200_000, seed=1))  # of the same size
    assert remote_version(f"{where}/a.tar") != version
    newer = store.local("a.tar")
    assert newer.read_bytes() == noise(200_000, seed=1)
    assert files_in(copies) == sorted([newer, store.local("b.tar")])
    forget_copy(f"{where}/a.tar")
    assert files_in(copies) == [store.local("b.tar")]
    assert store.local("a.tar").read_bytes() == noise(200_000, seed=1)


def test_a_cut_download_is_no_copy(tmp_path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = f"memory://{tmp_path.name}"
    put(where, "a.tar", noise(1000))

    def half(self: Any, remote: str, local: str, **_: Any) -> None:
        Path(local).write_bytes(self.cat_file(remote)[:500])

    with monkeypatch.context() as patch:
        patch.setattr(fsspec.get_filesystem_class("memory"), "get_file", half)
        with pytest.raises(UserError, match=r"/a\.tar came incomplete \(500 of 1000 bytes\); try again"):
            local_copy(f"{where}/a.tar")
    assert files_in(copies) == []
    assert local_copy(f"{where}/a.tar").read_bytes() == noise(1000)


def fetch(url: str, answer: Connection) -> None:
    answer.send(local_copy(url).read_bytes())


def test_two_processes_fetch_at_once(object_store: str, tmp_path: Path, copies: Path) -> None:
    where = f"s3://bucket/{tmp_path.name}"
    put(where, "a.tar", noise(3_000_000))
    with running(fetch, f"{where}/a.tar") as (_, one), running(fetch, f"{where}/a.tar") as (_, other):
        assert answer_of(one) == answer_of(other) == noise(3_000_000)
    assert files_in(copies) == [local_copy(f"{where}/a.tar")]


def test_no_room_for_a_copy(tmp_path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = f"memory://{tmp_path.name}"
    put(where, "a.tar", noise(1000))
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room._replace(free=999))
    with pytest.raises(
        UserError, match=r"0\.0 GB free, and the copy of memory://.*/a\.tar needs .*DST_COPIES"
    ) as told:
        local_copy(f"{where}/a.tar")
    assert isinstance(told.value.__cause__, OSError)
    assert told.value.__cause__.errno == errno.ENOSPC
    assert files_in(copies) == []


# ---- transfers that die half-way


class Wire:
    """Passes bytes on to a server until ``limit`` bytes went one way; then calls ``cut`` and passes no more."""

    def __init__(self, server: str, limit: int, downwards: bool) -> None:
        host, port = server.removeprefix("http://").split(":")
        self._server, self._limit, self._downwards = (host, int(port)), limit, downwards
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = "http://{}:{}".format(*self._listening.getsockname())
        self.cut: Callable[[], object] = lambda: None
        self.passed = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listening.accept()[0]
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server) as server, suppress(OSError):
            ready = selectors.DefaultSelector()
            ready.register(client, selectors.EVENT_READ, server)
            ready.register(server, selectors.EVENT_READ, client)
            while True:
                for key, _ in ready.select():
                    data = key.fileobj.recv(2**16)  # type: ignore[union-attr]
                    if not data:
                        return
                    if (key.fileobj is server) == self._downwards:
                        self.passed += len(data)
                    if self.passed > self._limit:
                        self.cut()
                        return
                    key.data.sendall(data)


@contextmanager
def running(work: Callable[..., None], *arguments: object) -> Iterator[tuple[BaseProcess, Connection]]:
    """A process that does ``work(*arguments, connection)``, killed at the end, and the connection to it."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=work, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join(LIMIT_S)


def answer_of(connection: Connection) -> Any:
    assert connection.poll(LIMIT_S)
    return connection.recv()


def upload(where: str, connection: Connection) -> None:
    connection.recv()
    store = open_store(where)
    try:
        store.commit(work_file(store, noise(6_000_000)), "a.tar")
        connection.send("stored")
    except UserError as error:
        connection.send(str(error))


def download(url: str, connection: Connection) -> None:
    connection.recv()
    try:
        local_copy(url)
        connection.send("fetched")
    except UserError as error:
        connection.send(str(error))


@pytest.mark.parametrize(
    ("end", "before"), [("killed", b"the one before"), ("killed", None), ("cut", b"the one before")]
)
def test_an_upload_that_dies(
    object_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes | None, end: str
) -> None:
    where = f"s3://bucket/{tmp_path.name}"
    if before is not None:
        put(where, "a.tar", before)
    wire = Wire(object_store, 2_000_000, downwards=False)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", wire.address)
        with running(upload, where) as (process, connection):
            if end == "killed":
                wire.cut = process.kill
            connection.send("go")
            if end == "killed":
                process.join(LIMIT_S)
                assert process.exitcode == -9
            else:
                assert f"{where}/a.tar cannot be used" in answer_of(connection)
    wire.close()
    assert wire.passed > 2_000_000
    assert stored(where) == ({} if before is None else {"a.tar": before})


@pytest.mark.parametrize("end", ["killed", "cut"])
def test_a_download_that_dies(
    object_store: str, tmp_path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """It is no copy, and the next fetch removes what it left."""
    url = f"s3://bucket/{tmp_path.name}/a.tar"
    put(f"s3://bucket/{tmp_path.name}", "a.tar", noise(24_000_000))
    wire = Wire(object_store, 16_000_000, downwards=True)  # more than waits on the way
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", wire.address)
        with running(download, url) as (process, connection):
            if end == "killed":
                wire.cut = process.kill
            connection.send("go")
            if end == "killed":
                process.join(LIMIT_S)
                assert process.exitcode == -9
                assert len(files_in(copies)) == 1  # its temporary file
            else:
                assert f"{url} cannot be used" in answer_of(connection)
                assert files_in(copies) == []
    wire.close()
    path = local_copy(url)
    assert path.read_bytes() == noise(24_000_000)
    assert files_in(copies) == [path]


def test_a_store_whose_uploads_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file is seen while it is being written, it gets its name when it is whole."""
    where = f"memory://{tmp_path.name}"
    store = open_store(where)
    put(where, "a.tar", b"the one before")
    real = fsspec.get_filesystem_class("memory")

    def half(self: Any, local: str, remote: str, **_: Any) -> None:
        self.pipe_file(remote, Path(local).read_bytes()[:500])

    def half_and_dead(self: Any, local: str, remote: str, **_: Any) -> None:
        half(self, local, remote)
        raise OSError("connection lost")

    for put_file, message in (
        (half_and_dead, r"cannot be used \(connection lost\)"),
        (half, r"stored incomplete \(500 of 1000 bytes\)"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(real, "put_file", put_file)
            with pytest.raises(UserError, match=message):
                store.commit(work_file(store, noise(1000)), "a.tar")
        assert (stored(where)["a.tar"], store.names()) == (b"the one before", ["a.tar"])
    with store.lock(0, 1, never):
        assert sorted(visible(stored(where))) == ["a.tar"]  # what was left is removed


# ---- what keeps a store from being used


def test_a_package_that_is_not_installed() -> None:
    code = "import sys; sys.modules['s3fs'] = None; from pipeline.storage import open_store; open_store('s3://b/x')"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert ended.stderr.strip().splitlines()[-1] == (
        "schemas.errors.UserError: s3://b/x needs a package that is not installed: pip install 'dst[s3]'"
    )
    with pytest.raises(UserError, match=r"nonsense://b/x cannot be used \(.*nonsense\)"):
        open_store("nonsense://b/x")


def test_a_bucket_that_is_not_there(object_store: str) -> None:
    for url in ("s3://no-such-bucket/x", "s3://no-such-bucket"):
        with pytest.raises(UserError, match=rf"^{url} is not there \(.*bucket does not exist\)$"):
            open_store(url)


@pytest.mark.parametrize(("asked", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_asked_to_stop(
    object_store: str, copies: Path, tmp_path: Path, labels: Path, tiny_model: Path, asked: int, status: int
) -> None:
    """It takes its lock with it, so that the next one need not ask anybody whether it was killed."""
    where = f"s3://bucket/{tmp_path.name}"
    command = ["cache-features", "--labels", labels, "--out", where, "--model", tiny_model, "--device", "cpu"]
    run = subprocess.Popen(
        [sys.executable, "-c", "import cli; cli.app()", *map(str, command)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + LIMIT_S
    while not any(name.startswith(".lock") for name in stored(where)):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.send_signal(asked)
    _, said = run.communicate(timeout=LIMIT_S)
    assert run.returncode == status
    assert said.endswith("stopped; finished shards are kept: run it again to go on\n")
    assert "Traceback" not in said
    assert not any(name.startswith(".") for name in stored(where))


def test_wrong_credentials(object_store: str, tmp_path: Path, copies: Path) -> None:
    where = f"s3://bucket/{tmp_path.name}"
    store = open_store(where)
    put(where, "a", b"1")

    def check_credentials(wanted: bool) -> None:
        unchecked = b"0" if wanted else b"1000000"  # calls before credentials are checked
        url, as_text = f"{object_store}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, unchecked, as_text), timeout=LIMIT_S).close()

    check_credentials(True)
    try:
        looks = [store.read_text, store.local, store.has, store.remove]
        calls: list[Callable[[], object]] = [lambda look=look: look("a") for look in looks]
        calls += [lambda: open_store(where), store.names, lambda: store.write_text("a", "2")]
        for call in calls:
            with pytest.raises(
                UserError, match=rf"^{where}(/a)? is refused with these credentials .*; check them"
            ):
                call()
    finally:
        check_credentials(False)
    assert stored(where) == {"a": b"1"}


def open_and_tell(where: str, connection: Connection) -> None:
    try:
        open_store(where)
    except UserError as error:
        connection.send(str(error))


def test_nobody_answers(object_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "http://{}:{}".format(*taken.getsockname())
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    with running(open_and_tell, "s3://bucket/x") as (_, connection):
        told = answer_of(connection)
    assert told.startswith("s3://bucket/x cannot be used (")
    assert "network" in told
    assert "\n" not in told


# ---- locks

ALONE = (0, 1)
PAIRS = [
    (ALONE, ALONE, False),
    (ALONE, (1, 3), False),
    ((1, 3), ALONE, False),
    ((1, 3), (1, 3), False),
    ((1, 3), (2, 3), True),
    ((1, 3), (2, 4), False),
    ((0, 13), (0, 3), False),
    ((0, 2), (1, 2), True),
]


@pytest.mark.parametrize(("first", "second", "together"), PAIRS)
def test_who_may_write_at_once(
    where: str,
    first: tuple[int, int],
    second: tuple[int, int],
    together: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(locks, "_PATIENCE_S", 0)
    one, other = open_store(where), open_store(where)
    for _ in range(2):  # what the first round leaves is no hindrance to the next
        with one.lock(*first, never):
            if together:
                with other.lock(*second, never):
                    pass
            else:
                with pytest.raises(UserError) as raised, other.lock(*second, never):
                    raise AssertionError("let in")
                check_refusal(str(raised.value), where, os.getpid())
        with other.lock(*second, never), ExitStack() as both:
            if together:
                both.enter_context(one.lock(*first, never))
    assert visible(stored(where)) == {}


def check_refusal(message: str, where: str, process: int) -> None:
    told = re.fullmatch(
        rf"another run is writing {where}: process {process} on {re.escape(platform.node())} "
        r"since (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d) \((.*)\); wait until it is done, or stop it"
        r"(; if it was killed, remove (s3|memory)://\S+)?",
        message,
    )
    assert told, message
    assert told[2].startswith(Path(sys.argv[0]).name)
    assert (told[3] is not None) == ("://" in where)


def test_an_error_frees(where: str) -> None:
    with pytest.raises(KeyboardInterrupt), open_store(where).lock(*ALONE, never):
        raise KeyboardInterrupt
    with open_store(where).lock(*ALONE, never):
        pass


def hold(where: str, part: int, of: int, connection: Connection) -> None:
    store = open_store(where)
    try:
        with store.lock(part, of, never):
            (store.work_folder() / "half-made").write_bytes(b"1")
            connection.send("held")
            connection.recv()
    except UserError as error:
        connection.send(str(error))
    connection.send("free")


@pytest.mark.parametrize(("first", "second"), [(ALONE, ALONE), ((1, 3), (1, 3)), ((1, 3), ALONE)])
def test_a_killed_run_frees(
    shared: str, first: tuple[int, int], second: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_PATIENCE_S", 0)
    with running(hold, shared, *first) as (process, connection):
        assert answer_of(connection) == "held"
        with pytest.raises(UserError) as raised, open_store(shared).lock(*second, never):
            raise AssertionError("let in")
        check_refusal(str(raised.value), shared, process.pid or 0)
        process.kill()
        process.join(LIMIT_S)
        with open_store(shared).lock(*second, never):
            assert visible(stored(shared)) == {}  # what it was making is gone too


def test_a_run_that_ends_frees(shared: str) -> None:
    with running(hold, shared, *ALONE) as (process, connection):
        assert answer_of(connection) == "held"
        connection.send("end")
        assert answer_of(connection) == "free"
        process.join(LIMIT_S)
    with open_store(shared).lock(*ALONE, never):
        pass


def test_many_at_once(shared: str) -> None:
    """Of several runs that begin together at most one gets in, and a folder lets in exactly one."""
    with ExitStack() as all_of_them:
        runs = [all_of_them.enter_context(running(hold, shared, *ALONE)) for _ in range(3)]
        answers = [answer_of(connection) for _, connection in runs]
    assert answers.count("held") <= 1
    assert answers.count("held") == 1 or shared.startswith("s3://")
    assert all(answer.startswith("another run is writing ") for answer in answers if answer != "held")


def test_what_killed_runs_were_making(tmp_path: Path) -> None:
    """It is removed by a run that finds no other there, so that no part of an array job loses what it makes."""
    for name in ("of-a-run/a", "of-its-other-process/b"):
        put(str(tmp_path), f".work/{name}", b"1")
    one, other, worker = (open_store(tmp_path) for _ in range(3))
    with one.lock(0, 3, never):
        assert visible(stored(str(tmp_path))) == {}
        paths = [work_file(one, b"1"), work_file(worker, b"2")]
        with other.lock(1, 3, never):
            assert [path.read_bytes() for path in paths] == [b"1", b"2"]
            other.write_text("c", "3")
            for path, name in zip(paths, "ab", strict=True):
                assert path.is_relative_to(tmp_path)  # on the same file system: a rename is one step
                path.rename(tmp_path / name)
    del one, other, worker
    assert visible(stored(str(tmp_path))) == {"a": b"1", "b": b"2", "c": b"3"}
    assert list((tmp_path / ".work").iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("part", [ALONE, (1, 3)])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: tuple[int, int], number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    put(str(tmp_path), ".work/of-another-run", b"1")
    store = open_store(tmp_path)
    with store.lock(*part, said.append):
        store.write_text("a", "b")
        [sentence] = said
        assert f"{tmp_path} lies on a file system without locks ({os.strerror(number)})" in sentence
        assert stored(str(tmp_path))[".work/of-another-run"] == b"1"  # which may still be at work
    assert store.read_text("a") == "b"


def test_another_error_of_a_lock_is_no_lack_of_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output"), open_store(tmp_path).lock(*ALONE, never):
        raise AssertionError("let in")


@pytest.mark.parametrize("kind", ["memory", "s3"])
@pytest.mark.parametrize("text", ["another computer", "nothing", "cut"])
def test_the_lock_of_another_computer_stays(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path, text: str
) -> None:
    """Whether that run is dead cannot be known from here; whoever knows removes what the message names."""
    where = make_place(request, kind, tmp_path)
    with open_store(where).lock(*ALONE, never):
        [(name, data)] = stored(where).items()
    holder = json.loads(data) | {"host": "elsewhere", "machine": "elsewhere", "process": 2**22 + 1}
    content = {"another computer": json.dumps(holder), "nothing": "", "cut": json.dumps(holder)[:20]}[text]
    put(where, name, content.encode())
    with pytest.raises(UserError, match=f"if it was killed, remove {where}/{name}$") as raised:
        open_store(where).lock(*ALONE, never).__enter__()
    assert ("process 4194305 on elsewhere since" in str(raised.value)) == (text == "another computer")
    assert list(stored(where)) == [name]
    open_store(where).remove(name)
    with open_store(where).lock(*ALONE, never):
        pass
