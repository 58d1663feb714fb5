"""``recommend --all-users`` and ``--pairs``: what each user would get alone, in every format."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from tiny_models import SWITCHES, draw_histories, encode, tiny_model

from hstu_xd.catalog import DomainCatalog
from hstu_xd.cli import app
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.synthetic import SynthOptions, synthesize
from hstu_xd.errors import InputError
from hstu_xd.plugins.bridge import free_port
from hstu_xd.serving import bulk_files, score_pairs
from hstu_xd.serving.bulk import Histories, user_vectors

RECIPE = (
    "xd_encoder.num_heads = 2",
    "xd_encoder.dqk = 4",
    "xd_encoder.dv = 4",
    "xd_encoder.domain_mask = True",
    "xd_encoder.tape = True",
    "xd_encoder.ddsr = True",
    "xd_train.item_embedding_dim = 8",
    "xd_train.num_epochs = 1",
    "xd_train.num_negatives = 20",
    "xd_train.max_sequence_length = 12",
)
Call = Callable[..., str]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> InteractionStore:
    path = tmp_path_factory.mktemp("synth") / "store"
    synthesize(path, SynthOptions(users=120, domains=3, items_per_domain=40, mean_length=14))
    return InteractionStore.open(path)


@pytest.fixture(scope="module")
def trained(store: InteractionStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    line = ["train", "--data", str(store.path), "--out", str(run)]
    assert app.run([*line, *(x for each in RECIPE for x in ("--gin_bindings", each))]) == 0
    return run


def alone(call: Call, *words: object) -> list[dict[str, Any]]:
    return json.loads(call("recommend", *words, "--json"))["items"]


@pytest.mark.parametrize("seen", ["--exclude-seen", "--include-seen"])
def test_everybody_gets_what_each_would_get_alone(
    store: InteractionStore, trained: Path, tmp_path: Path, call: Call, seen: str
) -> None:
    file = tmp_path / "all.parquet"
    call("recommend", trained, "--all-users", "--k", "25", "--out", file, seen)
    table = pl.read_parquet(file)
    assert table.columns == ["user", "domain", "rank", "item", "score"]
    assert table["user"].n_unique() == store.num_users
    for index in range(0, store.num_users, 11):
        user = store.user_token(index)
        for domain in store.domain_names:
            own = table.filter((pl.col("user") == user) & (pl.col("domain") == domain))
            wanted = alone(call, trained, "--user", user, "--domain", domain, "--k", "25", seen)
            assert own["rank"].to_list() == list(range(1, len(wanted) + 1))
            scores = [row["score"] for row in wanted]
            assert own["score"].to_list() == pytest.approx(scores, abs=1e-5)
            for place, (item, row) in enumerate(zip(own["item"], wanted)):
                tied = [x["item"] for x in wanted if abs(x["score"] - scores[place]) < 2e-5]
                assert item in tied or scores[-1] > row["score"] - 2e-5


@pytest.mark.parametrize("name", [*SWITCHES, "softmax"])
def test_one_encoding_answers_as_one_for_each_domain(name: str) -> None:
    switches = {"tape": True, "normalization": "softmax"} if name == "softmax" else SWITCHES[name]
    model, histories = tiny_model(**switches), draw_histories([9, 1, 20, 5])
    windows = Histories(
        torch.tensor([item for each in histories for item in each.items]),
        torch.tensor([time for each in histories for time in each.times]),
        torch.tensor([0, 9, 10, 30, 35]),
    )
    with torch.no_grad():
        found = user_vectors(model, windows, [2, 0, 1], at=10**8)
        for place, domain in enumerate([2, 0, 1]):
            asked = [type(h)(h.items, h.times, domain, 10**8) for h in histories]
            torch.testing.assert_close(found[:, place], encode(model, asked), rtol=0, atol=1e-5)


def test_a_stopped_run_goes_on_and_formats_agree(
    trained: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ("recommend", trained, "--all-users", "--k", "5", "--domains", "films,books")
    call(*ask, "--out", tmp_path / "whole.parquet")
    monkeypatch.setattr(bulk_files, "PART_ROWS", 200)
    written, real = [], bulk_files._keep

    def dies(files: list[Path], found: list[list[bytes]]) -> None:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.extend(files)
        real(files, found)

    for suffix in ("parquet", "csv", "jsonl"):
        file = tmp_path / f"parts.{suffix}"
        written.clear()
        monkeypatch.setattr(bulk_files, "_keep", dies)
        assert "the same command goes on" in call(*ask, "--out", file, code=1)
        assert not file.exists()
        monkeypatch.setattr(bulk_files, "_keep", real)
        assert "goes on: 60 of 120 users are done" in call(*ask, "--out", file)
        assert sorted(x.name for x in tmp_path.iterdir() if x.name.startswith(".")) == []
    whole = pl.read_parquet(tmp_path / "whole.parquet")
    assert whole["domain"].unique(maintain_order=True).to_list() == ["films", "books"]
    for table in (
        pl.read_parquet(tmp_path / "parts.parquet"),
        pl.read_csv(tmp_path / "parts.csv"),
        pl.read_ndjson(tmp_path / "parts.jsonl"),
    ):
        assert table.drop("score", "rank").equals(whole.drop("score", "rank"))
        assert table["score"].to_list() == pytest.approx(whole["score"].to_list(), abs=1e-6)


# The command in parts of few users, and with a signal or an error in the part of a process.
_IN_PARTS = """
import os, signal, sys
from hstu_xd.cli.app import main
from hstu_xd.errors import HstuXdError
from hstu_xd.serving import bulk, bulk_files

