"""The item -> domain table: look-ups, the file it is kept in, and what it refuses."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hstu_xd.catalog import CATALOG_FILE, DomainCatalog
from hstu_xd.errors import InputError

NAMES = ["books", "films", "games"]


@st.composite
def catalogs(draw: st.DrawFn) -> DomainCatalog:
    num_domains = draw(st.integers(1, 6))
    domains = draw(st.lists(st.integers(0, num_domains - 1), min_size=1, max_size=30))
    return DomainCatalog(torch.tensor([0, *domains]), [f"d{i}" for i in range(num_domains)])


def domains_of(catalog: DomainCatalog) -> list[int]:
    return catalog.item_domains.tolist()


@given(catalogs())
def test_items_of_each_domain(catalog: DomainCatalog) -> None:
    table = domains_of(catalog)
    assert table[0] == -1
    for domain in range(catalog.num_domains):
        expected = [item for item, d in enumerate(table) if d == domain]
        assert catalog.items_of(domain).tolist() == expected
    assert sorted(catalog.domain_items.tolist()) == list(range(1, catalog.num_items + 1))


def test_ids_need_not_be_contiguous() -> None:
    catalog = DomainCatalog(torch.tensor([7, 2, 0, 2, 0]), NAMES)
    assert catalog.items_of(0).tolist() == [2, 4]
    assert catalog.items_of(1).tolist() == []
    assert catalog.items_of(2).tolist() == [1, 3]
    assert catalog.domain_of(torch.tensor([[4, 0], [1, 1]])).tolist() == [[0, -1], [2, 2]]
    assert (catalog.num_items, catalog.num_domains) == (4, 3)
    assert "num_items=4, num_domains=3" in str(catalog)


def test_ids_that_no_item_bears() -> None:
    catalog = DomainCatalog(torch.tensor([0, 2, -1, 0, -1, 2, -1]), NAMES)
    assert [catalog.items_of(d).tolist() for d in range(3)] == [[3], [], [1, 5]]
    assert catalog.domain_items.tolist() == [3, 1, 5]
    assert catalog.domain_offsets.tolist() == [0, 1, 1, 3]
    assert (catalog.num_items, catalog.num_domains) == (6, 3)
    assert catalog.domain_of(torch.tensor([5, 0, 3])).tolist() == [2, -1, 0]
    with pytest.raises(InputError, match="item_ids holds 4, an id the catalogue gives no domain"):
        catalog.domain_of(torch.tensor([[1, 0], [4, 2]]))
    assert catalog.to("meta").domain_of(torch.ones(2, 3, device="meta").long()).shape == (2, 3)


def test_round_trip_with_ids_that_no_item_bears(tmp_path: Path) -> None:
    catalog = DomainCatalog(torch.tensor([0, 2, -1, 0, -1]), NAMES, ["x", "", "z", ""])
    catalog.save(tmp_path / CATALOG_FILE)
    table = pq.read_table(tmp_path / CATALOG_FILE).to_pydict()
    assert table["item"] == ["x", None, "z", None]
    assert table["domain"] == ["games", None, "books", None]
    loaded = DomainCatalog.load(tmp_path)
    assert domains_of(loaded) == domains_of(catalog)
    assert loaded.item_tokens == catalog.item_tokens
    assert loaded.domain_names == catalog.domain_names
    assert torch.equal(loaded.domain_items, catalog.domain_items)


def test_the_given_table_is_not_changed() -> None:
    table = torch.tensor([0, 1, 0])
    DomainCatalog(table, NAMES)
    assert table.tolist() == [0, 1, 0]


def test_it_is_no_part_of_a_checkpoint() -> None:
    assert DomainCatalog(torch.tensor([0, 1, 0]), NAMES).state_dict() == {}


def test_names() -> None:
    catalog = DomainCatalog(torch.tensor([0, 1, 0]), NAMES)
    assert [catalog.domain_index(name) for name in NAMES] == [0, 1, 2]
    with pytest.raises(InputError, match=re.escape("unknown domain 'film'; known: books, films")):
        catalog.domain_index("film")
    with pytest.raises(InputError, match=re.escape("did you mean 'films'?")):
        catalog.domain_index("film")
    with pytest.raises(InputError, match=r"games$"):
        catalog.domain_index("zzz")


@pytest.mark.parametrize(
    ("table", "names", "tokens", "message"),
    [
        ([0], NAMES, None, "item_domains has shape (1,); a vector of num_items + 1 domain ids"),
        ([[0, 1], [0, 1]], NAMES, None, "item_domains has shape (2, 2); a vector"),
        ([0, 3], NAMES, None, "item_domains holds ids 3..3, but 3 domain names allow 0..2"),
        ([0, -2, 1], NAMES, None, "item_domains holds ids -2..1, but 3 domain names allow 0..2"),
        ([0, -1, -1], NAMES, None, "item_domains gives no item a domain; at least one is needed"),
        ([0, 1], ["a", "a"], None, "domain_names repeats a name: ['a', 'a']"),
        ([0, 1, 1], NAMES, ["x"], "item_tokens has 1 entries for 2 items"),
    ],
)
def test_messages(table: Any, names: list[str], tokens: list[str] | None, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        DomainCatalog(torch.tensor(table), names, tokens)


@pytest.mark.parametrize("names", [NAMES, ["z", "a", "m"], ["Ä b", "c,d", "e|f"]])
def test_round_trip(tmp_path: Path, names: list[str]) -> None:
    """Non-contiguous ids, a domain without items, and names in no particular order."""
    catalog = DomainCatalog(torch.tensor([0, 2, 0, 2, 0]), names, ["w", "x y", "é", '"q"'])
    catalog.save(tmp_path / CATALOG_FILE)
    for path in (tmp_path, tmp_path / CATALOG_FILE):
        loaded = DomainCatalog.load(path)
        assert domains_of(loaded) == domains_of(catalog)
        assert loaded.domain_names == catalog.domain_names
        assert loaded.item_tokens == catalog.item_tokens
        assert torch.equal(loaded.domain_items, catalog.domain_items)
        assert torch.equal(loaded.domain_offsets, catalog.domain_offsets)


@given(catalogs())
def test_round_trip_of_any_catalogue(catalog: DomainCatalog) -> None:
    sink = pa.BufferOutputStream()
    catalog.save(sink)
    table = pq.read_table(pa.BufferReader(sink.getvalue()))
    assert table.column_names == ["item", "domain"]
    names = table.column("domain").cast("string").to_pylist()
    assert names == [catalog.domain_names[d] for d in domains_of(catalog)[1:]]


def test_tokens_default_to_the_ids(tmp_path: Path) -> None:
    DomainCatalog(torch.tensor([0, 1, 0]), NAMES).save(tmp_path / "c.parquet")
    assert DomainCatalog.load(tmp_path / "c.parquet").item_tokens == ["1", "2"]


def test_a_file_of_another_writer(tmp_path: Path) -> None:
    """Plain strings without this package's metadata: names are those present, sorted."""
    table = pa.table({"item": ["x", "y", "z"], "domain": ["films", "books", "films"]})
    pq.write_table(table, tmp_path / CATALOG_FILE)
    catalog = DomainCatalog.load(tmp_path)
    assert catalog.domain_names == ("books", "films")
    assert domains_of(catalog) == [-1, 1, 0, 1]


