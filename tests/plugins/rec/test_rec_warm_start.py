import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from hstu_xd.errors import InputError
from hstu_xd.plugins.rec.cross_domain_mixin import CHECKPOINTS


class Extended(nn.Module):
    """A model with REC's part and one of ours."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(4, width)
        self._ddsr = nn.Linear(2, 2)


def checkpoint(tmp_path: Path, **parts: object) -> Path:
    path = tmp_path / "HSTU-0.pth"
    torch.save(parts, path)
    return path


WEIGHT = torch.arange(12.0).view(4, 3)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("is_whole", [True, False])
def test_their_parameters_arrive_and_ours_are_named(
    tmp_path: Path, prefix: str, is_whole: bool, caplog: pytest.LogCaptureFixture
) -> None:
    state = {
        f"{prefix}item_embedding.weight": WEIGHT,
        f"{prefix}_hstu._attention_layers.0._rel_attn_bias._ts_w": torch.zeros(1),
    }
    path = checkpoint(tmp_path, **({"model": state, "epoch": 3} if is_whole else state))
    model = Extended()
    with caplog.at_level(logging.INFO):
        assert CHECKPOINTS.load_into(model, path) == ["_ddsr.bias", "_ddsr.weight"]
    assert torch.equal(model.item_embedding.weight, WEIGHT)
    assert "new parameters: ['_ddsr.bias', '_ddsr.weight']" in caplog.text


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"other.weight": WEIGHT}, r"unknown \['other.weight'\], missing \['item_embedding"),
        ({"item_embedding.weight": WEIGHT[:2]}, r"shape \(2, 3\) in the checkpoint and \(4, 3\)"),
    ],
)
def test_checkpoints_of_other_models(tmp_path: Path, state: dict, said: str) -> None:
    path = checkpoint(tmp_path, model=state)
    with pytest.raises(InputError, match=said) as caught:
        CHECKPOINTS.load_into(Extended(), path)
    assert str(caught.value).startswith(f"xd_warm_start: {path}: ")


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; give one out of a run's checkpoint_dir"):
        CHECKPOINTS.read(tmp_path / "none.pth")
    with pytest.raises(InputError, match="is a folder; give a file, of deepspeed's"):
        CHECKPOINTS.read(tmp_path)
    (tmp_path / "text.pth").write_text("hello", encoding="utf-8")
    with pytest.raises(InputError, match="not a checkpoint of REC's"):
        CHECKPOINTS.read(tmp_path / "text.pth")
    with pytest.raises(InputError, match="holds no model"):
        CHECKPOINTS.read(checkpoint(tmp_path, epoch=3))
