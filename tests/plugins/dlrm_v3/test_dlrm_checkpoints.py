"""A run that continues from a checkpoint takes the steps of one that was never interrupted."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dlrm_runs import Run, process_of

import gin
from hstu_xd.errors import InputError
from hstu_xd.plugins.bridge import free_port
from hstu_xd.plugins.dlrm_v3.checkpoints import FUSED


@pytest.fixture(autouse=True)
def in_one_process(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    # Upstream's log of metrics is written where the process stands.
    monkeypatch.chdir(tmp_path)
    with process_of(tiny_store, free_port()):
        yield


def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Run()
    whole.train(range(3))
    whole.save(tmp_path)
    whole.train(range(3, 6))
    resumed = Run()
    resumed.load(tmp_path / "3")
    resumed.train(range(3, 6))
    expected, found = whole.parameters(), resumed.parameters()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []

    (tmp_path / "3" / FUSED).rename(tmp_path / "away")
    without = Run()
    with caplog.at_level(logging.WARNING):
        without.load(tmp_path / "3")
    assert "holds no state of the tables' optimiser, which starts anew" in caplog.text
    without.train(range(3, 6))
    tables = [name for name in expected if "embedding_collection" in name]
    assert any(not torch.equal(without.parameters()[name], expected[name]) for name in tables)


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint there; name the folder of a step"):
        Run().load(tmp_path)


STOCK = "xd_encoder.domain_mask = False\nxd_encoder.tape = False\nxd_encoder.ddsr = False"


def predictions(run: Run) -> torch.Tensor:
    numbers = list(range(run.requests.get_item_count() - 4, run.requests.get_item_count()))
    sample = run.requests.get_samples(numbers)
    run.model.eval()
    with torch.no_grad():
        return run.model(sample.uih_features_kjt, sample.candidates_features_kjt)[3]


def test_a_stock_model_continues_with_equal_scores(tmp_path: Path) -> None:
    gin.parse_config(STOCK)
    stock = Run()
    stock.train(range(3))
    stock.save(tmp_path)
    expected = predictions(stock)
    gin.parse_config("xd_encoder.tape = True\nxd_encoder.ddsr = True")
    assert not torch.equal(predictions(Run()), expected)
    gin.parse_config(f"xd_dlrm.warm_start = '{tmp_path / '3'}'")
    warm = Run()
    warm.start()
    new = set(warm.parameters()) - set(stock.parameters())
    assert {name.split("_xd_")[1].split(".")[0] for name in new} == {"tape", "ddsr"}
    assert torch.equal(predictions(warm), expected)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("xd_dlrm.hstu_num_heads = 2", "a checkpoint of another model, which differs in "),
        ("xd_dlrm.hstu_attn_num_layers = 1", "a checkpoint of another model, which differs in "),
        ("xd_dlrm.warm_start = 'gone'", "xd_dlrm.warm_start = 'gone': no checkpoint there"),
    ],
)
def test_a_warm_start_that_cannot_be_is_refused(tmp_path: Path, binding: str, message: str) -> None:
    gin.parse_config(STOCK)
    Run().save(tmp_path)
    gin.parse_config(f"xd_dlrm.warm_start = '{tmp_path / '3'}'\n{binding}")
    with pytest.raises(InputError, match=message):
        Run().start()
