"""The best items of a domain for a user vector: exactly, or by an index of what is near.

Approximate nearest items of one domain, by FAISS: a tenth of the items is looked at.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.objectives.objective import DotProduct, Scorer

# Share of the lists that a search reads.
_READ = 0.1
# Vectors that the centre of a list is trained on: more change next to nothing.
_TRAINED_ON = 64


class InvertedLists:
    """The vectors of a domain in ``sqrt(n)`` lists around centres, of which a search reads 10 %.

    With ``n`` vectors a search costs about ``sqrt(n) + n / 10`` dot products instead of ``n``. What
    it finds has its exact score; what it misses lies in a list whose centre is further away. The
    fewer directions the vectors vary in, the less it misses.

    Args:
        vectors: (n, K) float32, of length 1; FAISS keeps a copy.

    Raises:
        InputError: FAISS is not installed.
    """

    def __init__(self, vectors: Tensor) -> None:
        faiss = load_faiss()
        num_lists = max(1, round(len(vectors) ** 0.5))
        rows = vectors.numpy(force=True)
        self._index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(rows.shape[1]),
            rows.shape[1],
            num_lists,
            faiss.METRIC_INNER_PRODUCT,
        )
        self._index.cp.max_points_per_centroid = _TRAINED_ON
        self._index.cp.spherical = True
        self._index.train(rows)
        self._index.add(rows)
        self._index.nprobe = max(1, round(_READ * num_lists))

    def nearest(self, vector: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return scores (m,) float32 and places (m,) int64 of at most ``k`` vectors, best first."""
        scores, places = self._index.search(vector.unsqueeze(0).numpy(force=True), k)
        found = int((places[0] >= 0).sum())  # the rest is filled up with -1
        return torch.from_numpy(scores[0][:found]), torch.from_numpy(places[0][:found])


