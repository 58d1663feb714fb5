"""What importing the plug-in changes in upstream's trainer, and what it leaves alone."""

import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from generative_recommenders.research.modeling.sequential.hstu import HSTU
from generative_recommenders.research.trainer import train as trainer

import gin
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.plugins.gr.research import HOST
from hstu_xd.plugins.gr.research.domain_batches import SESSION
from hstu_xd.plugins.gr.research.upstream_rebindings import REBINDINGS
from hstu_xd.plugins.gr.research.upstream_trainer import TRAINER, upstream_train
from hstu_xd.plugins.host import activate, check_version
from hstu_xd.plugins.rebinding import Rebinding, apply


@pytest.fixture
def active() -> Iterator[Any]:
    handle = activate(HOST)
    yield handle
    handle.revert()
    SESSION.open(None)
    gin.clear_config()


NAMES = [rebinding.name for stage in REBINDINGS for rebinding in stage]


def test_activating_twice_is_activating_once_and_revert_restores_identity() -> None:
    before = {name: getattr(trainer, name) for name in NAMES}
    handle = activate(HOST)
    during = {name: getattr(trainer, name) for name in NAMES}
    assert activate(HOST) is handle
    assert {name: getattr(trainer, name) for name in NAMES} == during
    assert all(during[name] is not before[name] for name in NAMES)
    handle.revert()
    assert all(getattr(trainer, name) is before[name] for name in NAMES)


