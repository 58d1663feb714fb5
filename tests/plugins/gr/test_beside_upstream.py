"""Upstream's own gin files and its learned similarity, with the plug-in in force."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from upstream_choice import real_upstream_only

import gin
from hstu_xd.plugins.gr.research import HOST
from hstu_xd.plugins.gr.research.domain_batches import SESSION
from hstu_xd.plugins.gr.research.upstream_trainer import TRAINER, upstream_train
from hstu_xd.plugins.host import activate
from hstu_xd.plugins.rebinding import Rebinding, apply

pytestmark = real_upstream_only("upstream's own gin files beside the plug-in, MoL similarity")

SMALL = [
    "train_fn.num_epochs = 1",
    "train_fn.max_sequence_length = 10",
    "train_fn.local_batch_size = 32",
    "train_fn.num_negatives = 8",
    "create_data_loader.num_workers = 0",
    "create_data_loader.prefetch_factor = None",
]
# Upstream's evaluation needs more items than the 2,500 places it looks at.
FILMS = list(range(1, 3801))


@pytest.fixture
def ml_1m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a tiny log laid out as upstream's preprocessing leaves ml-1m."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp" / "ml-1m").mkdir(parents=True)
    (tmp_path / "tmp" / "processed" / "ml-1m").mkdir(parents=True)
    films = {"movie_id": FILMS, "cleaned_title": "A Film", "year": 1999, "genres": "Drama"}
    pl.DataFrame(films).write_csv(tmp_path / "tmp" / "processed" / "ml-1m" / "movies.csv")
    random = torch.Generator().manual_seed(1)
    picks = [torch.randint(1, 3800, (6,), generator=random).tolist() for _ in range(60)]
    users = {
        "user_id": range(60),
        "sequence_item_ids": [",".join(map(str, pick)) for pick in picks],
        "sequence_ratings": ["3,4,5,3,4,5"] * 60,
        "sequence_timestamps": ["1,2,3,4,5,6"] * 60,
    }
    pl.DataFrame(users).write_csv(tmp_path / "tmp" / "ml-1m" / "sasrec_format.csv")
    yield tmp_path
    SESSION.open(None)
    gin.clear_config()


def losses(file: Path) -> list[float]:
    """Every step's loss of a seeded run."""
    seen: list[float] = []

    def recording(upstream: Any) -> Any:
        def get_weighted_loss(loss: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
            seen.append(loss.item())
            return upstream(loss, *others, **more)

        return get_weighted_loss

    torch.manual_seed(8)
    with apply([Rebinding(TRAINER, "get_weighted_loss", recording)]):
        upstream_train(file, SMALL)
    gin.clear_config()
    return seen


@pytest.mark.parametrize("model", ["hstu", "sasrec"])
def test_upstreams_gin_files_run_the_same_before_beside_and_after(ml_1m: Path, model: str) -> None:
    import generative_recommenders

    checkout = Path(next(iter(generative_recommenders.__path__))).parent
    file = checkout / "configs" / "ml-1m" / f"{model}-sampled-softmax-n128-final.gin"
    before = losses(file)
    handle = activate(HOST)
    beside = losses(file)
    handle.revert()
    after = losses(file)
    assert len(before) == 2
    assert beside == before
    assert after == before


# Upstream cannot build its own top-k module for MoL; ranking by the model's similarity needs none.
MOL = """
train_fn.interaction_module_type = "MoL"
train_fn.top_k_method = "MIPSBruteForceTopK"
train_fn.loss_weights = {"mi_loss": 0.001}
create_mol_interaction_module.query_embedding_dim = 64
create_mol_interaction_module.item_embedding_dim = 64
create_mol_interaction_module.dot_product_dimension = 8
create_mol_interaction_module.query_dot_product_groups = 2
create_mol_interaction_module.item_dot_product_groups = 2
create_mol_interaction_module.temperature = 0.05
create_mol_interaction_module.query_dropout_rate = 0.1
create_mol_interaction_module.query_hidden_dim = 16
create_mol_interaction_module.item_dropout_rate = 0.1
create_mol_interaction_module.item_hidden_dim = 16
create_mol_interaction_module.gating_query_hidden_dim = 8
create_mol_interaction_module.gating_qi_hidden_dim = 8
create_mol_interaction_module.gating_item_hidden_dim = 8
create_mol_interaction_module.softmax_dropout_rate = 0.1
"""


def test_learned_similarity_trains_and_ranks(ml_1m: Path, tiny_store: Path) -> None:
    (ml_1m / "gin").symlink_to(Path(__file__).parents[3] / "gin")
    (ml_1m / "data").mkdir()
    (ml_1m / "data" / "amazon").symlink_to(tiny_store)
    (ml_1m / "mol.gin").write_text('include "gin/amazon_xd.gin"\n' + MOL)
    with activate(HOST):
        upstream_train(ml_1m / "mol.gin", SMALL)
    (checkpoint,) = (ml_1m / "ckpts").rglob("HSTU_XD-*MoL-2x2x8*_ep0")
    names = torch.load(checkpoint, weights_only=True)["model_state_dict"]
    assert any("_ndp_module" in name for name in names)