bulk_files.PART_ROWS = 400
best, calls = bulk.BulkRecommender.best, []

def watched(self, histories):
    calls.append(0)
    if os.environ["RANK"] == "1":
        if (sys.argv[1], len(calls)) == ("stop", 1):
            os.kill(os.getpid(), signal.SIGTERM)
        if (sys.argv[1], len(calls)) == ("fail", 2):
            raise HstuXdError("no numbers in the second one")
    return best(self, histories)

bulk.BulkRecommender.best = watched
main(sys.argv[2:])
"""


def of_two(what: str, folders: list[Path], *words: str) -> list[tuple[int, str, str]]:
    """Run the command in two processes with a folder each; exit codes, stdout and stderr."""
    line = [sys.executable, "-c", _IN_PARTS, what, "recommend", "run", "--all-users", *words]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            line,
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank)} | job,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]
    said = [process.communicate(timeout=180) for process in processes]
    return [(process.returncode, *each) for process, each in zip(processes, said)]


@pytest.mark.slow
def test_machines_share_the_users(trained: Path, tmp_path: Path, call: Call) -> None:
    """Each has the run, one gets the file; they stop together and go on."""
    ask = ("--k", "5", "--out", "all.parquet")
    call("recommend", trained, "--all-users", *ask[:2], "--out", tmp_path / "alone.parquet")
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        shutil.copytree(trained, folder / "run")
    first, second = of_two("fail", folders, *ask)
    assert (first[0], second[0]) == (1, 1)
    assert first[2].endswith("hstu-xd: no numbers in the second one\n")
    first, second = of_two("stop", folders, *ask)
    assert (first[0], second[0]) == (143, 143)
    # The four parts of 26 users each that were there when the fifth and the last one were not.
    assert "goes on: 52 of 120 users are done" in first[2]
    assert first[2].endswith(
        "stopped by SIGTERM, 104 of 120 users are done; the same command goes on\n"
    ), first[2]
    first, second = of_two("", folders, *ask)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "wrote all.parquet: 1,800 rows for 120 users in 3 domains" in first[1]
    assert second[1:] == ("", "")
    found, expected = (
        pl.read_parquet(file) for file in (folders[0] / "all.parquet", tmp_path / "alone.parquet")
    )
    assert found.drop("score").equals(expected.drop("score"))
    assert found["score"].to_list() == pytest.approx(expected["score"].to_list(), abs=1e-6)
    assert [file.name for file in folders[1].iterdir()] == ["run"]
    assert {file.name for file in folders[0].iterdir()} == {"run", "all.parquet"}


@pytest.mark.slow
def test_machines_with_different_runs_are_refused(trained: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        shutil.copytree(trained, folder / "run")
    with (folders[1] / "run" / "config.gin").open("a") as file:
        file.write("# Of another day.\n")
    for code, _, errors in of_two("", folders, "--out", "all.csv"):
        assert code == 2
        assert errors.splitlines()[-1].endswith("give the same to all of them"), errors
    assert not (folders[0] / "all.csv").exists()


def test_pairs_are_scored_by_one_process(
    trained: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = call(
        *("recommend", trained, "--pairs", tmp_path / "pairs.csv", "--out", tmp_path / "s.csv"),
        code=2,
    )
    assert "--pairs scores in one process, and 2 were started; start it without torchrun" in said


def test_parts_of_another_request_are_not_used(trained: Path, tmp_path: Path, call: Call) -> None:
    parts = tmp_path / ".some.csv.parts"
    parts.mkdir()
    (parts / "plan.json").write_text("{}")
    (parts / "000000.parquet").write_text("of something else")
    said = call("recommend", trained, "--all-users", "--k", "3", "--out", tmp_path / "some.csv")
    assert "parts of another request; begins anew" in said
    assert not parts.exists()


def test_pairs_get_the_scores_that_a_user_is_shown(
    store: InteractionStore,
    trained: Path,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks are made small; a user's pairs need not stand together."""
    monkeypatch.setattr(score_pairs, "BATCH_USERS", 3)
    monkeypatch.setattr(score_pairs, "BLOCK_SCORES", 40)
    rows, scores = [], []
    for index in range(0, store.num_users, 11):
        user = store.user_token(index)
        for domain in store.domain_names:
            ask = ("--user", user, "--domain", domain, "--k", "40", "--include-seen")
            found = alone(call, trained, *ask)[index % 7 :: 5]
            rows += [(user, row["item"], domain) for row in found]
            scores += [row["score"] for row in found]
    places = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    rows, scores = [rows[i] for i in places], [scores[i] for i in places]
    table = pl.DataFrame(rows, schema=["user_id", "item", "domain"], orient="row")
    table.write_parquet(tmp_path / "pairs.parquet")
    table.drop("domain").write_csv(tmp_path / "pairs.csv")
    read = {"parquet": pl.read_parquet, "csv": pl.read_csv, "jsonl": pl.read_ndjson}
    for suffix, pairs in (("parquet", "parquet"), ("csv", "csv"), ("jsonl", "csv")):
        file = tmp_path / f"scores.{suffix}"
        said = call("recommend", trained, "--pairs", tmp_path / f"pairs.{pairs}", "--out", file)
        assert f"wrote {file}: {len(rows)} scores of 11 users" in said
        written = read[suffix](file)
        assert written.columns == ["user", "item", "domain", "score"]
        assert written.select("user", "item", "domain").rows() == rows
        assert written["score"].to_list() == pytest.approx(scores, abs=1e-5)