@cache
def load_faiss() -> ModuleType:
    """Import the FAISS library.

    Raises:
        InputError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            "retrieval='approximate' needs FAISS, which is not installed: "
            "pip install \"hstu-xd[ann]\", or use retrieval='exact'"
        ) from error
    return faiss


RETRIEVALS = ("exact", "approximate")

# Items whose scores are computed at once: bounds what a search needs beside the vectors.
_BLOCK = 1 << 20
# Smaller domains are searched exactly, which takes some milliseconds.
_INDEXED_FROM = 100_000
# So is a domain of which more than this share is asked for: an index looks at a tenth of it.
_LARGEST_SHARE = 0.01


class Searched(Protocol):
    """A model whose items are searched, as :class:`hstu_xd.model.hstu.CrossDomainHSTU`."""

    @property
    def catalog(self) -> DomainCatalog:
        """Return the domain of every item."""
        ...

    def item_vectors(self, item_ids: Tensor) -> Tensor:
        """Return vectors of items: (...) int64 -> (..., K) float."""
        ...


class ItemIndex:
    """What ranks items, with the vectors of all of them, those of a domain side by side.

    Args:
        model: the trained model; later changes of its item vectors are not seen.
        retrieval: "exact", or "approximate" for catalogues of millions: domains from 100,000 items
            on get an index each, see :class:`InvertedLists`, which takes the memory of their
            vectors once more and misses some of the best items.
        scorer: of the objective that the model was trained for; None: dot products. Whatever else
            it computes is computed for a whole domain at every request.

    Raises:
        InputError: an unknown kind of retrieval, one whose library is not installed, or
            "approximate" for other scores than dot products.

    Attributes:
        scorer: what ranks.
    """

    @torch.inference_mode()
    def __init__(
        self, model: Searched, retrieval: str = "exact", scorer: Scorer | None = None
    ) -> None:
        if retrieval not in RETRIEVALS:
            raise InputError(f"retrieval is {retrieval!r}; one of {', '.join(RETRIEVALS)}")
        catalog = model.catalog
        self._items = catalog.domain_items
        self.scorer: Scorer = scorer or DotProduct(model.item_vectors)
        self._by_dot_product = isinstance(self.scorer, DotProduct)
        if retrieval == "approximate" and not self._by_dot_product:
            raise InputError(
                "retrieval='approximate' searches by dot products, and the run's objective scores "
                "otherwise; use retrieval='exact'"
            )
        if isinstance(self.scorer, DotProduct):
            vectors = self.scorer.item_vectors
            self._vectors = torch.cat([vectors(x) for x in self._items.split(_BLOCK)])
        self._offsets: list[int] = catalog.domain_offsets.tolist()
        # Where an item stands in the arrays above; unused ids stand nowhere.
        self._places = torch.full((catalog.num_items + 1,), -1)
        self._places[self._items] = torch.arange(len(self._items))
        self._lists: dict[int, InvertedLists] = {}
        if retrieval == "approximate":
            load_faiss()  # that it is missing shows now, not when the catalogue has grown
            for domain, (start, end) in enumerate(pairwise(self._offsets)):
                if end - start >= _INDEXED_FROM:
                    self._lists[domain] = InvertedLists(self._vectors[start:end])

    def best(
        self, vector: Tensor, domain: int, k: int, excluded: Tensor | None
    ) -> list[tuple[int, float]]:
        """Find the items of a domain with the largest scores.

        Args:
            vector: (K,) float.
            domain: domain id.
            k: number of items; fewer come back where the domain has no more.
            excluded: (n,) int64, items to leave out, of whatever domain.

        Returns:
            ``(item id, score)`` pairs, best first.
        """
        start, end = self._offsets[domain], self._offsets[domain + 1]
        left_out = self._items[:0] if excluded is None else self._places.index_select(0, excluded)
        found = self._near(vector, domain, k, left_out)
        scores, places = self._exactly(vector, start, end, k, left_out) if found is None else found
        return list(zip(self._items[places].tolist(), scores.tolist()))

    def best_of_each(
        self, vectors: Tensor, domains: Sequence[int], k: int, excluded: Sequence[Tensor] | None
    ) -> list[list[tuple[int, float]]]:
        """Find the best items of many users: those who ask for one domain are scored together.

        Args:
            vectors: (B, K) float.
            domains: (B,) domain ids.
            k: see :meth:`best`.
            excluded: (B,), see :meth:`best`; None: nothing.

        Returns:
            What :meth:`best` returns, for each user.
        """
        rows_of: dict[int, list[int]] = defaultdict(list)
        for row, domain in enumerate(domains):
            rows_of[domain].append(row)
        found: dict[int, list[tuple[int, float]]] = {}
        for domain, rows in rows_of.items():
            size = self._offsets[domain + 1] - self._offsets[domain]
            together = max(1, _BLOCK // max(1, size))
            if not self._by_dot_product or domain in self._lists:
                together = 1
            for first in range(0, len(rows), together):
                some = rows[first : first + together]
                out = None if excluded is None else [excluded[row] for row in some]
                if len(some) > 1:
                    best = self._exactly_of_each(vectors[some], domain, k, out)
                else:
                    best = [self.best(vectors[some[0]], domain, k, None if out is None else out[0])]
                found.update(zip(some, best))
        return [found[row] for row in range(len(domains))]

    def _exactly_of_each(
        self, vectors: Tensor, domain: int, k: int, excluded: Sequence[Tensor] | None
    ) -> list[list[tuple[int, float]]]:
        """Score all of a domain's items for some users by one product; see :meth:`best_of_each`."""
        start, end = self._offsets[domain], self._offsets[domain + 1]
        # A column more, for what is left out and is of other domains.
        scores = vectors.new_empty(len(vectors), end - start + 1)
        torch.mm(vectors, self._vectors[start:end].T, out=scores[:, :-1])
        if excluded is not None:
            sizes = torch.tensor([len(items) for items in excluded])
            places = self._places.index_select(0, torch.cat(list(excluded)))
            inside = (places >= start) & (places < end)
            columns = torch.where(inside, places - start, end - start)
            users = torch.repeat_interleave(torch.arange(len(vectors)), sizes)
            scores.view(-1).index_fill_(0, users * scores.shape[1] + columns, float("-inf"))
        scores, places = scores[:, :-1].topk(min(k, end - start))
        items = self._items[places + start]
        return [
            [pair for pair in zip(*row) if pair[1] > float("-inf")]
            for row in zip(items.tolist(), scores.tolist())
        ]

    def scores(self, vectors: Tensor, items: Tensor) -> Tensor:
        """Score items for users: (B, K) float vectors, (B, C) int64 ids -> (B, C) float."""
        if isinstance(self.scorer, DotProduct):
            return torch.einsum("bk,bck->bc", vectors, self.scorer.item_vectors(items))
        rows = [self.scores_of_one(user, row) for user, row in zip(vectors, items)]
        return torch.stack(rows) if rows else vectors.new_empty(items.shape)

    def scores_of_one(self, vector: Tensor, items: Tensor) -> Tensor:
        """Score items for one user: (K,) float vector, (C,) int64 ids -> (C,) float."""
        if isinstance(self.scorer, DotProduct):
            return self.scorer.item_vectors(items) @ vector
        return self.scorer(items)(vector[None])[0]

    def _near(
        self, vector: Tensor, domain: int, k: int, left_out: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Return scores and places by a domain's index; None where it has none or finds too few."""
        if domain not in self._lists:
            return None
        start, end = self._offsets[domain], self._offsets[domain + 1]
        left_out = left_out[(left_out >= start) & (left_out < end)]
        # So many more are asked for that none of those left out takes the place of another.
        wanted = k + len(left_out)
        if wanted > _LARGEST_SHARE * (end - start):
            return None
        scores, places = self._lists[domain].nearest(vector, wanted)
        places = places + start
        kept = torch.isin(places, left_out, invert=True).nonzero().squeeze(1)[:k]
        return (scores[kept], places[kept]) if len(kept) == k else None

    def _exactly(
        self, vector: Tensor, start: int, end: int, k: int, left_out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Score all of the places ``start..end - 1``, block by block; the same result."""
        bests, places = [vector[:0]], [left_out[:0]]
        for first in range(start, end, _BLOCK):
            last = min(first + _BLOCK, end)
            if self._by_dot_product:
                scores = self._vectors[first:last] @ vector
            else:
                scores = self.scores_of_one(vector, self._items[first:last]).clone()
            inside = left_out[(left_out >= first) & (left_out < last)]
            scores.index_fill_(0, inside - first, float("-inf"))
            top = scores.topk(min(k, len(scores)))
            bests.append(top.values)
            places.append(top.indices + first)
        found = torch.cat(bests)
        found, order = found.topk(min(k, len(found)))
        seen = int((found > float("-inf")).sum())
        return found[:seen], torch.cat(places)[order[:seen]]
