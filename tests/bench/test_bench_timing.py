"""Clocks and counters of CUDA, by stand-ins that keep the order of calls: no GPU is needed."""

from itertools import count
from time import sleep

import pytest
import torch
from torch import Tensor

from hstu_xd.bench import memory
from hstu_xd.bench.timing import Mark, Pass, take_turns, unmarked


class StandIn:
    """``torch.cuda`` with a stream on which every event is a millisecond after the one before."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.times = count()

    def event(self, enable_timing: bool) -> "StandInEvent":
        assert enable_timing
        return StandInEvent(self)


class StandInEvent:
    def __init__(self, stream: StandIn) -> None:
        self._stream = stream
        self._time = -1

    def record(self) -> None:
        self._time = next(self._stream.times)
        self._stream.calls.append("record")

    def elapsed_time(self, end: "StandInEvent") -> float:
        assert self._stream.calls[-1] == "wait", "read before the device was done"
        return float(end._time - self._time)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    calls = stand_in.calls
    monkeypatch.setattr(torch.cuda, "Event", stand_in.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1500)
    return stand_in


def a_pass(calls: list[str]) -> Pass:
    def run(mark: Mark) -> dict[str, Tensor]:
        for phase in ("plan", "forward", "backward"):
            calls.append(phase)
            mark(phase)
        return {}

    return run


def test_phases_are_read_from_events_without_a_wait_in_between(cuda: StandIn) -> None:
    times = take_turns({"a": a_pass(cuda.calls)}, {}, device="cuda", repeats=1)
    assert times == {"a": {"plan": [1.0], "forward": [1.0], "backward": [1.0], "total": [4.0]}}
    a_turn = ["wait", "record", "plan", "record", "forward", "record", "backward", "record"]
    assert cuda.calls == 2 * [*a_turn, "record", "wait"]


def test_memory_is_what_the_allocator_adds_in_one_pass(cuda: StandIn) -> None:
    assert memory.allocated(lambda: a_pass(cuda.calls)(unmarked)) == 500
    assert cuda.calls == ["wait", "reset", "plan", "forward", "backward", "wait"]


def test_time_of_the_processors_leaves_out_the_waiting() -> None:
    def asleep(mark: Mark) -> dict[str, Tensor]:
        sleep(0.05)
        return {}

    times = take_turns({"asleep": asleep}, {}, device="cpu", repeats=1)["asleep"]
    assert times["total"][0] >= 50
    assert times["cpu"][0] < 40


def test_who_raises_is_out_of_the_race() -> None:
    calls: list[str] = []

    def broken(mark: Mark) -> dict[str, Tensor]:
        calls.append("broken")
        raise RuntimeError("no\nmore")

    failed: dict[str, str] = {}
    runs = {"broken": broken, "sound": a_pass([])}
    times = take_turns(runs, failed, device="cpu", repeats=3)
    assert calls == ["broken"]
    assert failed == {"broken": "RuntimeError: no"}
    assert list(times) == ["sound"]
    assert all(len(found) == 3 for found in times["sound"].values())
