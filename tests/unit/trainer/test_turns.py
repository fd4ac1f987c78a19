"""A lock that all pods of a store see: it is waited for within bounds, freed by death, and never the reason why a run fails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tuneloop_trainer.turns import turn

HOLDS = """
import pathlib, sys
from tuneloop_trainer.turns import turn
with turn(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


@contextmanager
def held_elsewhere(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process has the lock, until its input ends or it dies."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def free(path: Path) -> bool:
    import filelock

    lock = filelock.FileLock(path, timeout=0)
    try:
        with lock:
            return True
    except filelock.Timeout:
        return False


def test_one_at_a_time_has_its_turn(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "new" / "lock", 0, 0
    count = threading.Lock()

    def works() -> None:
        nonlocal inside, most
        for _ in range(20):
            with turn(path, every=0.001):
                with count:
                    inside += 1
                    most = max(most, inside)
                os.sched_yield()
                with count:
                    inside -= 1

    threads = [threading.Thread(target=works) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_the_turn_of_a_process_that_is_killed_is_over(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held_elsewhere(path) as process:
        assert not free(path)
        process.kill()
        process.wait()
        with turn(path, patience=5, every=0.01):
            assert not free(path), "it is held anew, by us"
    assert free(path)


def test_a_run_that_holds_its_turn_too_long_is_waited_for_no_longer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lock"
    with held_elsewhere(path):
        with turn(path, patience=0.05, every=0.01):
            pass
        assert not free(path), "it is still the other one's"
    assert "lock is held by another run for more than 0 s" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_store_without_locks_makes_nobody_wait_and_keeps_no_marker(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(file: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuses)
    with turn(tmp_path / "lock", patience=5), turn(tmp_path / "lock", patience=0):
        pass
    assert caplog.text.count(f"lock cannot be locked ({os.strerror(number)})") == 2
    monkeypatch.undo()
    assert free(tmp_path / "lock")


def test_a_store_that_may_only_be_read_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuses(path: Any, flags: int, mode: int = 0o777, **place: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, mode, **place)

    monkeypatch.setattr("os.open", refuses)
    with turn(tmp_path / "lock", patience=0):
        pass
    assert not (tmp_path / "lock").exists()


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("content")
    victim.chmod(0o600)
    (tmp_path / "lock").symlink_to(victim)
    (tmp_path / "nowhere").symlink_to(tmp_path / "made")

    for name in ("lock", "nowhere"):
        with turn(tmp_path / name, patience=0):
            assert free(victim), "no other file is locked"

    assert (victim.read_text(), victim.stat().st_mode & 0o777) == ("content", 0o600)
    assert not (tmp_path / "made").exists()


def test_other_users_of_the_store_may_lock_too(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with turn(tmp_path / "lock"):
            assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(before)


def test_what_fails_in_a_turn_ends_it(tmp_path: Path) -> None:
    with pytest.raises(KeyError), turn(tmp_path / "lock"):
        raise KeyError
    assert free(tmp_path / "lock")