def test_pairs_that_cannot_be_scored_are_listed(
    store: InteractionStore, trained: Path, tmp_path: Path, call: Call
) -> None:
    user, item = store.user_token(4), store.catalog.token(1)
    (tmp_path / "pairs.csv").write_text(
        f"user,item,domain\n{user},{item},\nnobody,{item},\n{user},no,\n{user},{item},films\n"
    )
    ask = ("recommend", trained, "--pairs", tmp_path / "pairs.csv", "--out", tmp_path / "s.csv")
    assert "3 pairs get no score" in call(*ask)
    assert pl.read_csv(tmp_path / "s.csv").select("user", "item").rows() == [(user, item)]
    assert pl.read_csv(tmp_path / "s.unserved.csv").rows() == [
        ("nobody", item, "the user is not in the log"),
        (user, "no", "the model does not know the item"),
        (user, item, "the item is of domain 'books', not 'films'"),
    ]
    told = json.loads(call(*ask, "--force", "--json").splitlines()[0])
    assert (told["rows"], told["users"], told["unserved"]) == (1, 1, 3)


def test_users_of_a_file_and_those_who_get_nothing(
    store: InteractionStore, trained: Path, tmp_path: Path, call: Call
) -> None:
    tokens = [store.user_token(i) for i in (7, 3)]
    (tmp_path / "users.txt").write_text("\n".join([tokens[0], "nobody", tokens[1], tokens[0]]))
    pl.DataFrame({"user": [*tokens, "nobody"]}).write_parquet(tmp_path / "users.parquet")
    for name in ("users.txt", "users.parquet"):
        out = tmp_path / "some.csv"
        ask = ("recommend", trained, "--all-users", "--users", tmp_path / name, "--k", "2")
        said = call(*ask, "--out", out, "--force")
        assert "1 users get nothing: 'nobody' is not in the log" in said
        assert pl.read_csv(out)["user"].unique(maintain_order=True).to_list() == tokens
        assert pl.read_csv(tmp_path / "some.unserved.csv")["user"].to_list() == ["nobody"]
    told = json.loads(call(*ask, "--out", tmp_path / "b.csv", "--json").splitlines()[0])
    assert told["unserved"] == {"nobody": "is not in the log"}


