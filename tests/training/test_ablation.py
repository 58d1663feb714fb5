"""Ablations: what may stand in one table, and under which name."""

import json
from pathlib import Path

import pytest
from quick_runs import QUICK

from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.errors import InputError
from hstu_xd.experiments.ablation import ablate
from hstu_xd.training.settings import load_settings


@pytest.fixture(scope="module")
def finished(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ablation") / "runs"
    ablate(store_path, ["hstu"], [1], out, bindings=QUICK)
    return out


def test_finished_runs_are_kept(finished: Path, store_path: Path) -> None:
    before = (finished / "hstu-seed1" / "summary.json").stat().st_mtime_ns
    table = ablate(store_path, ["hstu"], [1], finished, bindings=QUICK)
    assert (finished / "hstu-seed1" / "summary.json").stat().st_mtime_ns == before
    assert table == (finished / "ablation.md").read_text()


def test_runs_on_other_data_do_not_come_into_the_table(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    synthesize(other, SynthOptions(users=40, domains=2, items_per_domain=20, mean_length=8))
    before = (finished / "ablation.json").read_bytes()
    with pytest.raises(InputError, match=r"hstu-seed1.*other data than.*other.*--out"):
        ablate(other, ["hstu"], [1], finished, bindings=QUICK)
    assert (finished / "ablation.json").read_bytes() == before


def test_runs_with_other_settings_do_not_come_into_the_table(
    finished: Path, store_path: Path
) -> None:
    longer = [*QUICK, "xd_train.num_epochs = 2"]
    with pytest.raises(InputError, match=r"hstu-seed1.*not xd_train.num_epochs = 2 but 1.*--out"):
        ablate(store_path, ["hstu", "mask"], [1], finished, bindings=longer)
    assert not (finished / "mask-seed1").exists()


def test_unknown_to_an_older_run_is_not_compared(finished: Path) -> None:
    recorded = json.loads((finished / "hstu-seed1" / "run.json").read_text())
    settings = load_settings([], [*QUICK, "xd_train.random_seed = 1"])
    assert settings.unlike(recorded) == []
    del recorded["train"]["num_epochs"]
    assert load_settings([], QUICK[:4]).unlike(recorded) == [
        "not xd_train.num_negatives = 2048 but 20",
        "not xd_train.random_seed = 42 but 1",
    ]


@pytest.mark.parametrize(
    ("switch", "variant"),
    [
        ("ddsr = True", "hstu"),
        ("target_view_heads = 1", "hstu"),
        ("normalization = 'softmax'", "all"),
        ("segment_by = 'count'", "all"),
    ],
)
def test_recipe_with_a_switch_would_give_a_variant_the_wrong_name(
    switch: str, variant: str, store_path: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.gin"
    recipe.write_text(f"xd_encoder.{switch}\n")
    message = rf"'{variant}'.*xd_encoder.{switch}.*recipe"
    with pytest.raises(InputError, match=message):
        ablate(store_path, ["all", "hstu"], [1], tmp_path / "out", files=[recipe])
    assert not (tmp_path / "out").exists()