def test_no_file(tmp_path: Path) -> None:
    message = f"{tmp_path / CATALOG_FILE}: no catalogue here; write one with hstu-xd prepare"
    with pytest.raises(InputError, match=re.escape(message)):
        DomainCatalog.load(tmp_path)


def test_wrong_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"item": ["x"], "category": ["a"]}), tmp_path / CATALOG_FILE)
    message = "a catalogue has columns item and domain, found ['item', 'category']"
    with pytest.raises(InputError, match=re.escape(message)):
        DomainCatalog.load(tmp_path)


def test_missing_domain_names(tmp_path: Path) -> None:
    table = pa.table({"item": [None, "x", "y"], "domain": [None, "a", None]})
    pq.write_table(table, tmp_path / CATALOG_FILE)
    with pytest.raises(InputError, match="row 2 has no domain; give every item one"):
        DomainCatalog.load(tmp_path)


def test_not_a_parquet_file(tmp_path: Path) -> None:
    (tmp_path / CATALOG_FILE).write_text("item,domain\nx,a\n")
    with pytest.raises(InputError):
        DomainCatalog.load(tmp_path)


def test_no_items(tmp_path: Path) -> None:
    empty = pa.table({"item": pa.array([], pa.string()), "domain": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / CATALOG_FILE)
    with pytest.raises(InputError):
        DomainCatalog.load(tmp_path)