def test_a_newer_log_is_read_by_the_ids_of_its_items(
    store: InteractionStore, trained: Path, tmp_path: Path, call: Call
) -> None:
    """New items shift the numbers of the others, and are left out of the histories."""
    token = store.user_token(5)
    rows = []
    for index in (5, 6):
        items, times = store.history(index)
        for item, time in zip(items.tolist(), times.tolist()):
            domain = store.domain_names[int(store.catalog.item_domains[item])]
            rows.append((store.user_token(index), store.catalog.token(item), domain, time))
    rows += [(token, "a new item", "films", rows[-1][3] + 10**8)]
    rows += [("newcomer", "a new item", "films", 10**9), ("newcomer", "other", "books", 10**9)]
    (tmp_path / "log.csv").write_text(
        "user,item,domain,time\n" + "".join(f"{u},{i},{d},{t}\n" for u, i, d, t in rows)
    )
    call("prepare", tmp_path / "log.csv", "--out", tmp_path / "newer", "--time-unit", "s")
    out = tmp_path / "new.csv"
    said = call(
        "recommend", trained, "--all-users", "--log", tmp_path / "newer", "--k", "4", "--out", out
    )
    assert "are unknown to the model; their events are left out" in said
    assert "'newcomer' has no event of an item that the model knows" in said
    own = pl.read_csv(out).filter((pl.col("user") == token) & (pl.col("domain") == "books"))
    ask = ("--user", token, "--domain", "books", "--k", "4")
    wanted = alone(call, trained, *ask)
    assert own["score"].to_list() == pytest.approx([row["score"] for row in wanted], abs=1e-5)
    assert alone(call, trained, *ask, "--log", tmp_path / "newer") == [
        {"item": row["item"], "score": pytest.approx(row["score"], abs=1e-5)} for row in wanted
    ]
    said = call(
        "recommend", trained, *ask[2:], "--user", "newcomer", "--log", tmp_path / "newer", code=2
    )
    assert "user 'newcomer' has no event of an item that the model knows" in said


