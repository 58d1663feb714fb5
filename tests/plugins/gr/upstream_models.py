"""Small models and batches in the shapes of generative-recommenders, for the tests beside."""

from typing import Any

import torch
from torch import Tensor, nn

from hstu_xd.catalog import DomainCatalog
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.plugins.gr.research.domain_batches import NEXT_DOMAINS, next_domains

NUM_ITEMS, WIDTH, BLOCKS, HEADS, DQK, DV, DOMAINS = 60, 32, 2, 2, 8, 16, 3
MAX_SEQUENCE, MAX_OUTPUT = 20, 4
COLUMNS = MAX_SEQUENCE + MAX_OUTPUT
LENGTHS = torch.tensor([20, 1, 7, 13, 2, 19])
CATALOG = DomainCatalog(torch.arange(NUM_ITEMS + 1) % DOMAINS, ["a", "b", "c"])
EVERYTHING: dict[str, Any] = {
    "domain_mask": True,
    "target_view_heads": 1,
    "tape": True,
    "ddsr": True,
    "target_domain_embedding": True,
}


def modules(dropout: float, similarity: nn.Module | None) -> dict[str, Any]:
    from generative_recommenders.research.modeling.sequential import (
        embedding_modules,
        input_features_preprocessors,
        output_postprocessors,
    )
    from generative_recommenders.research.rails.similarities import dot_product_similarity_fn

    return {
        "embedding_module": embedding_modules.LocalEmbeddingModule(NUM_ITEMS, WIDTH),
        "similarity_module": similarity or dot_product_similarity_fn.DotProductSimilarity(),
        "input_features_preproc_module": (
            input_features_preprocessors.LearnablePositionalEmbeddingInputFeaturesPreprocessor(
                COLUMNS, WIDTH, dropout
            )
        ),
        "output_postproc_module": output_postprocessors.L2NormEmbeddingPostprocessor(WIDTH),
        "max_sequence_len": MAX_SEQUENCE,
        "max_output_len": MAX_OUTPUT,
        "verbose": False,
    }


def upstream_hstu(
    *, dropout: float = 0.0, seed: int = 4, similarity: nn.Module | None = None, **others: Any
) -> nn.Module:
    from generative_recommenders.research.modeling.sequential.hstu import HSTU

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "embedding_dim": WIDTH,
        "num_blocks": BLOCKS,
        "num_heads": HEADS,
        "linear_dim": DV,
        "attention_dim": DQK,
        "normalization": "rel_bias",
        "linear_config": "uvqk",
        "linear_activation": "silu",
        "linear_dropout_rate": dropout,
        "attn_dropout_rate": 0.0,
    }
    return HSTU(**(sizes | others), **modules(dropout, similarity))


def hstu_xd(
    *, dropout: float = 0.0, seed: int = 4, similarity: nn.Module | None = None, **switches: Any
) -> nn.Module:
    from hstu_xd.plugins.gr.research.encoder import HSTU_XD

    torch.manual_seed(seed)
    settings = EncoderSettings(
        num_domains=DOMAINS,
        norm_length=COLUMNS,
        embedding_dim=WIDTH,
        num_blocks=BLOCKS,
        num_heads=HEADS,
        dqk=DQK,
        dv=DV,
        linear_dropout_rate=dropout,
        **switches,
    )
    return HSTU_XD(catalog=CATALOG, settings=settings, **modules(dropout, similarity))


def shake(model: nn.Module) -> nn.Module:
    """Large random parameters, so that no term is negligible."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def batch(seed: int = 9) -> dict[str, Any]:
    """Arguments of an encoder's forward pass; the request's time stands behind the history."""
    random = torch.Generator().manual_seed(seed)
    shape = len(LENGTHS), COLUMNS
    column = torch.arange(COLUMNS)
    ids = torch.randint(1, NUM_ITEMS + 1, shape, generator=random) * (column < LENGTHS[:, None])
    times = torch.randint(0, 10**6, shape, generator=random).cumsum(1)
    targets = torch.randint(DOMAINS, (len(LENGTHS),), generator=random)
    return {
        "past_lengths": LENGTHS,
        "past_ids": ids,
        "past_payloads": {
            "timestamps": times * (column <= LENGTHS[:, None]),
            "ratings": (ids != 0).long(),
            NEXT_DOMAINS: next_domains(ids, LENGTHS, targets, CATALOG),
        },
    }


def encode(model: nn.Module, features: dict[str, Any]) -> Tensor:
    """(B, N, K) vectors."""
    return model(past_embeddings=model.get_item_embeddings(features["past_ids"]), **features)
