"""How many cores the process may use: of its affinity, and of its container's quota."""

import os
import sys
from pathlib import Path

import pytest

from hstu_xd import cores
from hstu_xd.cores import usable_cores
from hstu_xd.experiments.trainings import threads_of_each


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups of a container on a machine of 64 cores."""
    monkeypatch.setattr(cores, "_GROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("10000 100000\n", 1),
        ("6400000 50000\n", 64),
        ("max 100000\n", 64),
        ("", 64),
        ("many 0", 64),
    ],
)
def test_a_container_of_some_cores(groups: Path, told: str, expected: int) -> None:
    (groups / "cpu.max").write_text(told)
    assert usable_cores() == expected


@pytest.mark.parametrize(("granted", "expected"), [("300000\n", 3), ("-1\n", 64)])
def test_a_container_of_older_control_groups(groups: Path, granted: str, expected: int) -> None:
    (groups / "cpu").mkdir()
    (groups / "cpu" / "cpu.cfs_quota_us").write_text(granted)
    (groups / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores() == expected


def test_no_control_groups(groups: Path) -> None:
    assert usable_cores() == 64


@pytest.mark.skipif(sys.platform != "linux", reason="a process has an affinity on Linux alone")
def test_a_process_that_is_bound_to_one_core() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("set_to", "expected"), [(None, "3"), ("", "3"), ("1", "1")])
def test_trainings_share_cores_unless_their_threads_are_set(
    set_to: str | None, expected: str, groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (groups / "cpu.max").write_text("700000 100000\n")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_to is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", set_to)
    assert threads_of_each(2) == expected
