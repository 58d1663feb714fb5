"""``bench train-step --data``: steps of the trainer on a store's own batches."""

import json
from pathlib import Path
from typing import Any

import pytest
from bench_runs import KEYS, call
from torch import Tensor

from hstu_xd.bench import store_steps
from hstu_xd.bench.store_steps import StoreSteps
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.training.trainer import Trainer

SIZES = {"batch_size": 4, "heads": 2, "dqk": 4, "dv": 4, "width": 8, "layers": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("steps") / "store"
    synthesize(path, SynthOptions(users=40, domains=3, items_per_domain=30, mean_length=12.0))
    return path


def rows_of(capsys: pytest.CaptureFixture[str], store: Path, **options: Any) -> list[dict]:
    capsys.readouterr()
    given = {"data": store, "threads": 1, "repeats": 2, "json": True, **SIZES, **options}
    call("train-step", **given)
    return json.loads(capsys.readouterr().out)


def test_variants_take_turns_on_the_same_batches(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[list[int]] = []
    step = Trainer.step

    def noting(self: Trainer, users: Any, *others: Any) -> int:
        taken.append(users.tolist())
        return step(self, users, *others)

    monkeypatch.setattr(Trainer, "step", noting)
    hstu, full = rows_of(capsys, store, variants="hstu,all", seq_len=[10])
    assert taken[0::2] == taken[1::2]
    assert len({tuple(users) for users in taken}) == 3
    assert all(len(users) == 4 for users in taken)
    assert [hstu["variant"], full["variant"]] == ["hstu", "all"]
    assert hstu["times_hstu"] == 1
    assert full["times_hstu"] > 0
    for row in (hstu, full):
        assert row.keys() >= KEYS
        assert row["correct"] is True
        assert row["peak_bytes"] == 4096
        assert (row["seq_len"], row["num_domains"], row["width"]) == (10, 3, 8)
        parts = [row[f"ms_{phase}"] for phase in ("batch", "forward", "backward")]
        assert all(0 < part < row["ms_p80"] for part in parts)


def test_sizes_are_those_of_the_recipe_unless_given(
    store: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.gin"
    recipe.write_text("xd_train.max_sequence_length = 9\nxd_encoder.num_heads = 4\n")
    rows = rows_of(
        capsys, store, variants="mask", gin_config_file=recipe, repeats=1,
        gin_bindings="xd_encoder.num_blocks = 3", seq_len=[5, 7],
    )  # fmt: skip
    assert [row["seq_len"] for row in rows] == [5, 7]
    for row in rows:
        assert row["times_hstu"] is None
        assert (row["heads"], row["layers"]) == (2, 1)  # the command line wins


def test_a_wrong_variant_gets_no_time(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = CrossDomainHSTU.forward

    def wrong(self: CrossDomainHSTU, *given: Any, **named: Any) -> Tensor:
        found = right(self, *given, **named)
        return found if self.settings.impl == "reference" else found * 1.001

    monkeypatch.setattr(CrossDomainHSTU, "forward", wrong)
    with pytest.raises(HstuXdError, match="hstu disagrees with the reference"):
        rows_of(capsys, store, variants="hstu")
    (row,) = json.loads(capsys.readouterr().out)
    assert row["correct"] is False
    assert row["ms_median"] is row["peak_bytes"] is None


def test_memory_is_that_of_a_few_steps(store: Path) -> None:
    bindings = ["xd_train.item_embedding_dim = 8", "xd_train.local_batch_size = 4"]
    steps = StoreSteps(str(store), [], bindings, "cpu", 1)
    assert store_steps._added(StoreSteps(**json.loads(json.dumps(vars(steps))))) >= 0
    trainer = steps.trainer(InteractionStore.open(store))
    assert trainer.model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_domains": 3}, "--num-domains has no effect on the batches of a store"),
        ({"provider": "hstu"}, "--provider has no effect on the batches of a store"),
        ({"variants": "hstuu"}, "unknown variant 'hstuu'"),
        ({"gin_bindings": "xd_train.widht = 3"}, "xd_train"),
        ({"data": None, "variants": "hstu"}, "--variants has no effect on drawn batches"),
        ({"data": None, "gin_bindings": "a.b = 1"}, "--gin_bindings has no effect on drawn"),
    ],
)
def test_options_without_effect_are_refused(
    store: Path, options: dict[str, Any], message: str
) -> None:
    given = {"data": store} | options
    words = []
    for name, value in given.items():
        option = name if name.startswith("gin_") else name.replace("_", "-")
        words += [] if value is None else [f"--{option}={value}"]
    with pytest.raises(InputError, match=message):
        call("train-step", *words)
