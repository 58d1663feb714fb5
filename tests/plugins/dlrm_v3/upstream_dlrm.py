"""Upstream's DlrmHSTU in small, its random batches, and a dense definition of the domain mask."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hstu_xd.model.settings import EncoderSettings

try:
    import fbgemm_gpu  # noqa: F401  (registers the operators that upstream calls)
    from generative_recommenders.common import HammerKernel
    from generative_recommenders.dlrm_v3.train import train_ranker
    from generative_recommenders.modules.dlrm_hstu import DlrmHSTU, DlrmHSTUConfig
    from generative_recommenders.modules.multitask_module import MultitaskTaskType, TaskConfig
    from generative_recommenders.ops.pytorch import pt_hstu_attention
    from torchrec import KeyedJaggedTensor
    from torchrec.modules.embedding_configs import EmbeddingConfig
except (ImportError, OSError) as error:
    pytest.skip(
        f"generative_recommenders.dlrm_v3 is not importable ({error}): NOT covered in this run are "
        "the production path's model, its equality with the stock one, its launcher and its data",
        allow_module_level=True,
    )

from hstu_xd.plugins.dlrm_v3.model import CrossDomainDlrmHSTU
from hstu_xd.plugins.dlrm_v3.settings import CrossDomain

CHECKOUT = Path(train_ranker.__file__).parents[3]
ITEMS, USERS, DOMAINS, WIDTH = 60, 20, 4, 16
HISTORY = ("user_id", "item_id", "action_time", "action_weight", "uih_domain")
CANDIDATES = ("item_candidate_id", "item_query_time", "item_action_weight", "item_domain")


def configuration(num_context: int, dropout: float = 0.0) -> DlrmHSTUConfig:
    return DlrmHSTUConfig(
        hstu_num_heads=2,
        hstu_attn_linear_dim=8,
        hstu_attn_qk_dim=6,
        hstu_attn_num_layers=3,
        hstu_embedding_table_dim=WIDTH,
        hstu_preprocessor_hidden_dim=16,
        hstu_transducer_embedding_dim=WIDTH,
        hstu_input_dropout_ratio=dropout,
        hstu_linear_dropout_rate=dropout,
        contextual_feature_to_max_length={"user_id": 1} if num_context else {},
        candidates_weight_feature_name="item_action_weight",
        candidates_watchtime_feature_name="item_action_weight",
        candidates_querytime_feature_name="item_query_time",
        multitask_configs=[
            TaskConfig(name, weight, MultitaskTaskType.BINARY_CLASSIFICATION)
            for name, weight in (("click", 1), ("like", 2))
        ],
        user_embedding_feature_names=["item_id", "user_id"],
        item_embedding_feature_names=["item_candidate_id"],
        uih_post_id_feature_name="item_id",
        uih_action_time_feature_name="action_time",
        uih_weight_feature_name="action_weight",
        hstu_uih_feature_names=list(HISTORY),
        hstu_candidate_feature_names=list(CANDIDATES),
        merge_uih_candidate_feature_mapping=[
            ("item_id", "item_candidate_id"),
            ("action_time", "item_query_time"),
            ("action_weight", "item_action_weight"),
        ],
        action_weights=[1, 2],
    )


def tables() -> dict[str, EmbeddingConfig]:
    return {
        "item_id": EmbeddingConfig(
            num_embeddings=ITEMS,
            embedding_dim=WIDTH,
            name="item_id",
            feature_names=["item_id", "item_candidate_id"],
        ),
        "user_id": EmbeddingConfig(
            num_embeddings=USERS, embedding_dim=WIDTH, name="user_id", feature_names=["user_id"]
        ),
    }


def cross_domain(norm_length: int = 0, in_buckets: bool = False, **switches: Any) -> CrossDomain:
    settings = EncoderSettings(num_domains=DOMAINS, norm_length=1, embedding_dim=WIDTH, **switches)
    return CrossDomain(settings, norm_length=norm_length, in_buckets=in_buckets)


def build(
    *, num_context: int = 1, dropout: float = 0.0, extension: CrossDomain | None = None
) -> nn.Module:
    """The stock model, or ours; every parameter large and random, so that no term is negligible."""
    arguments: dict[str, Any] = {
        "hstu_configs": configuration(num_context, dropout),
        "embedding_tables": tables(),
        "is_inference": False,
        "bf16_training": False,
    }
    torch.manual_seed(3)
    if extension is None:
        model = DlrmHSTU(**arguments)
    else:
        model = CrossDomainDlrmHSTU(**arguments, cross_domain=extension)
    model._embedding_collection.to_empty(device="cpu")
    model.set_hammer_kernel(HammerKernel.PYTORCH)
    return model


def twin_of(stock: nn.Module, extension: CrossDomain, **options: Any) -> nn.Module:
    """Our model with the stock model's parameters; what is ours alone keeps its first values."""
    model = build(extension=extension, **options)
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected
    assert all("_xd_" in name for name in missing)
    return model


