from pathlib import Path

import polars as pl
import pytest

from hstu_xd.errors import InputError
from hstu_xd.plugins.rec.rec_session import ItemDomains

TABLE = {"item": ["x7", "10", "z"], "domain": ["films", "books", "films"]}


@pytest.mark.parametrize("name", ["items.csv", "items.tsv", "items.parquet"])
def test_formats(tmp_path: Path, name: str) -> None:
    table, file = pl.DataFrame(TABLE), tmp_path / name
    if name.endswith("parquet"):
        table.write_parquet(file)
    else:
        table.write_csv(file, separator="\t" if name.endswith("tsv") else ",")
    catalog = ItemDomains(file).catalog(["[PAD]", "z", "x7", "10"], None)
    assert catalog.domain_names == ("books", "films")
    assert catalog.item_domains.tolist() == [-1, 1, 1, 0]


def test_prepared_store(work: Path) -> None:
    from hstu_xd.catalog import DomainCatalog

    whole = DomainCatalog.load(work / "store")
    catalog = ItemDomains(work / "store").catalog(["[PAD]", *whole.item_tokens], None)
    for item in (1, whole.num_items):
        expected = whole.domain_names[int(whole.item_domains[item])]
        assert catalog.domain_names[int(catalog.item_domains[item])] == expected


def table(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "items.csv"
    file.write_text(text, encoding="utf-8")
    return file


def test_missing_items_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    domains = ItemDomains(table(tmp_path, "item,domain\na,x\nb,y\n"))
    with pytest.raises(InputError, match=r"2 of the log's 4 items are missing, first 'c'"):
        domains.catalog(["[PAD]", "a", "c", "b", "d"], None)


def test_items_without_events_may_lack_a_domain(tmp_path: Path) -> None:
    domains = ItemDomains(table(tmp_path, "item,domain\na,x\nb,y\n"))
    catalog = domains.catalog(["[PAD]", "a", "b", "never"], {1, 2})
    assert catalog.item_domains.tolist() == [-1, 0, 1, -1]
    assert catalog.domain_items.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("thing,domain\na,x\n", "no column item or item_id"),
        ("item,kind\na,x\n", "no column domain"),
        ("item,domain\na,x\na,y\n", "items.csv:3: item 'a' is in domain 'y'"),
        ("item,domain\na,\n", "items.csv:2: empty domain"),
        ("item,domain\n", "no lines after the header"),
        ("item,domain\na,switch\n", "also the name of a group of targets"),
    ],
)
def test_faulty_files(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ItemDomains(table(tmp_path, text))


def test_blanks_around_a_domain_do_not_make_another_one(tmp_path: Path) -> None:
    domains = ItemDomains(table(tmp_path, "item,domain\na,films \nb,films\nc, books\n"))
    assert domains.domain_names == ["books", "films"]


def test_items_of_another_spelling_are_shown(tmp_path: Path) -> None:
    file = tmp_path / "items.parquet"
    pl.DataFrame({"item": [7.0, 8.0], "domain": ["films", "books"]}).write_parquet(file)
    with pytest.raises(InputError, match=r"first '7' \(of this file the first is '7.0'\)"):
        ItemDomains(file).catalog(["[PAD]", "7", "8"], None)


def test_columns_that_are_no_tokens(tmp_path: Path) -> None:
    file = tmp_path / "items.parquet"
    pl.DataFrame({"item": [[7], [8]], "domain": ["films", "books"]}).write_parquet(file)
    with pytest.raises(InputError, match="cannot be read as a table: cannot cast List type"):
        ItemDomains(file)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; it must list every item's domain"):
        ItemDomains(tmp_path / "none.csv")


def test_unused_ids_of_a_catalogue_are_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "catalog.parquet"
    rows = {"item": ["a", None, "b", None, "a"], "domain": ["x", None, "y", None, "y"]}
    pl.DataFrame(rows).head(4).write_parquet(file)
    assert ItemDomains(tmp_path).catalog(["[PAD]", "a", "b"], None).item_domains.tolist() == [
        -1,
        0,
        1,
    ]
    pl.DataFrame(rows).write_parquet(file)
    with pytest.raises(InputError, match=r"row 4: item 'a' is in domain 'y' but .* at .*: row 0;"):
        ItemDomains(file)
