"""Work in several processes: order, errors, and what is left when a process is killed."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.workers import in_order
from schemas.errors import UserError
from schemas.files import replacing_folder
from schemas.tables import validate_labels


def shared_and_item(shared: str, item: int) -> tuple[str, int, int]:
    if item == 13:
        raise UserError("13 is not for us")
    time.sleep(random.Random(item).random() / 200)  # results become ready out of order
    return shared, item, os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers: int) -> None:
    results = list(in_order(shared_and_item, "all", range(14, 44), workers))
    assert [result[:2] for result in results] == [("all", item) for item in range(14, 44)]
    assert (os.getpid() in {pid for _, _, pid in results}) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_worker_is_that_error(workers: int) -> None:
    results = in_order(shared_and_item, "", range(12, 44), workers)
    assert next(results)[1] == 12
    with pytest.raises(UserError, match="13 is not for us"):
        next(results)


def one_that_is_killed(_: str, item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_killed_worker_is_one_sentence() -> None:
    with pytest.raises(UserError, match="a process was killed from outside"):
        list(in_order(one_that_is_killed, "", range(20), 2))


def test_interrupted_it_says_little(corpus: Path, tmp_path: Path) -> None:
    """Ctrl-C goes to all processes of a terminal at once, here at several moments of a run."""
    command = [
        sys.executable,
        "-c",
        "import cli; cli.app()",
        "prepare",
        "--root",
        str(corpus),
        "--workers",
        "2",
    ]
    for delay in (0.0, 0.2, 0.4):
        process = subprocess.Popen(
            [*command, "--out", str(tmp_path), "--tick-hz", "1000"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while len(psutil.Process(process.pid).children()) < 3:  # two workers, and who tidies up after them
            time.sleep(0.01)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert process.returncode != 0
        assert "Traceback" not in errors
        assert len(errors.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


def test_workers_end_with_the_process_that_started_them() -> None:
    code = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "from pipeline.workers import in_order; from test_workers import shared_and_item\n"
        "if __name__ == '__main__':\n"
        "    for result in in_order(shared_and_item, '', range(14, 100_000), 2): print(result[2], flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = {int(process.stdout.readline()) for _ in range(20)}
        process.kill()
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)
    assert pids
    assert not alive


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_killed_at_any_moment_the_old_tables_are_whole(corpus: Path, labels: Path, tmp_path: Path) -> None:
    """Prepare again and again at another rate, killed after times that cover the whole run, until one gets through."""
    command = [
        sys.executable,
        "-c",
        "import cli; cli.app()",
        "prepare",
        "--root",
        str(corpus),
        "--workers",
        "2",
    ]
    first = [*command, "--out", str(tmp_path / "labels")]
    subprocess.run(first, check=True, stdout=subprocess.DEVNULL)
    tables = tmp_path / "labels" / "assembly101"
    old = {name: digest for name, digest in hashes(tables).items() if name != "about.json"}
    assert old == {n: d for n, d in hashes(labels / "assembly101").items() if n != "about.json"}
    whole = hashes(tables)
    killed = 0
    for delay in (0.05 * 1.25**n for n in range(40)):
        process = subprocess.Popen(
            [*first, "--tick-hz", "4"], stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            status = process.wait(delay)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
        if hashes(tables) != whole:  # killed after the exchange, before its end
            break
    assert killed >= 5
    assert hashes(tables) != whole
    assert validate_labels(tables) == []


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "labels") as mine:
        (mine / "a").write_text("mine")
        with pytest.raises(UserError, match="another run is writing"), replacing_folder(tmp_path / "labels"):
            pass
        assert (mine / "a").read_text() == "mine"
    assert (tmp_path / "labels" / "a").read_text() == "mine"
    (tmp_path / ".labels.tmp" / "left by a killed run").mkdir(parents=True)
    with replacing_folder(tmp_path / "labels") as again:
        assert not any(again.iterdir())
    assert not any((tmp_path / "labels").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["labels"]
