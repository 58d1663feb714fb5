"""Paths are paths, folders of parts are one log, and names of parts are no domains."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from log_files import contents, write_log

from hstu_xd.data import InteractionStore
from hstu_xd.data.prepare import prepare_logs
from hstu_xd.data.sources.columns import ColumnOptions
from hstu_xd.errors import InputError

START = 1_500_000_000
HEADER = ("user_id", "item_id", "timestamp")


def rows(letter: str, count: int = 4) -> list[tuple[str, str, int]]:
    return [(f"u{n % 2}", f"{letter}{n}", START + 100 * n + ord(letter)) for n in range(count)]


def as_json(letter: str) -> str:
    names = ("user_id", "item_id", "timestamp")
    return "".join(json.dumps(dict(zip(names, row))) + "\n" for row in rows(letter))


def as_parquet(path: Path, letter: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(rows(letter), schema=list(HEADER), orient="row").write_parquet(path.absolute())
    return path


def items(folder: Path) -> list[str]:
    return pl.read_parquet(folder / "catalog.parquet")["item"].to_list()


ODD_NAMES = ["log[1]{}", "lo*{}", "log?{}", "{{a,b}}{}", "[l]og{}", "~log{}", "a=b{}", "log #1{}"]
ODD_NAMES += ["s3:log{}", "file:log{}", "lo%67{}"]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet", ".csv.gz"])
@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_path_is_no_pattern(
    name: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the file that is named is read, though the name would match its neighbours, too."""
    monkeypatch.chdir(tmp_path)
    asked = Path(name.format(ending))
    neighbours = [Path(f"{stem}{ending}") for stem in ("log1", "log", "lo", "a", "b", "logx")]
    for path, letter in [(asked, "x"), *((path, "n") for path in neighbours)]:
        if ending == ".jsonl":
            path.write_text(as_json(letter))
        elif ending == ".parquet":
            as_parquet(path, letter)
        else:
            write_log(path, rows(letter), HEADER)
            if ending == ".csv.gz":
                path.write_bytes(gzip.compress(path.read_bytes()))
    prepare_logs([f"shop={asked}"], tmp_path / "out")
    assert items(tmp_path / "out") == [f"x{n}" for n in range(4)]


def hive(folder: Path, key: str = "domain") -> list[Path]:
    parts = []
    for domain, letter in (("books", "b"), ("Gift%20Cards", "g")):
        for n in range(2):
            name = f"part-0000{n}-8c6b1c1e-1111-4222-8333-444455556666.c000.snappy.parquet"
            part = folder / f"{key}={domain}" / name
            part.parent.mkdir(parents=True, exist_ok=True)
            frame = pl.DataFrame(rows(letter)[n::2], schema=list(HEADER), orient="row")
            frame.write_parquet(part)
            parts.append(part)
        (folder / f"{key}={domain}" / f".{name}.crc").write_bytes(b"crc\0")
    (folder / "_SUCCESS").touch()
    return parts


@pytest.mark.parametrize("how", ["folder", "files", "domain folders"])
def test_hive_partitions(how: str, tmp_path: Path) -> None:
    parts = hive(tmp_path / "log")
    given = {
        "folder": [tmp_path / "log"],
        "files": [*parts, tmp_path / "log" / "_SUCCESS"],
        "domain folders": sorted({part.parent for part in parts}),
    }[how]
    manifest = prepare_logs([str(path) for path in given], tmp_path / "out")
    assert {name: d["items"] for name, d in manifest["domains"].items()} == {
        "Gift Cards": 4,
        "books": 4,
    }


def test_hive_partitions_of_another_name(tmp_path: Path) -> None:
    parts = hive(tmp_path / "log", "shop")
    with pytest.raises(InputError, match="give each its domain as NAME=PATH"):
        prepare_logs([str(part) for part in parts], tmp_path / "out")
    manifest = prepare_logs(
        [str(tmp_path / "log")], tmp_path / "out", columns=ColumnOptions(domain="shop")
    )
    assert list(manifest["domains"]) == ["Gift Cards", "books"]


def test_a_domain_column_beats_the_partition(tmp_path: Path) -> None:
    log = tmp_path / "domain=all" / "log.csv"
    write_log(log, [("u", "a", "books", START), ("u", "b", "films", START + 1)], None)
    log.write_text("user_id,item_id,domain,timestamp\n" + log.read_text())
    assert list(prepare_logs([str(log)], tmp_path / "out")["domains"]) == ["books", "films"]


def test_events_without_a_partition(tmp_path: Path) -> None:
    log = tmp_path / "domain=__HIVE_DEFAULT_PARTITION__" / "part-0.csv"
    write_log(log, rows("a"), HEADER)
    with pytest.raises(InputError, match="partition of events without a domain"):
        prepare_logs([str(log)], tmp_path / "out")


