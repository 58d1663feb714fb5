"""What all hosts share, on the smallest input."""

from pathlib import Path

import pytest
import torch
from torch import nn

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.plugins.bridge import CheckpointFormat, Session, UnpaddedBatch, target_groups

CPU = torch.device("cpu")


def test_a_session_forgets_its_copies_with_its_catalogue() -> None:
    session = Session()
    session.open(DomainCatalog(torch.tensor([-1, 0, 1, 1]), ["a", "b"]))
    first = session.catalog_on(CPU)
    assert session.catalog_on(CPU) is first
    session.open(DomainCatalog(torch.tensor([-1, 0, 0]), ["c"]))
    assert session.catalog_on(CPU).domain_names == ("c",)


def test_a_target_without_an_event_before_it_neither_switches_nor_stays() -> None:
    groups = target_groups(torch.tensor([0, 1, 1]), torch.tensor([-1, 0, 1]), ["a", "b"])
    assert {name: rows.tolist() for name, rows in groups.items()} == {
        "a": [True, False, False],
        "b": [False, True, True],
        "switch": [False, True, False],
        "stay": [False, False, True],
    }


@pytest.mark.parametrize("is_left", [True, False])
def test_tokens_go_out_of_the_padding_and_back(is_left: bool) -> None:
    lengths = torch.tensor([2, 0, 3])
    columns = torch.arange(3)
    valid = columns >= 3 - lengths[:, None] if is_left else columns < lengths[:, None]
    padded = torch.arange(1, 10).view(3, 3) * valid
    batch = UnpaddedBatch.build(
        valid,
        domains=padded % 2,
        next_domains=padded % 2,
        times=padded,
        next_times=padded + 1,
    )
    assert batch.events.offsets.tolist() == [0, 2, 2, 5]
    assert batch.gather(padded).tolist() == batch.events.timestamps.tolist()
    assert torch.equal(batch.spread(batch.gather(padded)), padded)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2))


STRICT = CheckpointFormat(host="theirs", entry="state", kept_in="their ckpts folder")


def test_a_checkpoint_of_tensors_alone_is_read(tmp_path: Path) -> None:
    file = tmp_path / "ckpt"
    torch.save({"epoch": 3, "state": {"module.table": torch.ones(2)}}, file)
    model = Model()
    assert STRICT.load_into(model, file) == []
    assert model.table.tolist() == [1, 1]


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: no such file; give one out of their ckpts folder"):
        STRICT.read(tmp_path / "none")
    with pytest.raises(InputError, match="is a folder; give a file"):
        STRICT.read(tmp_path)
    torch.save({"state": {"module.table": Path("code")}}, tmp_path / "code")
    with pytest.raises(InputError, match=r"code: not a checkpoint of theirs \("):
        STRICT.read(tmp_path / "code")
    torch.save({"epoch": 3}, tmp_path / "other")
    with pytest.raises(InputError, match="other holds no model; not a checkpoint of theirs"):
        STRICT.read(tmp_path / "other")