def test_a_catalogue_that_contradicts_is_refused() -> None:
    ours = DomainCatalog(torch.tensor([0, 0, 1, -1]), ["books", "films"], ["a", "b", ""])
    theirs = DomainCatalog(torch.tensor([0, 0, 1, 0]), ["films", "books"], ["b", "a", "c"])
    assert ours.ids_in(theirs).tolist() == [0, 2, 1, 0]
    moved = DomainCatalog(torch.tensor([0, 0, 1]), ["films", "books"], ["a", "b"])
    with pytest.raises(InputError, match=r"item 'a' is of domain 'books' in one .*'films'"):
        ours.ids_in(moved)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--all-users"], "--out is missing"),
        (["--user", "u"], "--domain is missing"),
        ([], "--user is missing"),
        (["--pairs", "NOBODY"], "--out is missing"),
        (
            ["--all-users", "--out", "OUT.parquet", "--user", "u"],
            "--user .*not go with --all-users",
        ),
        (["--user", "u", "--domain", "books", "--domains", "books"], "--domains .*only with --all"),
        (["--pairs", "NOBODY", "--out", "OUT.csv", "--k", "3"], "--k does not go with --pairs"),
        (["--pairs", "RUN/absent", "--out", "OUT.csv"], "--pairs .*no such file"),
        (["--pairs", "NOBODY", "--out", "OUT.csv"], "no user column"),
        (["--pairs", "NOITEM", "--out", "OUT.csv"], "row 2 has no item"),
        (["--pairs", "NOPAIR", "--out", "OUT.csv"], "holds no pair"),
        (["--pairs", "NOFIT", "--out", "OUT.csv"], "none of 1 pairs can be scored: .*not know"),
        (["--pairs", "NOFIT", "--out", "RUN/run.json/a.csv"], "cannot be written"),
        (["--pairs", "NOFIT", "--out", "OUT.csv", "--at", "5"], "--at 5 is before the last event"),
        (["--all-users", "--out", "OUT.xls"], "parquet, csv, jsonl"),
        (["--all-users", "--out", "OUT.csv", "--format", "xls"], "--format xls"),
        (["--all-users", "--out", "OUT.csv", "--domains", "boks"], "did you mean 'books'"),
        (
            ["--all-users", "--out", "OUT.csv", "--at", "5"],
            "--at 5 is before the last event of 120",
        ),
        (["--all-users", "--out", "RUN/run.json/a.csv"], "cannot be written"),
        (["--all-users", "--out", "RUN", "--format", "csv"], "is a folder"),
        (["--all-users", "--out", "RUN/run.json", "--format", "csv"], "add --force"),
        (["--all-users", "--out", "OUT.csv", "--users", "RUN/absent"], "cannot be read"),
        (["--all-users", "--out", "OUT.csv", "--users", "EMPTY"], "holds no id"),
        (["--all-users", "--out", "OUT.csv", "--users", "NOBODY"], "none of 1 users can be served"),
        (["--all-users", "--out", "OUT.csv", "--data", "RUN", "--log", "RUN"], "both name a store"),
    ],
)
def test_bad_input_is_said_before_anything_is_computed(
    store: InteractionStore,
    trained: Path,
    tmp_path: Path,
    call: Call,
    words: list[str],
    message: str,
) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "nobody").write_text("nobody\n")
    places = {"OUT": tmp_path / "out", "RUN": trained, "EMPTY": tmp_path / "empty"}
    pair = f"{store.user_token(0)},a"
    for name, rows in {"NOITEM": [pair, "b,"], "NOPAIR": [], "NOFIT": [pair]}.items():
        places[name] = tmp_path / f"{name}.csv"
        places[name].write_text("\n".join(["user,item", *rows]))
    places["NOBODY"] = tmp_path / "nobody"
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    said = call("recommend", trained, *words, code=2)
    assert len(said.splitlines()) == 1
    assert re.search(message, said), said
    assert not list(tmp_path.glob("*out*"))


def test_a_domain_without_items_is_refused(trained: Path, tmp_path: Path) -> None:
    from hstu_xd.serving.bulk import BulkRecommender
    from hstu_xd.training.run import load_trained

    best = load_trained(trained)
    best.ranker.catalog = DomainCatalog(torch.tensor([0, 0, 0]), ["books", "films"])
    with pytest.raises(InputError, match="domain 'films' has no items to recommend"):
        BulkRecommender(best, [1], 3, window=4, protocol=best.protocol)