def test_folders_of_parts(cli: Callable, tmp_path: Path) -> None:
    for domain in ("books", "films"):
        for n in range(3):
            write_log(tmp_path / domain / f"part-{n:05}.csv", rows(domain[0], 6)[n::3], HEADER)
        (tmp_path / domain / "part-00003.csv").touch()
        (tmp_path / domain / "_SUCCESS").touch()
        write_log(tmp_path / "whole" / f"{domain}.csv", rows(domain[0], 6), HEADER)
    outcome = cli("prepare", tmp_path / "books", tmp_path / "films", "--out", tmp_path / "out")
    assert outcome.code == 0
    assert f"left out {tmp_path / 'books' / 'part-00003.csv'}: empty" in outcome.out
    assert f"{tmp_path / 'films' / '_SUCCESS'}: a marker" in outcome.out
    assert "part-00000.csv and 2 more as" in outcome.out
    whole = [str(tmp_path / "whole" / f"{domain}.csv") for domain in ("books", "films")]
    prepare_logs(whole, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    named = [f"books={tmp_path / 'books'}", f"films={tmp_path / 'films'}"]
    prepare_logs(named, tmp_path / "named")
    assert contents(tmp_path / "named") == contents(tmp_path / "expected")


def test_a_folder_of_other_things(tmp_path: Path) -> None:
    write_log(tmp_path / "in" / "part-0.csv", rows("a"), HEADER)
    (tmp_path / "in" / "notes.md").write_text("# notes\n")
    with pytest.raises(InputError, match=r"more than the parts of one log .*; name the log files"):
        prepare_logs([str(tmp_path / "in")], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is a folder without a log"):
        prepare_logs([str(tmp_path / "empty")], tmp_path / "out")


NO_DOMAINS = [
    ("part-00000.csv", "part-00001.csv"),
    ("000000_0", "000001_0"),
    ("data-00000-of-00002.csv", "data-00001-of-00002.csv"),
    ("export000000000000.csv", "export000000000001.csv"),
    ("train.csv", "test.csv"),
    ("shop.train.csv", "shop.valid.csv"),
    ("2019.csv", "2020.csv"),
    ("clicks_2020-01.csv", "clicks_2020-02.csv"),
    ("log.csv", "books.csv"),
    ("chunk7.jsonl", "chunk8.jsonl"),
    ("part.0.parquet", "part.1.parquet"),
]


@pytest.mark.parametrize("names", NO_DOMAINS)
def test_names_of_parts_are_no_domains(names: tuple[str, str], tmp_path: Path) -> None:
    files = []
    for name, letter in zip(names, "ab"):
        files.append(tmp_path / name)
        if name.endswith("parquet"):
            as_parquet(files[-1], letter)
        elif name.endswith("jsonl"):
            files[-1].write_text(as_json(letter))
        else:
            write_log(files[-1], rows(letter), HEADER)
    with pytest.raises(InputError, match="its domain as NAME=PATH"):
        prepare_logs([str(file) for file in files], tmp_path / "out")
    manifest = prepare_logs([f"shop={file}" for file in files], tmp_path / "out")
    assert (list(manifest["domains"]), manifest["interactions"]) == (["shop"], 8)


def test_names_of_domains(tmp_path: Path) -> None:
    names = ("CDs_and_Vinyl", "Movies_and_TV", "ratings_Books", "partners", "logbooks")
    files = [write_log(tmp_path / f"{n}.csv", rows(x), HEADER) for n, x in zip(names, "abcde")]
    manifest = prepare_logs([str(file) for file in files], tmp_path / "out")
    assert list(manifest["domains"]) == sorted(names)


def test_only_empty_files(tmp_path: Path) -> None:
    parts = [tmp_path / f"part-{n}.csv" for n in range(2)]
    for part in parts:
        part.touch()
    with pytest.raises(InputError, match="is empty"):
        prepare_logs([str(part) for part in parts], tmp_path / "out")
    for part in parts:
        part.write_bytes(gzip.compress(b"\n"))
    with pytest.raises(InputError, match="is empty"):
        prepare_logs([str(part) for part in parts], tmp_path / "out")


def test_an_empty_compressed_part(cli: Callable, tmp_path: Path) -> None:
    log = write_log(tmp_path / "a.csv", [("u", "a", "d", START)])
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b""))
    outcome = cli("prepare", log, tmp_path / "b.csv.gz", "--out", tmp_path / "out")
    assert f"left out {tmp_path / 'b.csv.gz'}: empty" in outcome.out


def test_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a pipe; a log is read more than once: write it into"):
        prepare_logs([str(tmp_path / "pipe")], tmp_path / "out")
    with pytest.raises(InputError, match="is a device"):
        prepare_logs(["/dev/null"], tmp_path / "out")


def test_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "log.csv").symlink_to(tmp_path / "gone.csv")
    with pytest.raises(InputError, match=r"is a link to .*gone.csv, which does not exist"):
        prepare_logs([str(tmp_path / "log.csv")], tmp_path / "out")


def test_unreadable_is_not_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = write_log(tmp_path / "log.csv", rows("a"), HEADER)
    opened = Path.open

    def refused(self: Path, *args: str, **options: str) -> object:
        if self == log:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(InputError, match=r"log.csv: cannot be read \(Permission denied\)"):
        prepare_logs([str(log)], tmp_path / "out")


@pytest.mark.parametrize("letter", ["\n", "\t", "\x1b[31m", "\x7f", "\u2028", "\x85"])
def test_control_characters_in_a_domain(letter: str, cli: Callable, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", [("u", "a", f'"bo{letter}oks"', START)])
    outcome = cli("prepare", log, "--out", tmp_path / "out", "--quote", "double")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "holds control characters" in outcome.err
    assert not (tmp_path / "out").exists()
    log = write_log(tmp_path / "a.csv", rows("a"), HEADER)
    outcome = cli("prepare", f"a{letter}b={log}", "--out", tmp_path / "out")
    assert "holds control characters" in outcome.err


def test_users_with_control_characters_are_kept(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", [('"a\nb"', "x", "d", START)])
    prepare_logs([str(log)], tmp_path / "out")
    assert InteractionStore.open(tmp_path / "out").user_token(0) == "a\nb"


@pytest.mark.parametrize("name", ["s3:bucket", "file:store", "domain=books", "sto[r]e", "st*re"])
def test_a_store_in_a_folder_with_an_odd_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare_logs([f"d={write_log(Path('log.csv'), rows('x'), HEADER)}"], Path(name))
    store = InteractionStore.open(Path(name), verify=True)
    assert store.user_token(0) == store.users_from("", 1)[0]
    assert store.catalog.num_items == store.num_items
