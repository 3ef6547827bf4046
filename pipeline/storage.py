"""Where a cache lies: a local folder, or an address such as ``s3://bucket/x``. A file is there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from pipeline.copies import connect, forget_copy, is_remote, local_copy, local_path, told
from pipeline.locks import folder_lock, go_together, is_dead, lock_name, refusal, this_run
from schemas.errors import UserError
from schemas.files import fsync_folder

_UPLOADS_WHOLE = {
    "s3",
    "s3a",
    "gs",
    "gcs",
    "az",
    "abfs",
    "abfss",
}  # an object is there when its upload is complete


class Store(ABC):
    """A folder of files, named by paths relative to it. Names that begin with a dot are the store's own.

    A run that writes holds `lock`; the other processes of the run then open the store as well and need no lock.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        """What messages call it."""
        self._work: Path | None = None

    @abstractmethod
    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of each file in the store, or in a folder of it, by name, sorted; none where that is not there."""

    def names(self, folder: str = "") -> list[str]:
        """Names of the files in the store, or in a folder of it, sorted; none where that is not there."""
        return list(self.sizes(folder))

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""

    @abstractmethod
    def read_text(self, name: str) -> str:
        """A whole UTF-8 file.

        Raises:
            UserError: it is not there, or not text.
        """

    @abstractmethod
    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """Many small files by name, at once where each takes a network's delay; without those that are gone.

        Raises:
            UserError: one cannot be read.
        """

    def write_text(self, name: str, text: str) -> None:
        """Write a whole UTF-8 file, or leave what was there."""
        temporary = self.work_folder() / f"{secrets.token_hex(8)}.txt"
        temporary.write_text(text, encoding="utf-8")
        self.commit(temporary, name)

    @abstractmethod
    def commit(self, finished: Path, name: str) -> None:
        """Move a finished file from `work_folder` to its name here, in place of what had it.

        Raises:
            UserError: it cannot be stored; nothing half-written has the name then.
        """

    @abstractmethod
    def rename(self, name: str, new: str) -> None:
        """Give a file another name in the same folder, in place of what had that one."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; none of that name is no error."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Room that is left; None where the store does not say."""

    @abstractmethod
    def local(self, name: str) -> Path:
        """A path where the whole file can be read: itself, or a copy of a remote one (`pipeline.copies.local_copy`).

        Raises:
            UserError: it is not there.
        """

    def work_folder(self) -> Path:
        """A local folder for files that are being made, this object's alone; it goes away with this object."""
        if self._work is None:
            self._work = self._new_work_folder()
            weakref.finalize(self, shutil.rmtree, self._work, ignore_errors=True)
        return self._work

    @abstractmethod
    def _new_work_folder(self) -> Path: ...

    @abstractmethod
    def lock(self, part: int, of: int, say: Callable[[str], None]) -> AbstractContextManager[None]:
        """Hold the store for writing: alone (part 0 of 1), or together with the other parts of one array job.

        Args:
            part: counted from 0.
            of: parts of the array job; runs that are cut otherwise are refused.
            say: told in one sentence where the file system knows no locks; the run then goes on without.

        Raises:
            UserError: another run holds it: its host, process, since when, and its command line.
        """


def open_store(where: str | Path) -> Store:
    """The store at a path or an address (``scheme://...``; ``file://`` is a path).

    Raises:
        UserError: a remote store that cannot be reached: its package is not installed, the credentials or the
            bucket are wrong.
    """
    text = os.fspath(where)
    return RemoteStore(text) if is_remote(text) else LocalStore(local_path(text))


