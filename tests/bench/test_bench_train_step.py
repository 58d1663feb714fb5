"""``bench train-step``: models, and how far each reads in equal time."""

from typing import Any

import pytest
from bench_runs import KEYS, run_bench
from torch import Tensor

from hstu_xd.bench import train_step
from hstu_xd.errors import HstuXdError
from hstu_xd.ops.state_attention import api


def test_train_step_compares_models_and_reading_in_equal_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_step, "_ITEMS", 60)
    rows = run_bench(capsys, "train-step", seq_len=[8, 16], num_domains=[3])
    assert [row["provider"] for row in rows] == ["dense", "hstu", "mask", "all"] * 2
    for row in rows:
        assert row.keys() >= KEYS
        assert row["correct"] is True
        assert row["times_faster_than_dense"] > 0
    assert [r["equal_time_seq_len"] for r in rows if r["provider"] == "dense"] == [8, 16]


def test_a_wrong_ddsr_does_not_pass_the_gate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The truth is DDSR's definition, and its values are not the zeros that it starts with."""
    right = api._IMPLS["eager"]

    def wrong(*given: Any, **named: Any) -> Tensor:
        return right(*given, **named) * 1.001

    monkeypatch.setattr(train_step, "_ITEMS", 60)
    for name in ("eager", "native"):
        monkeypatch.setitem(api._IMPLS, name, wrong)
    with pytest.raises(HstuXdError, match=r"^all disagrees with the reference"):
        run_bench(capsys, "train-step", seq_len=[8], num_domains=[3])


def test_equal_time_is_interpolated_between_measured_lengths_only() -> None:
    case = {
        "num_domains": 2, "skew": 0.0, "interleaving": "random", "batch_size": 4, "device": "cpu",
    }  # fmt: skip
    times = {("dense", 100): 10.0, ("dense", 200): 40.0, ("all", 100): 5.0, ("all", 400): 20.0}
    rows = [
        {**case, "provider": name, "seq_len": n, "ms_median": ms} for (name, n), ms in times.items()
    ]
    found = [train_step._equal_time(row, rows) for row in rows]
    assert found == [100, 200, 200, None]
