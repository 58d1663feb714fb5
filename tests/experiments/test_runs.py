"""Reading run folders and aggregating over seeds."""

import json
import statistics
from pathlib import Path

import pytest

from hstu_xd.errors import InputError
from hstu_xd.experiments.run_folders import aggregate, differing_settings, read_runs


def test_a_folder_of_runs_is_expanded_in_the_order_of_its_ablation(workshop):
    store = workshop.store()
    for variant in ("all", "hstu"):
        for seed in (2, 1):
            workshop.run(f"out/{variant}-seed{seed}", store, variant=variant, seed=seed)
    (workshop.root / "out" / "notes").mkdir()
    out = workshop.root / "out"
    assert [run.path.name for run in read_runs([out])] == [
        "all-seed1", "all-seed2", "hstu-seed1", "hstu-seed2",
    ]  # fmt: skip
    (out / "ablation.json").write_text(json.dumps([{"variant": "hstu"}, {"variant": "all"}]))
    assert [(run.variant, run.seed) for run in read_runs([out, out / "all-seed2"])] == [
        ("hstu", 1), ("hstu", 2), ("all", 1), ("all", 2),
    ]  # fmt: skip


def test_repeated_rows_after_a_resume_count_once(workshop):
    folder = workshop.run("run", workshop.store(), epochs=2)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"split": "train", "epoch": 1, "step": 2, "loss": 9.0}\n')
        stream.write('{"split": "valid", "epoch": 1, "step": 3, "mrr": 0.5}\n')
    (run,) = read_runs([folder])
    assert [row["epoch"] for row in run.valid] == [1, 2]
    assert run.valid[0]["mrr"] == 0.5
    assert [row["loss"] for row in run.train if row["step"] == 2] == [9.0]


def test_unreadable_is_not_damaged(workshop, monkeypatch):
    folder = workshop.run("run", workshop.store())

    def refused(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(InputError, match=r"run.json: cannot be read: Permission denied"):
        read_runs([folder])


def test_a_run_without_summary_tells_how_far_it_is(workshop):
    folder = workshop.run("run", workshop.store(), epochs=3, finished=False)
    (run,) = read_runs([folder])
    assert run.summary is None
    assert "still training or stopped, after epoch 3" in run.notes[0]
    assert run.test == {}
    assert run.row()["valid"]["hr@100"] == run.valid[-1]["hr@100"]


def test_settings_are_compared_without_the_seed(workshop):
    store = workshop.store()
    folders = [
        workshop.run(f"{v}-{s}", store, variant=v, seed=s) for v in ("a", "hstu") for s in (1, 2)
    ]
    runs = read_runs(folders)
    assert runs[0].settings["train.local_batch_size"] == 32
    assert differing_settings(runs[:2]) == []
    assert differing_settings(runs) == ["encoder.domain_mask"]


def test_a_last_line_being_written_is_left_out(workshop):
    folder = workshop.run("run", workshop.store())
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"split": "valid", "epo')
    (run,) = read_runs([folder])
    assert len(run.valid) == 4
    assert "cut short" in run.notes[0]


def test_aggregate_matches_the_statistics_module():
    values = [0.1, 0.25, 0.3]
    rows = [{"variant": "a", "seed": i, "test": {"mrr": v}} for i, v in enumerate(values)]
    rows.append({"variant": "b", "seed": 0, "test": {"mrr": 0.2}})
    first, second = aggregate(rows)
    assert (first.variant, first.seeds, second.variant) == ("a", (0, 1, 2), "b")
    assert first.metrics["mrr"].mean == pytest.approx(statistics.mean(values))
    assert first.metrics["mrr"].std == pytest.approx(statistics.stdev(values))
    assert (second.metrics["mrr"].std, second.metrics["mrr"].count) == (None, 1)


def test_aggregate_leaves_missing_null_and_nan_out():
    tests = [{"mrr": 0.2}, {"mrr": None}, {"mrr": float("nan"), "hr@1": None}, {}]
    rows = [{"variant": "a", "seed": i, "test": test} for i, test in enumerate(tests)]
    (result,) = aggregate([*rows, {"variant": "a", "seed": 9, "test": None}])
    assert result.metrics["mrr"].count == 1
    assert "hr@1" not in result.metrics
    assert len(result.seeds) == 5


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{broken", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"epoch": 1}', "no 'split'"),
        ('{"split": "valid", "epoch": "x"}', "no number as 'epoch'"),
        ('{"split": "train", "epoch": 1}', "no number as 'step'"),
    ],
)
def test_an_unreadable_line_is_named(workshop, line, complaint):
    folder = workshop.run("run", workshop.store(), epochs=1)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + line + "\n\n")
    with pytest.raises(InputError) as caught:
        read_runs([folder])
    assert f"{path}:5: {complaint}" in str(caught.value)


def test_no_run_there(workshop):
    store = workshop.store()
    with pytest.raises(InputError, match="does not exist"):
        read_runs([workshop.root / "nowhere"])
    with pytest.raises(InputError, match="no run there"):
        read_runs([store])
    with pytest.raises(InputError, match="is a file"):
        read_runs([store / "manifest.json"])


def test_damaged_files_are_named(workshop):
    folder = workshop.run("run", workshop.store())
    (folder / "summary.json").write_text('{"test":\n oops}')
    with pytest.raises(InputError, match=r"summary\.json:2: not JSON"):
        read_runs([folder])
    (folder / "summary.json").write_text("[]")
    with pytest.raises(InputError, match="holds no JSON object"):
        read_runs([folder])
    (folder / "run.json").write_text('{"seed": 1}')
    with pytest.raises(InputError, match=r"run\.json: holds no 'variant_name'"):
        read_runs([folder])