def stock_model(num_context: int = 1, dropout: float = 0.0) -> nn.Module:
    model = build(num_context=num_context, dropout=dropout)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            scale = 0.3 if "embedding" in name or "bias" in name or "beta" in name else None
            if scale is not None:
                parameter.normal_(std=1.0 if "_embedding_collection" in name else scale)
    return model


def jagged(keys: tuple[str, ...], values: list[list[Tensor]]) -> KeyedJaggedTensor:
    """Features of every user: values[key][user]."""
    flat = [one for each in values for one in each]
    return KeyedJaggedTensor(
        keys=list(keys),
        lengths=torch.tensor([one.numel() for one in flat]),
        values=torch.cat(flat),
    )


def batch(seed: int, users: int = 5, domains: int = DOMAINS) -> tuple[Any, Any]:
    """Histories of 0 to 20 events and one to six candidates."""
    draw = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=draw)

    lengths = [0 if seed % 3 == 1 else 7, *ints(0, 21, users - 1).tolist()]
    asked = ints(1, 7, users).tolist()
    history = [
        [ints(0, USERS, 1) for _ in lengths],
        [ints(1, ITEMS, n) for n in lengths],
        [ints(0, 10**6, n).sort().values for n in lengths],
        [ints(0, 4, n) for n in lengths],
        [ints(0, domains, n) for n in lengths],
    ]
    candidates = [
        [ints(1, ITEMS, n) for n in asked],
        [torch.full((n,), 10**6 + 50) for n in asked],
        [ints(0, 4, n) for n in asked],
        [ints(0, domains, n) for n in asked],
    ]
    return jagged(HISTORY, history), jagged(CANDIDATES, candidates)


def answers(model: nn.Module, features: tuple[Any, Any]) -> dict[str, Tensor]:
    """Embeddings, predictions, losses and gradients of one step, by name."""
    model.zero_grad()
    users, items, losses, predictions, labels, weights = model(*features)
    found = {
        "users": users,
        "items": items,
        "predictions": predictions,
        "labels": labels,
        "weights": weights,
        **{f"loss {name}": value for name, value in losses.items()},
    }
    sum(losses.values()).backward()
    gradients = {
        f"gradient {name}": parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {name: value.detach() for name, value in found.items()} | gradients


@contextmanager
def dense_domain_mask(features: tuple[Any, Any], num_context: int) -> Iterator[None]:
    """The definition: stock attention in which rows of other domains are masked, dense."""
    history, candidates = features
    rows = [
        torch.cat([torch.full((num_context,), -1), seen, asked])
        for seen, asked in zip(
            history["uih_domain"].to_dense(), candidates["item_domain"].to_dense()
        )
    ]
    original = pt_hstu_attention._get_valid_attn_mask

    def masked(*, N: int, **arguments: Any) -> Tensor:
        padded = torch.stack(
            [nn.functional.pad(row, (0, N - row.numel()), value=-2) for row in rows]
        )
        is_context = (padded == -1).unsqueeze(1)
        visible = (padded.unsqueeze(2) == padded.unsqueeze(1)) | is_context
        return original(N=N, **arguments) & visible

    pt_hstu_attention._get_valid_attn_mask = masked
    try:
        yield
    finally:
        pt_hstu_attention._get_valid_attn_mask = original
