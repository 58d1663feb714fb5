"""Searches on validation: which trials there are, when they end, and what is written."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from quick_runs import QUICK

from hstu_xd.cli import app
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.errors import HstuXdError, InputError, Interrupted
from hstu_xd.experiments import tuning
from hstu_xd.experiments.tuning import tune
from hstu_xd.files import locked_folder
from hstu_xd.training.settings import load_settings

SPACE = "xd_tune.space = (\"xd_train.learning_rate = (1e-4, 1e-2, 'log')\",)"
RECIPE = (*QUICK, SPACE)


@pytest.fixture(scope="module")
def finished(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trials of one variant, really trained, through the command line."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    words = ["tune", "--data", str(store_path), "--trials", "2", "--out", str(out)]
    words += ["--variants", "hstu", *(x for b in RECIPE for x in ("--gin_bindings", b))]
    assert app.run(words) == 0
    return out


def rows_of(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "trials.json").read_text())


def test_no_trial_reads_the_test(finished: Path) -> None:
    rows = rows_of(finished)
    assert [(row["variant"], row["trial"], row["state"]) for row in rows] == [
        ("hstu", 1, "complete"),
        ("hstu", 2, "complete"),
    ]
    for row in rows:
        run = finished / row["run"]
        summary = json.loads((run / "summary.json").read_text())
        assert "test" not in summary
        assert row["value"] == row["valid"]["ndcg@100"] == summary["valid"]["ndcg@100"]
        assert '"split": "test"' not in (run / "metrics.jsonl").read_text()


def test_the_first_trial_is_the_recipe(finished: Path) -> None:
    first, second = (row["settings"]["xd_train.learning_rate"] for row in rows_of(finished))
    assert first == load_settings([], RECIPE).train.learning_rate
    assert 1e-4 <= second <= 1e-2 != first


def test_best_gin_is_what_the_best_trial_was_trained_with(finished: Path) -> None:
    best = max(rows_of(finished), key=lambda row: row["value"])
    for file in (finished / "best.gin", finished / "hstu" / "best.gin"):
        settings = load_settings([file])
        assert settings.train.learning_rate == best["settings"]["xd_train.learning_rate"]
        recorded = json.loads((finished / best["run"] / "run.json").read_text())
        assert settings.unlike(recorded) == []


def test_trials_that_are_there_are_kept(finished: Path, store_path: Path) -> None:
    table = tune(store_path, ["hstu"], 1, finished, bindings=RECIPE)
    assert table == (finished / "tune.md").read_text()
    assert len(rows_of(finished)) == 2


def test_another_search_does_not_go_on_there(
    finished: Path, store_path: Path, tmp_path: Path
) -> None:
    longer = [*RECIPE, "xd_train.num_epochs = 2"]
    with pytest.raises(InputError, match=r"other settings \(not xd_train.num_epochs = 2 but 1\)"):
        tune(store_path, ["hstu"], 3, finished, bindings=longer)
    with pytest.raises(InputError, match=r"other settings \(not xd_tune.space"):
        tune(store_path, ["hstu"], 3, finished, bindings=QUICK)
    other = tmp_path / "other"
    synthesize(other, SynthOptions(users=40, domains=2, items_per_domain=20, mean_length=8))
    with pytest.raises(InputError, match=r"hstu was tuned on other data than .*; give another"):
        tune(other, ["hstu"], 3, finished, bindings=RECIPE)


# In the place of a training: it writes what a run has, and value by value what validation finds.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
folder, values = Path(sys.argv[1]), json.loads(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
facts = {"variant_name": "hstu", "seed": 42, "data_hashes": {}}
(folder / "run.json").write_text(json.dumps(facts))
rows = [{"split": "valid", "epoch": e, "ndcg@100": v} for e, v in enumerate(values)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""
ENDS = """
summary = {"best_epoch": 0, "valid": {"ndcg@100": max(values)}}
(folder / "summary.json").write_text(json.dumps(summary))
"""
FAILS = "sys.exit('the loss is not finite')\n"
WAITS = "sys.stdin.read(); sys.exit('stopped')\n"
ASKS_TO_STOP = "os.kill(os.getppid(), signal.SIGTERM); " + WAITS
# A training that is told to stop ends with an error.
IS_PRUNED = "signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped')); time.sleep(100)\n"
Told = Callable[..., list[list[str]]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """Say how trainings go, one after the other; gives the bindings of each, as they begin."""

    def say(*each: tuple[str, list[float]]) -> list[list[str]]:
        begun: list[list[str]] = []

        def command(
            verb: str,
            data: Path,
            folder: Path,
            name: str,
            files: object,
            bindings: Sequence[str],
            **_: object,
        ) -> list[str]:
            assert verb == "train"
            ends, values = each[len(begun)]
            begun.append([*bindings, str(folder)])
            return [sys.executable, "-c", PROGRAM + ends, str(folder), json.dumps(values)]

        monkeypatch.setattr(tuning, "training_command", command)
        return begun

    return say


def test_a_trial_behind_the_median_is_pruned(told: Told, store_path: Path, tmp_path: Path) -> None:
    told((ENDS, [0.1, 0.2, 0.3]), (IS_PRUNED, [0.1, 0.1]))
    bold = ["xd_tune.unpruned_trials = 1", "xd_tune.unpruned_epochs = 1"]
    lines: list[str] = []
    tune(store_path, [], 2, tmp_path, bindings=[*RECIPE, *bold], announce=lines.append)
    assert lines == [
        "recipe trial 1: ndcg@100 30.00 % on validation",
        "recipe trial 2: pruned after 2 epochs",
    ]
    assert [row["state"] for row in rows_of(tmp_path)] == ["complete", "pruned"]
    told()
    tune(store_path, [], 2, tmp_path, bindings=[*RECIPE, *bold])


def test_every_variant_gets_the_same_trials(told: Told, store_path: Path, tmp_path: Path) -> None:
    begun = told(*[(ENDS, [value]) for value in (0.1, 0.2, 0.4, 0.3)])
    table = tune(store_path, ["hstu", "all"], 2, tmp_path, bindings=RECIPE)
    assert [Path(each[-1]).relative_to(tmp_path).as_posix() for each in begun] == [
        f"{variant}/trial-00{number}" for number in (1, 2) for variant in ("hstu", "all")
    ]
    assert begun[2][-2] == begun[3][-2], "drawn before anything is learned: the same values"
    assert "hstu | 2 | 0 | 0 | 2 | 40.00 | 10.00" in table
    assert "all | 2 | 0 | 0 | 2 | 30.00 | 20.00" in table
    assert "xd_encoder.ddsr = True" in (tmp_path / "all" / "best.gin").read_text()
    assert (tmp_path / "best.gin").read_text() == (tmp_path / "hstu" / "best.gin").read_text()


def test_a_search_that_was_stopped_goes_on(told: Told, store_path: Path, tmp_path: Path) -> None:
    begun = told((ENDS, [0.1]), (ASKS_TO_STOP, [0.2]))
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM, 1 of 3 trials are done; go on wi"):
        tune(store_path, ["hstu"], 3, tmp_path, bindings=RECIPE)
    again = told((ENDS, [0.3]), (ENDS, [0.2]))
    tune(store_path, ["hstu"], 3, tmp_path, bindings=RECIPE)
    assert again[0] == begun[1], "the trial that was stopped has the values it had"
    assert again[1][-2] not in [each[-2] for each in begun]
    assert [row["value"] for row in rows_of(tmp_path)] == [0.1, 0.3, 0.2]
    more = told((ENDS, [0.5]))
    tune(store_path, ["hstu"], 4, tmp_path, bindings=RECIPE)
    assert len(more) == 1


def test_a_failed_trial_is_told_and_not_tried_again(
    told: Told, store_path: Path, tmp_path: Path
) -> None:
    told((ENDS, [0.1]), (FAILS, []))
    tune(store_path, ["hstu"], 2, tmp_path, bindings=RECIPE)
    assert rows_of(tmp_path)[1]["error"] == "the loss is not finite"
    told((FAILS, []))
    with pytest.raises(HstuXdError, match="all trials of mask failed, first: the loss is not fini"):
        tune(store_path, ["mask"], 1, tmp_path, bindings=RECIPE)


def test_a_recipe_outside_the_space_is_no_trial(
    told: Told, store_path: Path, tmp_path: Path
) -> None:
    begun = told((ENDS, [0.1]))
    lines: list[str] = []
    tune(
        store_path,
        [],
        1,
        tmp_path,
        bindings=[*RECIPE, "xd_train.learning_rate = 0.5"],
        announce=lines.append,
    )
    assert begun[0][-2] != "xd_train.learning_rate = 0.5"
    assert lines[0] == (
        "the recipe is no trial of recipe: xd_train.learning_rate lies outside xd_tune.space"
    )


@pytest.mark.parametrize(
    ("variant", "line"),
    [
        ("sasrec", "xd_encoder.enable_relative_attention_bias = [True, False]"),
        ("hstu", "xd_encoder.ddsr = [True, False]"),
    ],
)
def test_what_makes_a_variant_is_not_searched(
    variant: str, line: str, store_path: Path, tmp_path: Path
) -> None:
    bindings = [*QUICK, f"xd_tune.space = ({line!r},)"]
    with pytest.raises(InputError, match=rf"searches xd_encoder.* makes variant {variant} what"):
        tune(store_path, [variant], 1, tmp_path / "out", bindings=bindings)
    assert not (tmp_path / "out").exists()


def test_a_second_search_in_a_folder_is_refused(store_path: Path, tmp_path: Path) -> None:
    with (
        locked_folder(tmp_path, "tunes in"),
        pytest.raises(InputError, match=r"another process \(pid \d+ on .*\) tunes in"),
    ):
        tune(store_path, ["hstu"], 1, tmp_path, bindings=RECIPE)


def test_without_optuna_it_says_what_to_install(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    tuning.load_optuna.cache_clear()
    with pytest.raises(InputError, match=r'needs Optuna, .*pip install "hstu-xd\[tune\]"'):
        tune(store_path, ["hstu"], 1, tmp_path, bindings=RECIPE)
    tuning.load_optuna.cache_clear()


@pytest.mark.parametrize("recipe", [(*QUICK,), (*QUICK, "xd_train.baseline = 'popularity'")])
def test_a_run_that_skipped_the_test_reads_it_when_it_is_resumed(
    recipe: tuple[str, ...], store_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["train", "--data", str(store_path), "--out", str(out)]
    bindings = [x for b in recipe for x in ("--gin_bindings", b)]
    assert app.run([*words, *bindings, "--skip-test"]) == 0
    assert ", valid hr@10 " in capsys.readouterr().out
    before = json.loads((out / "summary.json").read_text())
    assert "test" not in before
    assert app.run([*words, "--resume"]) == 0
    assert ", test hr@10 " in capsys.readouterr().out
    after = json.loads((out / "summary.json").read_text())
    assert after["valid"] == before["valid"]
    assert after["test"]["count"] == 160
