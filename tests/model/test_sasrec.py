"""SASRec's layers against the formulas, and what a model of them must hold to."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hstu_xd
from hstu_xd.catalog import DomainCatalog
from hstu_xd.cli import app
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.errors import InputError
from hstu_xd.experiments.ablation import ablate
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import EncoderSettings

SASREC: dict[str, Any] = {
    "layer": "sasrec",
    "normalization": "softmax",
    "enable_relative_attention_bias": False,
}
SIZES = {"num_domains": 2, "norm_length": 8, "embedding_dim": 8, "num_heads": 2, "dqk": 3, "dv": 5}


def sasrec(**changes: Any) -> CrossDomainHSTU:
    torch.manual_seed(3)
    catalog = DomainCatalog(torch.tensor([0, 0, 0, 0, 1, 1, 1]), ["books", "films"])
    return CrossDomainHSTU(catalog, EncoderSettings(**SIZES | SASREC | changes)).eval()


def by_formula(model: CrossDomainHSTU, x: Tensor) -> Tensor:
    """Encode one history, dense: (N, K) -> (N, K)."""
    norm = nn.functional.layer_norm
    hidden = {name: value.double() for name, value in model.encoder.state_dict().items()}
    visible = torch.ones(len(x), len(x)).tril().bool()
    for number in range(2):

        def linear(of: Tensor, name: str, number: int = number) -> Tensor:
            path = f"_attention_layers.{number}.{name}"
            return of @ hidden[f"{path}.weight"].T + hidden[f"{path}.bias"]

        normed = norm(x, x.shape[1:])
        q, k, v = (
            linear(of, name).unflatten(1, (2, -1)).transpose(0, 1)
            for of, name in ((normed, "_query"), (x, "_key"), (x, "_value"))
        )
        scores = (q @ k.transpose(1, 2) / 3**0.5).masked_fill(~visible, -torch.inf)
        read = (scores.softmax(2) @ v).transpose(0, 1).flatten(1)
        normed = norm(normed + linear(read, "_o"), x.shape[1:])
        x = normed + linear(linear(normed, "_ffn_in").relu(), "_ffn_out")
    return norm(x, x.shape[1:])


def test_layers_compute_the_formulas() -> None:
    model = sasrec()
    items, times = torch.tensor([1, 5, 3, 4]), torch.arange(4)
    inputs = model.embed(items, torch.arange(4), None)
    expected = nn.functional.normalize(by_formula(model, inputs.detach().double()), dim=1)
    for end in range(1, 5):
        found = model.encode(items[None, :end], times[None, :end], torch.tensor([1]))
        torch.testing.assert_close(found[0].double(), expected[end - 1], atol=2e-5, rtol=0)


def test_neither_time_nor_target_domain_matters() -> None:
    model, items = sasrec(), torch.tensor([[1, 5, 3]])
    first = model.encode(items, torch.tensor([[1, 2, 3]]), torch.tensor([0]))
    other = model.encode(items, torch.tensor([[5, 500, 9000]]), torch.tensor([1]))
    assert torch.equal(first, other)
    assert not model.settings.reads_time
    assert not model.settings.reads_target_domain


def test_the_domain_mask_hides_other_domains() -> None:
    model, times = sasrec(domain_mask=True), torch.tensor([[1, 2, 3]])
    first = model.encode(torch.tensor([[1, 5, 3]]), times, torch.tensor([0]))
    other = model.encode(torch.tensor([[1, 6, 3]]), times, torch.tensor([0]))
    assert torch.equal(first, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "silu"}, "layer = 'sasrec' needs normalization = 'softmax', got 'silu'"),
        (
            {"enable_relative_attention_bias": True},
            "layer = 'sasrec' needs enable_relative_attention_bias = False, got True",
        ),
        ({"ddsr": True}, "layer = 'sasrec' needs ddsr = False, got True"),
        ({"layer": "gru"}, "layer is 'gru'; 'hstu', 'sasrec', or a reference"),
    ],
)
def test_messages(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        EncoderSettings(**SIZES | SASREC | changes)


def test_a_training_learns_and_its_run_is_of_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "runs"
    synthesize(data, SynthOptions(users=160, domains=2, items_per_domain=30, mean_length=12))
    bindings = ["xd_train.num_epochs = 3", "xd_train.num_negatives = 20"]
    bindings += ["xd_train.num_warmup_steps = 2", "xd_train.item_embedding_dim = 16"]
    ablate(data, ["sasrec", "hstu"], [1], out, bindings=bindings, jobs=2)
    run = out / "sasrec-seed1"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert losses == sorted(losses, reverse=True)
    summary, model = json.loads((run / "summary.json").read_text()), hstu_xd.load(run)
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert model.settings.layer == "sasrec"
    assert app.run(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["test"]
    assert found["mrr"] == pytest.approx(summary["test"]["mrr"])