def test_importing_the_package_or_the_implementation_rebinds_nothing() -> None:
    code = (
        "import hstu_xd, hstu_xd.plugins.gr.research.upstream_rebindings\n"
        "from generative_recommenders.research.trainer import train as t\n"
        "from generative_recommenders.research.modeling.sequential import encoder_utils as e\n"
        "assert t.get_sequential_encoder is e.get_sequential_encoder\n"
        "import hstu_xd.plugins.generative_recommenders as plugin\n"
        "assert t.get_sequential_encoder is not e.get_sequential_encoder\n"
        "plugin.HANDLE.revert()\n"
        "assert t.get_sequential_encoder is e.get_sequential_encoder\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_core_does_not_import_upstream() -> None:
    code = (
        "import sys, hstu_xd, hstu_xd.model, hstu_xd.training.run\n"
        "assert not {'generative_recommenders', 'fbgemm_gpu', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("strategy", ["local", "in-batch"])
def test_train_fn_reaches_every_rebound_name(
    active: Any, tiny_store: Path, tmp_path: Path, monkeypatch: Any, strategy: str
) -> None:
    monkeypatch.chdir(tmp_path)
    calls: Counter[str] = Counter()

    def counting(name: str) -> Any:
        def wrap(original: Any) -> Any:
            @functools.wraps(original)
            def counted(*arguments: Any, **others: Any) -> Any:
                calls[name] += 1
                return original(*arguments, **others)

            return counted

        return Rebinding(TRAINER, name, wrap)

    file = tmp_path / "gin" / "tiny.gin"
    file.parent.mkdir()
    file.write_text(f'''
import hstu_xd.plugins.generative_recommenders
train_fn.dataset_name = "xd:{tiny_store}"
train_fn.max_sequence_length = 10
train_fn.local_batch_size = 32
train_fn.num_epochs = 1
train_fn.main_module = "HSTU_XD"
train_fn.item_embedding_dim = 16
train_fn.sampling_strategy = "{strategy}"
train_fn.num_negatives = 8
train_fn.interaction_module_type = "DotProduct"
train_fn.item_l2_norm = True
create_data_loader.num_workers = 0
create_data_loader.prefetch_factor = None
xd_encoder.ddsr = True
''')
    with apply([counting(name) for name in NAMES]):
        upstream_train(file)
    sampler = {"local": "LocalNegativesSampler", "in-batch": "InBatchNegativesSampler"}
    assert calls[sampler[strategy]] == 1
    assert calls["get_reco_dataset"] == calls["get_sequential_encoder"] == 1
    assert calls["movielens_seq_features_from_row"] >= 2
    assert calls["eval_metrics_v2_from_tensors"] >= 2
    checkpoint = next((tmp_path / "ckpts").rglob("*_ep0"))
    assert "HSTU_XD" in checkpoint.name
    assert "domain" in checkpoint.name


def encoder(name: str) -> Any:
    return trainer.get_sequential_encoder(
        module_type=name,
        max_sequence_length=10,
        max_output_length=2,
        embedding_module=trainer.LocalEmbeddingModule(num_items=9, item_embedding_dim=8),
        interaction_module=None,
        input_preproc_module=None,
        output_postproc_module=None,
        verbose=False,
    )


def test_misspelt_main_module_names_the_nearest(active: Any) -> None:
    with pytest.raises(InputError, match=r"main_module = 'HSTU_DX'.*did you mean 'HSTU_XD'"):
        encoder("HSTU_DX")


def test_upstreams_own_modules_are_built_as_before(active: Any) -> None:
    assert type(encoder("HSTU")) is HSTU


def test_switches_without_domains_are_refused_with_the_mend(active: Any) -> None:
    gin.parse_config("xd_encoder.domain_mask = True")
    with pytest.raises(InputError, match=r"xd:<folder>.*item_domain_path"):
        encoder("HSTU_XD")


def test_segments_of_whole_histories_need_no_domains(active: Any) -> None:
    gin.parse_config("xd_encoder.segment_by = 'count'")
    assert encoder("HSTU_XD").catalog.num_domains == 1


def test_sizes_come_from_hstu_encoder_unless_bound(active: Any) -> None:
    gin.parse_config("hstu_encoder.num_blocks = 3\nhstu_encoder.dv = 4\nxd_encoder.dv = 6")
    model = encoder("HSTU_XD")
    assert model.settings.num_blocks == 3
    assert model.settings.dv == 6
    assert model.settings.num_heads == 1
    assert model.settings.linear_dropout_rate == 0.0


def test_softmax_attention_is_refused(active: Any) -> None:
    gin.parse_config('hstu_encoder.normalization = "softmax_rel_bias"')
    with pytest.raises(InputError, match="softmax_rel_bias"):
        encoder("HSTU_XD")


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ('xd_upstream.split = "holdout"', "split = 'holdout'; known: upstream, valid, test"),
        ('xd_upstream.negatives = "domains"', "known: domain, catalogue"),
        ("xd_encoder.ddsr = 1", "xd_encoder.ddsr = 1 is a int"),
        ("xd_train.temperature = 0.1", r"trainer reads xd_upstream.\* and xd_encoder.\* only"),
        ("xd_item.row_dropout = 0.2", "xd_item.row_dropout = 0.2: generative-recommenders'"),
        ('xd_upstream.warm_start = "nowhere"', "no such file"),
    ],
)
def test_bad_settings_name_the_value(active: Any, binding: str, message: str) -> None:
    gin.parse_config(binding)
    with pytest.raises(InputError, match=message):
        encoder("HSTU_XD")


def test_missing_folder_is_an_input_error(active: Any) -> None:
    with pytest.raises(InputError, match="no prepared store here"):
        trainer.get_reco_dataset("xd:not/there", 10, True)


def test_unknown_upstream_names_commits_and_the_override(monkeypatch: Any, caplog: Any) -> None:
    sources = {"research/trainer/train.py": {"train_fn": ("0" * 16,)}}
    host = replace(HOST, sources=sources)
    monkeypatch.delenv("HSTU_XD_ALLOW_UNVERIFIED", raising=False)
    with pytest.raises(HstuXdError, match=r"44b62c6.*train_fn.*HSTU_XD_ALLOW_UNVERIFIED=1"):
        check_version(host)
    monkeypatch.setenv("HSTU_XD_ALLOW_UNVERIFIED", "1")
    check_version(host)
    assert "going on" in caplog.text
