"""What REC's rebound names share within one process: the settings, and the domains of a log."""

import logging
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hstu_xd.catalog import CATALOG_FILE, DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.plugins.bridge import Session
from hstu_xd.plugins.item_tables import read_item_table, warn_of_one_domain
from hstu_xd.plugins.rec.settings import RecSettings

_logger = logging.getLogger(__name__)


class ItemDomains:
    """The domain of every item token of a file.

    Args:
        path: a CSV, TSV (``.tsv``) or Parquet (``.parquet``) with a column ``item`` (or
            ``item_id``) and a column ``domain``; or a prepared store, whose catalogue is such a
            file. Domain ids follow the sorted names.

    Raises:
        InputError: no such file, a missing column, an empty field, an item in two domains.
    """

    def __init__(self, path: Path | str) -> None:
        file = Path(path)
        self.path = file / CATALOG_FILE if file.is_dir() else file
        table = read_item_table(self.path)
        self.domain_names, numbers = table.number_domains()
        table.refuse_second_domains(table.items)
        self._domains: dict[str, int] = dict(zip(table.items.to_list(), numbers.tolist()))

    def catalog(self, tokens: Sequence[Any], occurring: Container[int] | None) -> DomainCatalog:
        """Build the table for a data set's item numbers.

        Args:
            tokens: REC's ``id2token["item_id"]``: the token of every item number, padding at 0.
            occurring: numbers that the log holds; others may lack a domain (PerSRec lists one item
                more than there are for Parquet logs). None: all must have one.

        Raises:
            InputError: an item without a domain; the message says how many and names the first.
        """
        names = [str(tokens[number]) for number in range(1, len(tokens))]
        domains = np.array([-1, *(self._domains.get(name, -1) for name in names)], np.int64)
        missing = np.flatnonzero(domains[1:] < 0) + 1
        if missing.size:
            asked = missing if occurring is None else [n for n in missing if int(n) in occurring]
            if len(asked):
                own = next(iter(self._domains))
                raise InputError(
                    f"{self.path}: {len(asked)} of the log's {len(names)} items are missing, first "
                    f"{names[asked[0] - 1]!r} (of this file the first is {own!r}); add a line for "
                    "each, every item needs a domain"
                )
            _logger.warning("%d items without events have no domain", missing.size)
        warn_of_one_domain(self.path, domains[1:])
        return DomainCatalog(torch.from_numpy(domains), self.domain_names, names)


@dataclass
class RecSession(Session):
    """The run in progress.

    Attributes:
        settings: the keys of this package; None before REC's configuration was read.
    """

    settings: RecSettings | None = None
    _item_domains: ItemDomains | None = None

    def configure(self, settings: RecSettings) -> None:
        """Take the settings of a run and read its item -> domain file.

        Domains are unknown from here until :meth:`open_log`: those of an earlier run do not linger.

        Raises:
            InputError: the file is missing or faulty.
        """
        path = settings.item_domain_path
        known = self.settings is not None and self.settings.item_domain_path == path
        if not known or self._item_domains is None:
            self._item_domains = ItemDomains(path) if path else None
        self.settings = settings
        self.open(None)

    def open_log(self, tokens: Sequence[Any], occurring: Container[int] | None) -> None:
        """Take the log whose item numbers stand for ``tokens``; see :meth:`ItemDomains.catalog`.

        Raises:
            InputError: an item without a domain.
        """
        domains = self._item_domains
        self.open(None if domains is None else domains.catalog(tokens, occurring))

    @property
    def extends_model(self) -> bool:
        """Whether the model is this package's and computes something that REC's own does not."""
        settings = self.settings
        return settings is not None and settings.is_ours and not settings.is_plain


SESSION = RecSession()
