"""Item -> domain tables of users: what is read, what is refused and in which words."""

import gzip
import re
from pathlib import Path

import polars as pl
import pytest
import torch

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.plugins.gr.research.dataset import first_genre_domains, read_item_domains

ITEMS, LARGEST = [1, 2, 4, 7], 8
ROWS = [("7", "films"), ("1", "books"), ("4", "films"), ("2", "books")]
TABLE = [-1, 0, 0, -1, 1, -1, -1, 1, -1]


def text(rows: list[tuple[str, str]], separator: str = ",", item: str = "item") -> str:
    return "".join(separator.join(row) + "\n" for row in [(item, "domain"), *rows])


def check(catalog: DomainCatalog) -> None:
    assert catalog.item_domains.tolist() == TABLE
    assert catalog.domain_names == ("books", "films")
    assert [catalog.items_of(d).tolist() for d in (0, 1)] == [[1, 2], [4, 7]]
    assert catalog.num_items == LARGEST


@pytest.mark.parametrize("item", ["item", "item_id", "movie_id"])
@pytest.mark.parametrize(("name", "separator"), [("d.csv", ","), ("d.tsv", "\t")])
def test_text(tmp_path: Path, name: str, separator: str, item: str) -> None:
    (tmp_path / name).write_text(text(ROWS, separator, item))
    check(read_item_domains(tmp_path / name, ITEMS, LARGEST))


def test_compressed_text_with_more_columns_and_repeated_lines(tmp_path: Path) -> None:
    file = tmp_path / "d.csv.gz"
    lines = ["title,domain,item", '"One, two", books ,1', "b,books,2", "c,films, 4", "d,films,7"]
    file.write_bytes(gzip.compress("\n".join([*lines, "d,films,7"]).encode()))
    check(read_item_domains(str(file), ITEMS, LARGEST))


@pytest.mark.parametrize("dtype", [pl.Int32, pl.Int64, pl.String])
def test_parquet(tmp_path: Path, dtype: type[pl.DataType]) -> None:
    file = tmp_path / "d.parquet"
    table = pl.DataFrame(ROWS, schema=["item_id", "domain"], orient="row")
    table.with_columns(pl.col("item_id").cast(dtype)).write_parquet(file)
    check(read_item_domains(file, ITEMS, LARGEST))


def test_ids_of_no_item_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "d.csv"
    file.write_text(text([*ROWS, ("8", "films"), ("3", "books")]))
    check(read_item_domains(file, ITEMS, LARGEST))
    assert f"{file}: 2 ids are ignored, first 3: the data set has no such items" in caplog.text


def test_one_domain_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "d.csv"
    file.write_text(text([("1", "books"), ("2", "books"), ("3", "films")]))
    assert read_item_domains(file, [1, 2], 3).item_domains.tolist() == [-1, 0, 0, -1]
    assert f"{file}: one domain only: the cross-domain parts have no effect" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (text(ROWS, item="id"), ": no column item or item_id or movie_id; found ['id', 'domain']"),
        ("item,category\n1,books\n", ": no column domain; found ['item', 'category']; rename one"),
        (text([*ROWS, ("x7", "films")]), ":6: item id 'x7' is not a whole number; ids are upstr"),
        (text([("1.0", "books"), *ROWS]), ":2: item id '1.0' is not a whole number"),
        (text([*ROWS, ("9", "films")]), ":6: item id 9 is outside 1..8; ids are upstream's (for"),
        (text([("0", "films"), *ROWS]), ":2: item id 0 is outside 1..8"),
        (
            text([*ROWS, ("4", "books")]),
            ":6: item 4 is in domain 'books' but in domain 'films' at {file}:4; give it one domain",
        ),
        (text(ROWS[:2]), ": catalogue misses 2 of 4 items, first 2; add them, every item needs a"),
        (text([*ROWS[:3], ("2", "")]), ":5: empty domain; fill it in or remove the line"),
        (text([("", "books"), *ROWS]), ":2: empty item; fill it in or remove the line"),
        (text([]), ": no lines after the header; list every item's domain"),
        ("", ": cannot be read as a table: "),
        (text([*ROWS[:3], ("2", "stay")]), ": domain 'stay' is also the name of a group of"),
    ],
)
def test_messages(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "d.csv"
    file.write_text(content)
    expected = f"{file}{message.replace('{file}', str(file))}"
    with pytest.raises(InputError, match=re.escape(expected)):
        read_item_domains(file, ITEMS, LARGEST)


def test_rows_of_parquet_are_named(tmp_path: Path) -> None:
    file = tmp_path / "d.parquet"
    pl.DataFrame({"item": [1, 99], "domain": ["a", "b"]}).write_parquet(file)
    with pytest.raises(InputError, match=r"d.parquet: row 1: item id 99 is outside"):
        read_item_domains(file, ITEMS, LARGEST)


def test_no_file_and_no_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.csv: no such file; it must list every item's dom"):
        read_item_domains(tmp_path / "none.csv", ITEMS, LARGEST)
    with pytest.raises(InputError, match=r": no such file"):
        read_item_domains(tmp_path, ITEMS, LARGEST)
    (tmp_path / "d.parquet").write_text(text(ROWS))
    with pytest.raises(InputError, match=r"d.parquet: cannot be read as a table"):
        read_item_domains(tmp_path / "d.parquet", ITEMS, LARGEST)
    (tmp_path / "d.csv").write_bytes(b"item,domain\n1,\xff\xfe\n")
    with pytest.raises(InputError, match=r"d.csv: cannot be read as a table"):
        read_item_domains(tmp_path / "d.csv", ITEMS, LARGEST)


MOVIES = """movie_id,title,genres,year,cleaned_title
1,Toy Story (1995),Animation|Children's|Comedy,1995,Toy Story
2,"Story, A (1996)",Drama,1996,"Story, A"
7,Heat (1995),Action|Crime,1995,Heat
"""


def test_first_genres(tmp_path: Path) -> None:
    (tmp_path / "movies.csv").write_text(MOVIES)
    first_genre_domains(tmp_path / "movies.csv", tmp_path / "domains.csv")
    assert (tmp_path / "domains.csv").read_text() == "item,domain\n1,Animation\n2,Drama\n7,Action\n"
    catalog = read_item_domains(tmp_path / "domains.csv", [1, 2, 7], 8)
    assert catalog.domain_names == ("Action", "Animation", "Drama")
    assert torch.equal(catalog.domain_items, torch.tensor([7, 1, 2]))
    assert {file.name for file in tmp_path.iterdir()} == {"movies.csv", "domains.csv"}


def test_genres_of_another_file(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(text(ROWS))
    with pytest.raises(InputError, match=r"d.csv: no column movie_id; found \['item', 'domain'\]"):
        first_genre_domains(tmp_path / "d.csv", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
