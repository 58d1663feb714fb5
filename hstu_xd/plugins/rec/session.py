"""What the rebound names share within one process: the settings and the data set in use."""

from dataclasses import dataclass, field
from typing import Any

import torch

from hstu_xd.catalog import DomainCatalog
from hstu_xd.plugins.rec.item_domains import ItemDomains
from hstu_xd.plugins.rec.settings import RecSettings


@dataclass
class Session:
    """The run in progress.

    Attributes:
        settings: the keys of this package; None before REC's configuration was read.
        catalog: item -> domain table of the data set; None while no domains are known, and then
            every rebound name behaves as REC's own.
    """

    settings: RecSettings | None = None
    catalog: DomainCatalog | None = None
    _item_domains: ItemDomains | None = None
    _copies: dict[torch.device, DomainCatalog] = field(default_factory=dict)

    def configure(self, settings: RecSettings) -> None:
        """Take the settings of a run and read its item -> domain file.

        Domains are unknown from here until :meth:`open`: those of an earlier run do not linger.

        Raises:
            InputError: the file is missing or faulty.
        """
        path = settings.item_domain_path
        known = self.settings is not None and self.settings.item_domain_path == path
        if not known or self._item_domains is None:
            self._item_domains = ItemDomains(path) if path else None
        self.settings = settings
        self._forget_catalog()

    def open(self, tokens: Any, occurring: Any) -> None:
        """Take the data set whose item numbers stand for ``tokens``.

        Raises:
            InputError: an item without a domain.
        """
        self._forget_catalog()
        if self._item_domains is not None:
            self.catalog = self._item_domains.catalog(tokens, occurring)

    def _forget_catalog(self) -> None:
        self._copies.clear()
        self.catalog = None

    @property
    def extends_model(self) -> bool:
        """The model is this package's and computes something that REC's own does not."""
        settings = self.settings
        return settings is not None and settings.is_ours and not settings.is_plain

    def catalog_on(self, device: torch.device) -> DomainCatalog:
        """The catalogue with its tables on a device; copied there once."""
        assert self.catalog is not None, "no data set with domains is open"
        if device not in self._copies:
            copy = DomainCatalog(self.catalog.item_domains, self.catalog.domain_names)
            self._copies[device] = copy.to(device)
        return self._copies[device]


SESSION = Session()
