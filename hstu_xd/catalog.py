"""Which item belongs to which domain: the table every cross-domain part of the model reads."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor, nn

from hstu_xd.errors import InputError

CATALOG_FILE = "catalog.parquet"


class DomainCatalog(nn.Module):
    """The item -> domain table with domain names and the items of each domain.

    Item ids are ``1..num_items``; id 0 is padding and has domain -1. The ids of a domain need not
    be contiguous: ``domain_items[domain_offsets[d]:domain_offsets[d + 1]]`` are the items of ``d``.

    Args:
        item_domains: (num_items + 1,) int64, the domain id of every item; entry 0 is ignored.
        domain_names: one name per domain id; a name may have no items.
        item_tokens: the raw ids of items ``1..num_items`` as they stand in the log, if known.

    Raises:
        InputError: a domain id outside ``0..num_domains - 1``, repeated domain names, or a number
            of tokens that is not the number of items.

    Example:
        >>> catalog = DomainCatalog(torch.tensor([0, 0, 0, 1]), ["books", "films"])
        >>> catalog.domain_of(torch.tensor([3, 1, 0])).tolist()
        [1, 0, -1]
    """

    item_domains: Tensor
    domain_items: Tensor
    domain_offsets: Tensor

    def __init__(
        self,
        item_domains: Tensor,
        domain_names: Sequence[str],
        item_tokens: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        domains = item_domains.to(torch.int64).clone()
        if domains.ndim != 1 or domains.numel() < 2:
            raise InputError(
                f"item_domains has shape {tuple(item_domains.shape)}; a vector of num_items + 1 "
                "domain ids is needed, entry 0 being the padding item"
            )
        domains[0] = -1
        num_domains = len(domain_names)
        low, high = int(domains[1:].min()), int(domains[1:].max())
        if low < 0 or high >= num_domains:
            raise InputError(
                f"item_domains holds ids {low}..{high}, but {num_domains} domain names allow "
                f"0..{num_domains - 1}; name every domain"
            )
        if len(set(domain_names)) != num_domains:
            raise InputError(f"domain_names repeats a name: {list(domain_names)}")
        if item_tokens is not None and len(item_tokens) != domains.numel() - 1:
            raise InputError(
                f"item_tokens has {len(item_tokens)} entries for {domains.numel() - 1} items"
            )
        self.domain_names = tuple(domain_names)
        self.item_tokens = item_tokens
        counts = torch.bincount(domains[1:], minlength=num_domains)
        self.register_buffer("item_domains", domains, persistent=False)
        self.register_buffer(
            "domain_items", torch.argsort(domains[1:], stable=True) + 1, persistent=False
        )
        self.register_buffer(
            "domain_offsets", nn.functional.pad(counts.cumsum(0), (1, 0)), persistent=False
        )

    @property
    def num_items(self) -> int:
        """Number of items, the padding item not counted."""
        return self.item_domains.numel() - 1

    @property
    def num_domains(self) -> int:
        """Number of domains."""
        return len(self.domain_names)

    def domain_of(self, item_ids: Tensor) -> Tensor:
        """Domain of each item: int64 of the shape of ``item_ids``, -1 where the id is 0."""
        return self.item_domains[item_ids]

    def items_of(self, domain: int) -> Tensor:
        """Ids of a domain's items in ascending order: (n_d,) int64."""
        start, end = self.domain_offsets[domain], self.domain_offsets[domain + 1]
        return self.domain_items[start:end]

    def token(self, item_id: int) -> str:
        """Raw id of an item as in the log; the number itself where the catalogue has no tokens."""
        return str(item_id) if self.item_tokens is None else self.item_tokens[item_id - 1]

    def domain_index(self, name: str) -> int:
        """Domain id of a name.

        Raises:
            InputError: unknown name; the message lists the nearest.
        """
        if name in self.domain_names:
            return self.domain_names.index(name)
        near = get_close_matches(name, self.domain_names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"unknown domain {name!r}; known: {', '.join(self.domain_names)}{hint}")

    def save(self, path: Path) -> None:
        """Write the catalogue as Parquet: row ``r`` is item ``r + 1`` with its token and domain."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        tokens = [self.token(item_id) for item_id in range(1, self.num_items + 1)]
        names = pa.array(self.domain_names, pa.string())
        indices = pa.array(self.item_domains[1:].numpy(force=True), pa.int32())
        table = pa.table(
            {
                "item": pa.array(tokens, pa.string()),
                "domain": pa.DictionaryArray.from_arrays(indices, names),
            },
            metadata={"domain_names": "\x1f".join(self.domain_names)},
        )
        pq.write_table(table, path)

    @classmethod
    def load(cls, path: Path) -> "DomainCatalog":
        """Read a catalogue written by :meth:`save` or by ``hstu-xd prepare``.

        Args:
            path: the Parquet file, or a folder that holds ``catalog.parquet``.

        Raises:
            InputError: no such file, or columns ``item`` and ``domain`` are missing.
        """
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = path / CATALOG_FILE if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"{file}: no catalogue here; write one with hstu-xd prepare")
        try:
            table = pq.read_table(file)
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{file}: not a Parquet file; write it with hstu-xd prepare"
            ) from error
        if not {"item", "domain"} <= set(table.column_names):
            raise InputError(
                f"{file}: a catalogue has columns item and domain, found {table.column_names}"
            )
        if table.column("domain").null_count:
            row = table.column("domain").is_null().to_pylist().index(True)
            raise InputError(f"{file}: row {row} has no domain; give every item one")
        stored = (table.schema.metadata or {}).get(b"domain_names")
        column = table.column("domain").cast("string").combine_chunks()
        present = sorted(set(column.unique().to_pylist()))
        names = stored.decode().split("\x1f") if stored else present
        encoded = column.dictionary_encode()
        order = {name: i for i, name in enumerate(names)}
        lookup = np.array([order[name] for name in encoded.dictionary.to_pylist()], np.int64)
        domains = lookup[encoded.indices.to_numpy()]
        item_domains = torch.from_numpy(np.concatenate([[-1], domains]))
        return cls(item_domains, names, table.column("item").to_pylist())

    def extra_repr(self) -> str:
        """Sizes, as shown by ``print(catalog)``."""
        return f"num_items={self.num_items}, num_domains={self.num_domains}"
