"""The best items of a domain for a user vector, exactly."""

import torch
from torch import Tensor

from hstu_xd.model import CrossDomainHSTU


class ItemIndex:
    """Unit vectors of all items, those of a domain side by side.

    Args:
        model: the trained model; later changes of its item vectors are not seen.
    """

    def __init__(self, model: CrossDomainHSTU) -> None:
        catalog = model.catalog
        self._items = catalog.domain_items
        self._vectors = model.item_vectors(self._items)
        self._offsets: list[int] = catalog.domain_offsets.tolist()
        # Where an item stands in the arrays above; ids that no item bears stand nowhere.
        self._places = torch.full((catalog.num_items + 1,), -1)
        self._places[self._items] = torch.arange(len(self._items))

    def best(
        self, vector: Tensor, domain: int, k: int, excluded: Tensor | None
    ) -> list[tuple[int, float]]:
        """Items of a domain with the largest dot products.

        Args:
            vector: (K,) float.
            domain: domain id.
            k: number of items; fewer come back where the domain has no more.
            excluded: (n,) int64, items to leave out, of whatever domain.

        Returns:
            ``(item id, score)`` pairs, best first.
        """
        start, end = self._offsets[domain], self._offsets[domain + 1]
        scores = self._vectors[start:end] @ vector
        if excluded is not None:
            places = self._places.index_select(0, excluded)
            places = places[(places >= start) & (places < end)]
            scores.index_fill_(0, places - start, float("-inf"))
        best = scores.topk(min(k, end - start))
        pairs = zip(self._items[best.indices + start].tolist(), best.values.tolist())
        return [(item, score) for item, score in pairs if score > float("-inf")]