class LocalStore(Store):
    """A folder; made when something is first written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder

    def sizes(self, folder: str = "") -> dict[str, int]:
        there = self.folder / folder
        sizes = {}
        for path in sorted(there.iterdir()) if there.is_dir() else []:
            with suppress(FileNotFoundError):  # another part of an array job may have removed it just now
                if _is_shown(path.name) and stat.S_ISREG((status := path.stat()).st_mode):
                    sizes[path.name] = status.st_size
        return sizes

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def read_text(self, name: str) -> str:
        return _text(self.local(name).read_bytes(), str(self.folder / name))

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        read = {}
        for name in names:
            with suppress(FileNotFoundError):  # another part of an array job may be replacing it just now
                read[name] = (self.folder / name).read_bytes()
        return read

    def commit(self, finished: Path, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with finished.open("rb") as file:
            os.fsync(file.fileno())
        finished.replace(path)
        fsync_folder(path.parent)

    def rename(self, name: str, new: str) -> None:
        (self.folder / name).replace(self.folder / new)
        fsync_folder(self.folder)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def free_bytes(self) -> int:
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.is_dir())
        return shutil.disk_usage(there).free

    def local(self, name: str) -> Path:
        if not self.has(name):
            raise UserError(f"{self.folder / name} is not there")
        return self.folder / name

    def _new_work_folder(self) -> Path:
        work = self.folder / ".work"  # on the same file system, so that a rename is one step
        work.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=work))

    @contextmanager
    def lock(self, part: int, of: int, say: Callable[[str], None]) -> Iterator[None]:
        # listed first: what a run makes that begins meanwhile is not in it
        left = [path for path in (self.folder / ".work").glob("*") if path != self._work]
        with folder_lock(self.folder, part, of, say) as is_alone:
            for path in left if is_alone else []:
                shutil.rmtree(path, ignore_errors=True)  # of a run that was killed, or ended just now
            yield


class RemoteStore(Store):
    """A folder of an object store, or of whatever else fsspec knows."""

    def __init__(self, url: str) -> None:
        super().__init__(url.rstrip("/"))
        self._files, self._path = connect(url)
        if not self._path.strip("/"):
            raise UserError(
                f"{url} names no place in the store; write {url.partition('://')[0]}://bucket/folder"
            )
        protocols = self._files.protocol
        self._uploads_whole = not _UPLOADS_WHOLE.isdisjoint(
            [protocols] if isinstance(protocols, str) else protocols
        )
        self.sizes()  # tells at once what is wrong with the address or the credentials

    def sizes(self, folder: str = "") -> dict[str, int]:
        return {name: size for name, size in self._all_sizes(folder).items() if _is_shown(name)}

    def has(self, name: str) -> bool:
        with told(self._url(name)):
            try:
                return bool(self._files.info(self._in(name))["type"] == "file")
            except FileNotFoundError:
                return False

    def read_text(self, name: str) -> str:
        with told(self._url(name)):
            data = self._files.cat_file(self._in(name))
        return _text(data, self._url(name))

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        if not names:
            return {}
        with told(self.url):
            # whole files, for all that "ranges" says: cat() would take a [ in a path for a pattern
            read = self._files.cat_ranges([self._in(name) for name in names], None, None, on_error="return")
        found = {name: data for name, data in zip(names, read, strict=True) if not _is_gone(data)}
        for name, data in found.items():
            if isinstance(data, Exception):
                with told(self._url(name)):
                    raise data
        return found

    def commit(self, finished: Path, name: str) -> None:
        upload = self._in(name) if self._uploads_whole else self._in(f".{secrets.token_hex(8)}.tmp")
        size = finished.stat().st_size
        with told(self._url(name)):
            if not self._uploads_whole:
                self._files.makedirs(self._in(name).rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(finished), upload)
            stored = self._files.info(upload)["size"]
            if stored != size:
                self._files.rm_file(upload)
                raise UserError(
                    f"{self._url(name)} was stored incomplete ({stored} of {size} bytes); try again"
                )
            if upload != self._in(name):
                self._files.mv(upload, self._in(name))
        finished.unlink()

    def rename(self, name: str, new: str) -> None:
        with told(self._url(name)):
            self._files.mv(self._in(name), self._in(new))

    def remove(self, name: str) -> None:
        with told(self._url(name)), suppress(FileNotFoundError):
            self._files.rm_file(self._in(name))
        forget_copy(self._url(name))

    def free_bytes(self) -> None:
        return None

    def local(self, name: str) -> Path:
        return local_copy(self._url(name))

    def _new_work_folder(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="dst-"))  # TMPDIR tells where

    @contextmanager
    def lock(self, part: int, of: int, say: Callable[[str], None]) -> Iterator[None]:
        """A lock is an object whose name no other run has. Each run writes its own and then looks for others, so
        that of two that begin at once at least one sees the other."""
        own = f"{lock_name(part, of)}@{secrets.token_hex(8)}"
        try:
            self.write_text(own, this_run())
            there = self._all_sizes()
            for lock in (name for name in there if name.startswith(".lock") and name != own):
                if not go_together(_before_at(own), _before_at(lock)):
                    self._require_dead(lock)
            if of == 1:
                for name in (name for name in there if name.endswith(".tmp")):
                    self.remove(name)  # an upload that a killed run left
            yield
        finally:
            self.remove(own)

    def _require_dead(self, lock: str) -> None:
        """Take over from a run that was killed on this computer."""
        try:
            holder = self.read_text(lock)
        except UserError:
            if self.has(lock):
                raise
            return  # it has just ended
        if not is_dead(holder):
            raise refusal(self.url, holder, f"; if it was killed, remove {self._url(lock)}")
        self.remove(lock)

    def _all_sizes(self, folder: str = "") -> dict[str, int]:
        path = self._in(folder)
        with told(self._url(folder)):
            try:
                entries = self._files.ls(path, detail=True)
            except FileNotFoundError as error:
                if _names_no_bucket(error):
                    raise
                return {}
        sizes = {
            entry["name"].rstrip("/"): int(entry["size"]) for entry in entries if entry["type"] == "file"
        }
        return {name.rpartition("/")[2]: sizes[name] for name in sorted(sizes) if name != path}

    def _in(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    def _url(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url


def _is_gone(answer: bytes | Exception) -> bool:
    return isinstance(answer, FileNotFoundError)


def _is_shown(name: str) -> bool:
    return not name.startswith(".")


def _names_no_bucket(error: FileNotFoundError) -> bool:
    """Whether S3 says that there is no such bucket; an empty folder is the same error otherwise."""
    response = getattr(error.__cause__, "response", None)
    return isinstance(response, dict) and response["Error"]["Code"] == "NoSuchBucket"


def _before_at(lock: str) -> str:
    return lock.partition("@")[0]


def _text(data: bytes, url: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{url} is not text; it is damaged, or something else") from None
