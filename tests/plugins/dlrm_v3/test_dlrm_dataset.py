"""A store inside upstream's trainer: batches, tables, and upstream's own data sets beside it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import upstream_dlrm  # noqa: F401  (skips where upstream is not importable)
from generative_recommenders.dlrm_v3 import configs
from generative_recommenders.dlrm_v3.datasets.dataset import collate_fn
from generative_recommenders.dlrm_v3.train import train_ranker
from generative_recommenders.dlrm_v3.train import utils as train_utils

import gin
from hstu_xd.errors import InputError
from hstu_xd.plugins.dlrm_v3 import HOST
from hstu_xd.plugins.dlrm_v3.model import CrossDomainDlrmHSTU
from hstu_xd.plugins.dlrm_v3.settings import DlrmSettings
from hstu_xd.plugins.host import activate

SMALL = """
xd_dlrm.hstu_attn_num_layers = 1
xd_dlrm.hstu_num_heads = 2
xd_dlrm.hstu_attn_qk_dim = 4
xd_dlrm.hstu_attn_linear_dim = 4
xd_dlrm.hstu_transducer_embedding_dim = 8
xd_dlrm.hstu_embedding_table_dim = 8
xd_dlrm.table_rows = 50
"""


@pytest.fixture(autouse=True)
def in_force() -> Iterator[None]:
    handle = activate(HOST)
    gin.parse_config(SMALL)
    yield
    handle.revert()
    gin.clear_config()


@pytest.mark.parametrize("user_token", [True, False])
def test_a_batch_is_what_upstreams_collate_makes_of_its_samples(
    tiny_store: Path, user_token: bool
) -> None:
    gin.parse_config(f"xd_dlrm.user_token = {user_token}")
    dataset_class, arguments = train_utils.get_dataset(name=f"xd:{tiny_store}")
    config = train_utils.get_hstu_configs(f"xd:{tiny_store}")
    dataset = dataset_class(hstu_config=config, is_inference=False, **arguments)
    first = arguments["requests"].num_train  # evaluation draws the same candidates every time
    wanted = [first + 3, first + 1, dataset.get_item_count() - 1]
    whole = train_utils.HammerToTorchDataset(dataset).__getitems__(wanted)
    assert train_utils.collate_fn(whole) is whole
    expected = collate_fn([dataset.get_sample(number) for number in wanted])
    for name in ("uih_features_kjt", "candidates_features_kjt"):
        found, collated = getattr(whole, name), getattr(expected, name)
        assert found.keys() == collated.keys()
        assert torch.equal(found.values(), collated.values())
        assert torch.equal(found.lengths(), collated.lengths())
        assert found.values().dtype == collated.values().dtype
        assert found.lengths().dtype == collated.lengths().dtype


@pytest.mark.parametrize("binding", ["", "xd_encoder.domain_mask = True"])
def test_switches_make_the_model(tiny_store: Path, binding: str) -> None:
    gin.parse_config(binding)
    model, config, tables = train_utils.make_model(f"xd:{tiny_store}")
    assert isinstance(model, CrossDomainDlrmHSTU) == bool(binding)
    assert config.hstu_attn_num_layers == 1
    assert {name: table.num_embeddings for name, table in tables.items()} == {
        "item_id": 91,
        "user_id": 60,
    }


def test_the_control_embeds_the_domain(tiny_store: Path) -> None:
    gin.parse_config("xd_dlrm.domain_as_feature = True")
    _, config, tables = train_utils.make_model(f"xd:{tiny_store}")
    assert tables["domain"].num_embeddings == 3
    assert config.item_embedding_feature_names == ["item_candidate_id", "item_domain"]
    assert ("uih_domain", "item_domain") in config.merge_uih_candidate_feature_mapping


@pytest.mark.parametrize("split", ["valid", "test"])
def test_training_and_evaluation_read_the_requests_of_their_own(
    tiny_store: Path, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gin.parse_config(f"xd_dlrm.split = '{split}'")
    name = f"xd:{tiny_store}"
    _, config, tables = train_utils.make_model(name)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 1)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
    train, held_out = train_ranker.make_train_test_dataloaders(
        batch_size=4, dataset_type=name, hstu_config=config, embedding_table_configs=tables
    )
    requests = train_utils.get_dataset(name=name)[1]["requests"]
    assert list(train.dataset.indices) == list(range(requests.num_train))
    assert list(held_out.dataset.indices) == list(range(requests.num_train, len(requests)))
    assert next(iter(held_out)).batch_size() == 4


@pytest.mark.parametrize("key", sorted(train_ranker.SUPPORTED_CONFIGS))
def test_upstreams_own_data_sets_are_configured_as_before(key: str) -> None:
    model, config, tables = train_utils.make_model(key)
    assert type(model).__name__ == "DlrmHSTU"
    expected = configs.get_hstu_configs(key)
    assert config.hstu_uih_feature_names == expected.hstu_uih_feature_names
    assert config.hstu_transducer_embedding_dim == 8
    assert {table.num_embeddings for table in tables.values()} <= {8, 9, 50}
    gin.clear_config()
    assert train_utils.get_hstu_configs(key) == expected
    found, expected = train_utils.get_embedding_table_config(key), tables_of(key)
    assert {name: sizes(table) for name, table in found.items()} == expected


def tables_of(key: str) -> dict[str, tuple]:
    configs_of = configs.get_embedding_table_config(key)
    return {name: sizes(table) for name, table in configs_of.items()}


def sizes(table: Any) -> tuple:
    return table.num_embeddings, table.embedding_dim, table.data_type, table.feature_names


def test_a_switch_without_domains_is_refused() -> None:
    gin.parse_config("xd_encoder.domain_mask = True")
    with pytest.raises(InputError, match="switches on but no domains are known"):
        train_utils.make_model("debug")
    gin.parse_config("xd_dlrm.num_domains = 5")
    assert isinstance(train_utils.make_model("debug")[0], CrossDomainDlrmHSTU)


def test_a_switch_that_is_not_computed_is_refused(tiny_store: Path) -> None:
    gin.parse_config("xd_encoder.target_view_heads = 2")
    with pytest.raises(InputError, match=r"target_view_heads = 2: the host dlrm_v3 computes"):
        train_utils.make_model(f"xd:{tiny_store}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"split": "tset"}, "xd_dlrm.split = 'tset'; one of valid, test is needed"),
        ({"num_candidates": 1}, "xd_dlrm.num_candidates = 1; at least 2 is needed"),
        ({"hstu_num_heads": "two"}, "xd_dlrm.hstu_num_heads = 'two'; a number above 0"),
        ({"hstu_embedding_table_dim": 6}, "a multiple of 4 is needed"),
        ({"domain_features": ("one",)}, "two names are needed"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DlrmSettings(**values)
