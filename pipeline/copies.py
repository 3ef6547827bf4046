"""Files that lie elsewhere (``s3://bucket/x``): how they are reached, and whole local copies of them.

The stores are those of fsspec; credentials and endpoints are found where each of them looks (``~/.aws``, environment
variables, fsspec's own configuration).
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.locks import MACHINE, is_running
from schemas.errors import UserError
from schemas.files import fsync_folder

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_SLASH_LOST = re.compile(r"(s3|s3a|gs|gcs|az|abfs|abfss|memory|http|https|file):/(?!/)")
_EXTRAS = {"s3": "dst[s3]", "s3a": "dst[s3]"}
_VERSION = ("ETag", "md5Hash", "etag", "LastModified", "last_modified", "mtime", "updated", "created")
_OUR_MISTAKES = (TypeError, AttributeError, NameError, LookupError, AssertionError)
_numbers = itertools.count()


def is_remote(where: str) -> bool:
    """Whether ``where`` is an address of another store; ``file://`` is not.

    Raises:
        UserError: an address that has lost a slash, which would silently be a folder of that name.
    """
    if lost := _SLASH_LOST.match(where):
        raise UserError(f"{where} is neither a path nor an address; write {lost[1]}://{where[lost.end() :]}")
    return _ADDRESS.match(where) is not None and not where.startswith("file://")


def local_path(where: str) -> Path:
    """The path that ``where`` names: itself, or a ``file://`` address."""
    return Path(unquote(urlsplit(where).path)) if where.startswith("file://") else Path(where)


def connect(url: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it. Nothing is asked of the store yet.

    Raises:
        UserError: the package that knows such addresses is not installed, or there is none.
    """
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0]
    try:
        with told(url):
            # listings are asked for anew each time: other runs write to the same place
            file_system, path = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        package = _EXTRAS.get(scheme)
        how = f"pip install '{package}'" if package else str(error)
        raise UserError(f"{url} needs a package that is not installed: {how}") from error
    return file_system, path.rstrip("/")


@contextmanager
def told(url: str) -> Iterator[None]:
    """What goes wrong with a store, as one sentence with the address."""
    try:
        yield
    except (UserError, ImportError, *_OUR_MISTAKES):
        raise
    except FileNotFoundError as error:
        raise UserError(f"{url} is not there{_in_brackets(error, url)}") from error
    except PermissionError as error:
        raise UserError(
            f"{url} is refused with these credentials{_in_brackets(error, url)}; check them, and their rights there"
        ) from error
    except Exception as error:  # each back-end has its own kinds
        what = _in_brackets(error, url) or f" ({type(error).__name__})"
        raise UserError(
            f"{url} cannot be used{what}; check the address, the credentials and the network"
        ) from error


def _in_brackets(error: Exception, url: str) -> str:
    text = textwrap.shorten(str(error), 200)
    return f" ({text})" if text and text.strip("/") not in url else ""


def remote_version(url: str) -> bytes:
    """What its store tells of an object's content: it changes when another object takes its place.

    Raises:
        UserError: the object is not there, or its store cannot be asked.
    """
    file_system, remote = connect(url)
    with told(url):
        return _version(file_system.info(remote)).encode()


def local_copy(url_or_path: str, folder: Path | None = None) -> Path:
    """A path where the whole file can be read: itself for a local one, else a copy, fetched once.

    Copies lie in ``folder``, else in the one that the environment variable ``DST_COPIES`` names, else in
    ``~/.cache/dst/copies``. An object that has changed is fetched anew; several processes may ask at once.

    Raises:
        UserError: the object is not there, cannot be read, or came incomplete, or there is no room for it.
    """
    if not is_remote(url_or_path):
        return local_path(url_or_path)
    file_system, remote = connect(url_or_path)
    with told(url_or_path):
        info = file_system.info(remote)
    size = info["size"]
    if info["type"] != "file" or size is None:
        raise UserError(f"{url_or_path} is not a file whose size its store tells; copy it here by hand")
    place = _place(url_or_path, folder or _folder())
    copy = place / f"{_short_hash(_version(info))}{PurePosixPath(urlsplit(url_or_path).path).suffix}"
    if not copy.is_file():
        _fetch(url_or_path, file_system, remote, size, copy)
    return copy


def forget_copy(url_or_path: str) -> None:
    """Remove the local copies of a remote object; a file that is local stays where it is."""
    if is_remote(url_or_path):
        shutil.rmtree(_place(url_or_path, _folder()), ignore_errors=True)


def _fetch(url: str, file_system: Any, remote: str, size: int, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    _remove_what_killed_runs_left(copy.parent)
    free = shutil.disk_usage(copy.parent).free
    if free < size:
        raise UserError(
            f"{copy.parent} has {free / 1e9:.1f} GB free, and the copy of {url} needs {size / 1e9:.1f} GB; free some, "
            "or name another folder in the environment variable DST_COPIES"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    temporary = copy.with_name(f".{copy.stem}.{_MINE}-{os.getpid()}-{next(_numbers)}.tmp")
    try:
        with told(url):
            file_system.get_file(remote, str(temporary))
        got = temporary.stat().st_size
        if got != size:
            raise UserError(f"{url} came incomplete ({got} of {size} bytes); try again")
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(copy)
        fsync_folder(copy.parent)
    finally:
        temporary.unlink(missing_ok=True)
    for older in copy.parent.glob("[!.]*"):
        if older != copy:
            older.unlink(missing_ok=True)


def _remove_what_killed_runs_left(folder: Path) -> None:
    for path in folder.glob(f".*.{_MINE}-*.tmp"):
        if not is_running(int(path.name.split("-")[-2])):
            path.unlink(missing_ok=True)


def _version(info: dict[str, Any]) -> str:
    """The size and one mark of the content: a time only where there is nothing better, for a copy has another."""
    known = next(({name: info[name]} for name in _VERSION if name in info), info)
    return f"{info['size']} {known}"


def _folder() -> Path:
    return Path(os.environ.get("DST_COPIES") or Path.home() / ".cache" / "dst" / "copies")


def _place(url: str, folder: Path) -> Path:
    """A folder for the copy of one object: that of ten thousand others is not looked through for it."""
    return folder / _short_hash(url)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


_MINE = _short_hash(MACHINE)[:8]  # the folder may be shared by several computers
