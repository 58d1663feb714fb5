"""Runs: what a folder holds, resuming after a kill, several processes, and what can go wrong."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import hstu_xd
from hstu_xd.cli import app
from hstu_xd.data.store import InteractionStore
from hstu_xd.evaluation.protocol import METRICS
from hstu_xd.experiments.ablation import ablate
from hstu_xd.training.checkpoint import load_checkpoint

EVERYTHING_ON = (
    "xd_encoder.domain_mask = True",
    "xd_encoder.tape = True",
    "xd_encoder.ddsr = True",
    "xd_encoder.target_view_heads = 1",
    "xd_encoder.target_domain_embedding = True",
)
SMALL = (
    "xd_encoder.num_heads = 2",
    "xd_encoder.dqk = 4",
    "xd_encoder.dv = 4",
    "xd_train.item_embedding_dim = 8",
    "xd_train.local_batch_size = 16",
    "xd_train.num_epochs = 2",
    "xd_train.num_negatives = 20",
    "xd_train.checkpoint_every = 3",
    "xd_train.num_warmup_steps = 4",
)


def arguments(store: Path, out: Path, *bindings: str) -> list[str]:
    config = out.parent / f"{out.name}.gin"
    config.write_text("\n".join((*SMALL, *EVERYTHING_ON)) + "\n")
    line = ["train", "--data", str(store), "--gin_config_file", str(config), "--out", str(out)]
    for binding in bindings:
        line += ["--gin_bindings", binding]
    return line


def start(line: list[str], **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "hstu_xd", *line],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    torch.set_num_threads(1)
    assert app.run(arguments(store_path, run)) == 0
    return run


def test_run_folder_holds_what_the_commands_read(trained: Path, store: InteractionStore) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert {"best_epoch", "valid", "test", "seconds_per_step", "events_per_second"} <= set(summary)
    assert summary["attention_pairs"] > 0
    assert summary["state_bytes"] > 0
    for name in (*METRICS, *(f"{m}[{d}]" for m in METRICS for d in ("switch", "stay"))):
        assert 0 <= summary["test"][name] <= 1
    assert sum(summary["test"][f"count[{d}]"] for d in store.domain_names) == store.num_users
    splits = [row["split"] for row in rows(trained)]
    assert splits == ["train", "valid", "train", "valid", "test"]
    assert any((trained / "tensorboard").iterdir())


def test_every_epoch_is_told_as_it_ends(store_path: Path, tmp_path: Path) -> None:
    """Into a file that somebody follows, and by an ablation of each of its runs."""
    log, run = tmp_path / "log", tmp_path / "run"
    line = [sys.executable, "-m", "hstu_xd", *arguments(store_path, run)]
    with log.open("wb") as file:
        subprocess.run(line, stdout=file, check=True)
    told = log.read_text().splitlines()
    assert re.match(
        r"epoch 0: loss \d+\.\d+, valid ndcg@100 0\.\d{4} \(the best\), [\d,]+ events/s, "
        r"[\d.]+ s; at most [\d,]+ s left",
        told[0],
    )
    assert told[1].startswith("epoch 1: ")
    assert told[1].endswith("at most 0 s left")
    assert told[-4:] == [
        "next:",
        f"  hstu-xd evaluate {run}",
        f"  hstu-xd report {run} --out FOLDER",
        f"  hstu-xd recommend {run} --all-users --out FILE.parquet",
    ]
    lines: list[str] = []
    ablate(store_path, ("hstu",), (1,), tmp_path / "a", bindings=SMALL, announce=lines.append)
    assert lines[0].startswith("1 of 1 runs to train, 1 at a time")
    assert lines[1].startswith("hstu seed 1: epoch 0: loss ")
    assert lines[-1] == "hstu seed 1: done"


def test_commands_name_what_comes_next(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ready to be copied, also from a folder with a space in its name."""
    assert app.run(["evaluate", str(trained)]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "next:",
        f"  hstu-xd report {trained} --out FOLDER",
        f"  hstu-xd recommend {trained} --all-users --out FILE.parquet",
    ]
    made = tmp_path / "a store"
    assert app.run(["synth", "--out", str(made), "--users", "60"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "next:",
        f"  hstu-xd train --data '{made}' --gin_config_file FILE.gin --out RUN",
        f"  hstu-xd ablate --data '{made}' --out RUNS",
    ]


def test_loaded_model_encodes(trained: Path, store: InteractionStore) -> None:
    model = hstu_xd.load(trained)
    items, times = store.history(0)
    vector = model.encode(
        torch.tensor(items[None].astype("int64")), torch.tensor(times[None]), torch.tensor([1])
    )
    assert vector.shape == (1, 8)
    assert vector.norm().item() == pytest.approx(1, abs=1e-5)


def test_evaluate_repeats_the_summary(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["evaluate", str(trained), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    summary = json.loads((trained / "summary.json").read_text())
    for split in ("valid", "test"):
        assert printed[split] == pytest.approx(summary[split])


def test_recommend_gives_unseen_items_of_the_domain(
    trained: Path, store: InteractionStore, capsys: pytest.CaptureFixture[str]
) -> None:
    user, domain = store.user_token(3), store.domain_names[1]
    line = ["recommend", str(trained), "--user", user, "--domain", domain, "--k", "7", "--json"]
    assert app.run(line) == 0
    items = json.loads(capsys.readouterr().out)["items"]
    tokens = store.catalog.item_tokens
    assert tokens is not None
    allowed = {tokens[i - 1] for i in store.catalog.items_of(1).tolist()}
    seen = {tokens[i - 1] for i in store.history(3)[0].tolist()}
    assert len(items) == 7
    assert {row["item"] for row in items} <= allowed - seen
    scores = [row["score"] for row in items]
    assert scores == sorted(scores, reverse=True)


def test_recommend_reads_no_more_events_than_training_did(
    store_path: Path, store: InteractionStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, length = tmp_path / "short", 5
    short = (f"xd_train.max_sequence_length = {length}", "xd_train.num_epochs = 1")
    assert app.run(arguments(store_path, run, *short)) == 0
    user = int(np.diff(store.offsets).argmax())
    assert np.diff(store.offsets)[user] > length
    line = ["recommend", str(run), "--user", store.user_token(user), "--domain", "films"]
    capsys.readouterr()
    assert app.run([*line, "--k", "1", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["items"][0]
    model = hstu_xd.load(run)
    items, times = (torch.tensor(part[None, -length:]).long() for part in store.history(user))
    domain = torch.tensor([store.domain_names.index("films")])
    assert model.catalog.item_tokens is not None
    item = list(model.catalog.item_tokens).index(best["item"]) + 1
    score = model.encode(items, times, domain)[0] @ model.item_vectors(torch.tensor(item))
    assert best["score"] == pytest.approx(score.item(), abs=1e-6)


def test_the_time_of_the_request_reaches_the_model(
    trained: Path, store: InteractionStore, capsys: pytest.CaptureFixture[str]
) -> None:
    items, times = (torch.tensor(part[None]).long() for part in store.history(3))
    model, domain = hstu_xd.load(trained), torch.tensor([1])
    line = ["recommend", str(trained), "--user", store.user_token(3), "--k", "1", "--json"]
    line += ["--domain", store.domain_names[1]]
    found = []
    for at in (times[0, -1:], times[0, -1:] + 10**8):
        assert app.run([*line, "--at", str(at.item())]) == 0
        (best,) = json.loads(capsys.readouterr().out)["items"]
        scores = model.item_vectors(model.catalog.items_of(1)) @ model.encode(
            items, times, domain, at
        ).squeeze(0)
        unseen = scores[~torch.isin(model.catalog.items_of(1), items)]
        assert best["score"] == pytest.approx(unseen.max().item(), abs=1e-6)
        found.append(best["score"])
    assert app.run(line) == 0
    assert json.loads(capsys.readouterr().out)["items"][0]["score"] == found[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--user", "nobody", "--domain", "books"], "no user .nobody."),
        (["--user", "USER", "--domain", "boks"], "unknown domain 'boks'.*did you mean 'books'"),
        (["--user", "USER", "--domain", "books", "--k", "0"], "--k.*1"),
        (["--user", "USER", "--domain", "books", "--kk", "3"], "--k"),
        (
            ["--user", "USER", "--domain", "books", "--at", "5"],
            "is 5, before the user's last event",
        ),
    ],
)
def test_recommend_names_what_it_does_not_know(
    trained: Path,
    store: InteractionStore,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    line = [store.user_token(0) if a == "USER" else a for a in arguments]
    assert app.run(["recommend", str(trained), *line]) == 2
    assert_one_line(capsys.readouterr().err, message)


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits(
    trained: Path, store_path: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    process = start(arguments(store_path, run))
    deadline = time.monotonic() + 120
    # Kill in the second epoch, after one of its own checkpoints.
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "last.safetensors").exists():
            progress = load_checkpoint(run / "last.safetensors")[1]["progress"]
            if progress["epoch"] == 1 and progress["users_in_epoch"] > 0:
                break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (run / "summary.json").exists(), "finished before it could be killed"
    resumed = start([*arguments(store_path, run), "--resume"])
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    for name in ("best.safetensors", "last.safetensors"):
        expected, found = (load_checkpoint(r / name)[0] for r in (trained, run))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert rows(run) == rows(trained)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_two_processes_train_as_one(store_path: Path, tmp_path: Path, asked: int) -> None:
    dry = (
        "xd_train.dropout_rate = 0.0",
        "xd_encoder.linear_dropout_rate = 0.0",
        f"xd_train.asked_domains = {asked}",
    )
    one, two = tmp_path / "one", tmp_path / "two"
    assert app.run(arguments(store_path, one, *dry)) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    line = arguments(store_path, two, *dry, "xd_train.local_batch_size = 8")
    processes = [
        start(line, RANK=str(r), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for r in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
    losses = [[r["loss"] for r in rows(run) if r["split"] == "train"] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert rows(two)[-1]["count"] == rows(one)[-1]["count"]


def test_diverged_loss_stops_and_keeps_the_last_good_checkpoint(
    store_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "diverged"
    line = arguments(
        store_path, run, "xd_train.learning_rate = 1e30", "xd_train.num_warmup_steps = 0"
    )
    assert app.run(line) == 1
    assert_one_line(capsys.readouterr().err, "not finite.*learning_rate")
    assert not (run / "summary.json").exists()
    if (run / "last.safetensors").exists():
        weights, _ = load_checkpoint(run / "last.safetensors")
        assert all(bool(torch.isfinite(w).all()) for w in weights.values())


def test_existing_run_is_not_overwritten(
    trained: Path, store_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    assert app.run(arguments(store_path, trained)) == 2
    assert_one_line(capsys.readouterr().err, "exists.*--resume")
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_resume_needs_a_run(
    store_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run([*arguments(store_path, tmp_path / "none"), "--resume"]) == 2
    assert_one_line(capsys.readouterr().err, "not a run folder")
    assert not (tmp_path / "none").exists()


def test_other_data_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert app.run(["synth", "--out", str(other), "--users", "40", "--seed", "5"]) == 0
    capsys.readouterr()
    assert app.run(["evaluate", str(trained), "--data", str(other)]) == 2
    assert_one_line(capsys.readouterr().err, "catalogue is not the one")


def test_checkpoint_of_another_shape_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("run.json", "catalog.parquet", "best.safetensors"):
        (broken / name).write_bytes((trained / name).read_bytes())
    config = (trained / "config.gin").read_text()
    (broken / "config.gin").write_text(
        config.replace("item_embedding_dim = 8", "item_embedding_dim = 16")
    )
    assert app.run(["evaluate", str(broken)]) == 2
    assert_one_line(capsys.readouterr().err, "has shape.*needs")
    (broken / "config.gin").write_text(config)
    (broken / "best.safetensors").write_bytes(b"not a checkpoint")
    assert app.run(["evaluate", str(broken)]) == 2
    assert_one_line(capsys.readouterr().err, "not a readable checkpoint")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["trian"], "trian.*train"),
        (["train", "--dta", "x"], "--data"),
        (
            ["ablate", "--data", "x", "--out", "y", "--variants", "mask,al"],
            "'al'.*did you mean 'all'",
        ),
        (["evaluate", "nowhere"], "nowhere.*not a run folder"),
    ],
)
def test_usage_errors(line: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(line) == 2
    assert_one_line(capsys.readouterr().err, message)


def assert_one_line(errors: str, pattern: str) -> None:
    lines = errors.strip().splitlines()
    assert lines, "nothing on stderr"
    assert re.search(pattern, lines[0]), errors
    assert "Traceback" not in errors
