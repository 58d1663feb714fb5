"""What the rebound names share within one process: the catalogue of the data set in use."""

from dataclasses import dataclass, field

import torch

from hstu_xd.catalog import DomainCatalog


@dataclass
class Session:
    """The data set that upstream's trainer opened last.

    Attributes:
        catalog: its item -> domain table; None while no domains are known, and then every rebound
            name behaves as upstream's own.
    """

    catalog: DomainCatalog | None = None
    _copies: dict[torch.device, DomainCatalog] = field(default_factory=dict)
    _whole: dict[torch.device, DomainCatalog] = field(default_factory=dict)

    def open(self, catalog: DomainCatalog | None) -> None:
        """Take the catalogue of a data set, or none."""
        self.catalog = catalog
        self._copies.clear()
        self._whole.clear()

    def new_catalog(self) -> DomainCatalog:
        """A catalogue for a module to hold: it moves between devices with the module."""
        assert self.catalog is not None, "no data set with domains is open"
        return DomainCatalog(self.catalog.item_domains, self.catalog.domain_names)

    def catalog_on(self, device: torch.device) -> DomainCatalog:
        """The catalogue with its tables on a device; copied there once."""
        if device not in self._copies:
            self._copies[device] = self.new_catalog().to(device)
        return self._copies[device]

    def whole_catalog_on(self, device: torch.device) -> DomainCatalog:
        """All items as one domain, on a device; built once."""
        if device not in self._whole:
            assert self.catalog is not None, "no data set with domains is open"
            one_domain = self.catalog.item_domains.clamp(max=0)
            self._whole[device] = DomainCatalog(one_domain, ["all"]).to(device)
        return self._whole[device]


SESSION = Session()
