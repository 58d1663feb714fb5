"""Two processes on gloo against one: five steps, a resumed run, a run that goes on in the other."""

from pathlib import Path

import pytest
import torch
from dlrm_runs import Run, process_of
from torch import Tensor, multiprocessing

from hstu_xd.plugins.bridge import free_port

pytestmark = pytest.mark.slow

# So that no process divides by the longest history of its own.
BINDINGS = "xd_dlrm.norm_length = 120\n"


def one_of_two(rank: int, store: str, port: str, folder: str) -> None:
    """Continue from a checkpoint of one process, whole and with a break; leave the parameters."""
    # Before the rest: operators that upstream calls when it is imported.
    import fbgemm_gpu  # noqa: F401

    torch.set_num_threads(1)
    place = Path(folder)
    with process_of(Path(store), port, BINDINGS, rank=rank, world_size=2):
        run = Run()
        run.load(place / "one" / "0")
        run.train_on_evaluation(range(5))
        found = {"whole": run.parameters()}
        broken = Run()
        broken.load(place / "one" / "0")
        broken.train_on_evaluation(range(3))
        broken.save(place / "two")
        resumed = Run()
        resumed.load(place / "two" / "3")
        resumed.train_on_evaluation(range(3, 5))
        found["resumed"] = resumed.parameters()
        if rank == 0:
            torch.save(found, place / "found.pt")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    differences = {
        name: float((found[name] - value).abs().max())
        for name, value in expected.items()
        if value.numel()
    }
    assert {name: value for name, value in differences.items() if value > 1e-6} == {}


def test_two_processes_equal_one(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with process_of(tiny_store, free_port(), BINDINGS):
        run = Run()
        run.save(tmp_path / "one", 0)
        start = run.parameters()
        lengths = run.requests.get_samples(run.evaluated(0)).uih_features_kjt.lengths()
        assert lengths.unique().numel() > 2
        run.train_on_evaluation(range(5))
        expected = run.parameters()
    assert any(not torch.equal(expected[name], start[name]) for name in expected)
    arguments = str(tiny_store), free_port(), str(tmp_path)
    multiprocessing.spawn(one_of_two, arguments, nprocs=2)
    found = torch.load(tmp_path / "found.pt")
    assert_equal(found["whole"], expected)
    assert_equal(found["resumed"], found["whole"])
    with process_of(tiny_store, free_port(), BINDINGS):
        run = Run()
        run.load(tmp_path / "two" / "3")
        run.train_on_evaluation(range(3, 5))
        assert_equal(run.parameters(), expected)
