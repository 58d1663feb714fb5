"""Items by the names that clients call them."""

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError


class Items:
    """Item ids by the catalogue's raw tokens.

    Args:
        catalog: of the model.
    """

    def __init__(self, catalog: DomainCatalog) -> None:
        self._catalog = catalog
        used = sorted(catalog.domain_items.tolist())
        self._ids = {catalog.token(item_id): item_id for item_id in used}
        self._domains: list[int] = catalog.item_domains.tolist()

    def __len__(self) -> int:
        return len(self._ids)

    def find(self, token: str) -> int | None:
        """Return the item's id; None where the catalogue has no such item."""
        return self._ids.get(token)

    def id_of(self, token: str) -> int:
        """Return the item's id.

        Raises:
            InputError: an unknown item.
        """
        found = self._ids.get(token)
        if found is None:
            raise InputError(
                f"unknown item {token!r}; take one of the {len(self._ids)} items of the catalogue "
                "the model was trained on"
            )
        return found

    def domain_of(self, item_id: int) -> int:
        """Return the item's domain id."""
        return self._domains[item_id]

    def domain_name(self, token: str) -> str:
        """Return the name of a known item's domain."""
        return self._catalog.domain_names[self._domains[self._ids[token]]]

    def domains_by_token(self) -> dict[str, str]:
        """Return the name of every item's domain."""
        return {token: self.domain_name(token) for token in self._ids}

    def id_in(self, token: str, domain: int) -> int:
        """Return the item's id.

        Raises:
            InputError: an unknown item, or one of another domain.
        """
        found, names = self.id_of(token), self._catalog.domain_names
        if self.domain_of(found) != domain:
            raise InputError(
                f"item {token!r} is of domain {names[self.domain_of(found)]!r}, not "
                f"{names[domain]!r}; score items of one domain at a time"
            )
        return found
