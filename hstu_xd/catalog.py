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

    Item ids are ``1..num_items``; id 0 is padding and has domain -1, as have unused ids
    (MovieLens numbers 3,883 films up to 3,952). The ids of a domain need not be contiguous:
    ``domain_items[domain_offsets[d]:domain_offsets[d + 1]]`` are the items of ``d``, so that
    ``domain_items`` lists the items there are.

    Args:
        item_domains: (num_items + 1,) int64, the domain id of every item, -1 where the id is
            unused; entry 0 is ignored.
        domain_names: one name per domain id; a name may have no items.
        item_tokens: the raw ids of items ``1..num_items`` as they stand in the log, if known;
            anything where the id is unused.

    Raises:
        InputError: a domain id outside ``-1..num_domains - 1``, no item at all, repeated domain
            names, or a number of tokens that is not the number of ids.

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
        if low < -1 or high >= num_domains:
            raise InputError(
                f"item_domains holds ids {low}..{high}, but {num_domains} domain names allow "
                f"0..{num_domains - 1}, and -1 for an unused id; name every domain"
            )
        if high < 0:
            raise InputError("item_domains gives no item a domain; at least one is needed")
        if len(set(domain_names)) != num_domains:
            raise InputError(f"domain_names repeats a name: {list(domain_names)}")
        if item_tokens is not None and len(item_tokens) != domains.numel() - 1:
            raise InputError(
                f"item_tokens has {len(item_tokens)} entries for {domains.numel() - 1} items"
            )
        self.domain_names = tuple(domain_names)
        self.item_tokens = item_tokens
        # Shifted by one, the unused ids come first, where they are cut off.
        num_unused, *counts = torch.bincount(domains[1:] + 1, minlength=num_domains + 1).tolist()
        self._has_holes = num_unused > 0
        items = torch.argsort(domains[1:], stable=True)[num_unused:] + 1
        offsets = torch.tensor([0, *counts], device=domains.device).cumsum(0)
        # The same numbers on the host, so that reading them waits for no device.
        self._bounds: list[int] = offsets.tolist()
        self.register_buffer("item_domains", domains, persistent=False)
        self.register_buffer("domain_items", items, persistent=False)
        self.register_buffer("domain_offsets", offsets, persistent=False)

    @property
    def num_items(self) -> int:
        """Largest item id: the number of items and unused ids, without the padding."""
        return self.item_domains.numel() - 1

    @property
    def num_domains(self) -> int:
        """Number of domains."""
        return len(self.domain_names)

    def domain_of(self, item_ids: Tensor) -> Tensor:
        """Domain of each item: int64 of the shape of ``item_ids``, -1 where the id is 0.

        Raises:
            InputError: an unused id (checked on CPU only, where it costs no
                synchronisation, and not in compiled code; elsewhere its domain is -1).
        """
        domains = self.item_domains[item_ids]
        if self._has_holes and item_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            unknown = item_ids[(domains < 0) & (item_ids != 0)]
            if unknown.numel():
                raise InputError(
                    f"item_ids holds {int(unknown[0])}, an id the catalogue gives no domain; add "
                    "the item to the catalogue, or remove its events"
                )
        return domains

    def items_of(self, domain: int) -> Tensor:
        """Ids of a domain's items in ascending order: (n_d,) int64."""
        return self.domain_items[self._bounds[domain] : self._bounds[domain + 1]]

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

    def ids_in(self, other: "DomainCatalog") -> Tensor:
        """Find these items in another catalogue, by their ids in the log.

        Args:
            other: a catalogue of an earlier or a later log.

        Returns:
            (num_items + 1,) int64: the id in ``other`` of each id here; 0 where it has none.

        Raises:
            InputError: an item that is in another domain there.
        """
        ours, theirs = self.item_domains.cpu(), other.item_domains.cpu()
        known = {other.token(item): item for item in theirs.ge(0).nonzero().squeeze(1).tolist()}
        ids = torch.zeros_like(ours)
        present = ours.ge(0).nonzero().squeeze(1)
        ids[present] = torch.tensor([known.get(self.token(item), 0) for item in present.tolist()])
        # By name, and -1 for a name that the other catalogue lacks: its items are not there.
        numbers = {name: number for number, name in enumerate(other.domain_names)}
        renamed = torch.tensor([*(numbers.get(name, -1) for name in self.domain_names), -1])
        moved = (ids > 0) & (renamed[ours] != theirs[ids])
        if bool(moved.any()):
            item = int(moved.nonzero()[0])
            here = self.domain_names[int(self.item_domains[item])]
            there = other.domain_names[int(other.item_domains[ids[item]])]
            raise InputError(
                f"item {self.token(item)!r} is of domain {here!r} in one catalogue and of "
                f"{there!r} in the other; prepare both logs with the same domains"
            )
        return ids

    def save(self, path: Path) -> None:
        """Write the catalogue as Parquet: row ``r`` is item ``r + 1`` with its token and domain.

        Both are null where the id is unused.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        domains = self.item_domains[1:].numpy(force=True)
        holes = domains < 0
        tokens = [self.token(item_id) for item_id in range(1, self.num_items + 1)]
        names = pa.array(self.domain_names, pa.string())
        indices = pa.array(domains, pa.int32(), mask=holes)
        table = pa.table(
            {
                "item": pa.array(tokens, pa.string(), mask=holes),
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
            InputError: no such file, columns ``item`` and ``domain`` are missing, or an item
                without a domain.
        """
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = path / CATALOG_FILE if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"{file}: no catalogue here; write one with hstu-xd prepare")
        try:
            # Unlike read_table it takes no names of folders for columns, and does without the half
            # of pyarrow that reads whole folders. A relative path could be taken for a URI.
            with pq.ParquetFile(file.absolute()) as opened:
                table = opened.read()
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{file}: not a Parquet file; write it with hstu-xd prepare"
            ) from error
        if not {"item", "domain"} <= set(table.column_names):
            raise InputError(
                f"{file}: a catalogue has columns item and domain, found {table.column_names}"
            )
        items = table.column("item").to_pylist()
        if table.column("domain").null_count:
            no_domain = table.column("domain").is_null().to_pylist()
            for row, (item, missing) in enumerate(zip(items, no_domain)):
                if missing and item is not None:
                    raise InputError(f"{file}: row {row} has no domain; give every item one")
        stored = (table.schema.metadata or {}).get(b"domain_names")
        column = table.column("domain").cast("string").combine_chunks()
        encoded = column.dictionary_encode()
        present = encoded.dictionary.to_pylist()
        names = stored.decode().split("\x1f") if stored else sorted(present)
        order = {name: i for i, name in enumerate(names)}
        lookup = np.array([*(order[name] for name in present), -1], np.int64)
        domains = lookup[encoded.indices.fill_null(len(present)).to_numpy()]
        item_domains = torch.from_numpy(np.concatenate([[-1], domains]))
        return cls(item_domains, names, ["" if item is None else item for item in items])

    def extra_repr(self) -> str:
        """Sizes, as shown by ``print(catalog)``."""
        return f"num_items={self.num_items}, num_domains={self.num_domains}"
