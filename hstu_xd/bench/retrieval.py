"""Rows of ``bench serving --retrieval-items``: the best hundred of many items, by each retrieval.

The vectors are drawn: four fifths of their variance lie in sixteen directions, as few directions
matter to embeddings that were trained. The less of it does, the more an index misses.
"""

import time
from itertools import cycle

import torch
from torch import Tensor

from hstu_xd.bench.rows import Row, conditions, time_columns, times_faster
from hstu_xd.bench.timing import Mark, Pass, take_turns
from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.serving.retrieval import RETRIEVALS, ItemIndex

_TOP, _USERS, _DIRECTIONS = 100, 32, 16
# Largest difference of a score from the dot product in float64.
_BUDGET = 1e-5

Found = list[tuple[int, float]]


def measure(items: int, *, width: int, threads: int, repeats: int) -> list[Row]:
    """A row for each kind of retrieval: one request for the best hundred items of one domain.

    ``recall`` is the share of the exact best hundred that were found, over 32 users; ``correct``
    says that every score is the item's dot product and no item comes twice.

    Args:
        items: of the one domain.
        width: of the vectors.
        threads: of PyTorch; the index searches with one.
        repeats: timed requests of each kind, in turns.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return _rows(items, width, threads, repeats)
    finally:
        torch.set_num_threads(before)


def _rows(items: int, width: int, threads: int, repeats: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(_DIRECTIONS, width, generator=generator) / _DIRECTIONS**0.5
    model = _model(_draw(items + 1, mixing, generator))
    users = torch.nn.functional.normalize(_draw(_USERS, mixing, generator), dim=1)
    rows: dict[str, Row] = {}
    found: dict[str, list[Found]] = {}
    runs: dict[str, Pass] = {}
    for kind in RETRIEVALS:
        rows[kind] = _empty_row(kind, items, width, threads, repeats)
        start = time.perf_counter()
        try:
            index = ItemIndex(model, kind)
        except InputError as absent:
            rows[kind]["absent"] = str(absent)
            continue
        rows[kind]["seconds"] = time.perf_counter() - start
        found[kind] = [index.best(user, 0, _TOP, None) for user in users]
        rows[kind] |= _quality(found[kind], found["exact"], model, users)
        if rows[kind]["correct"]:
            runs[kind] = _request(index, users)
    times = take_turns(runs, {}, device="cpu", repeats=repeats)
    for kind, taken in times.items():
        rows[kind] |= time_columns(taken) | times_faster(times, kind, "exact")
    rows["exact"].pop("times_faster_than_exact", None)
    return list(rows.values())


def _empty_row(kind: str, items: int, width: int, threads: int, repeats: int) -> Row:
    return {
        "provider": f"{kind} retrieval",
        "seq_len": None,
        "num_domains": 1,
        "skew": None,
        "dtype": "float32",
        "device": "cpu",
        "ms_median": None,
        "ms_p20": None,
        "ms_p80": None,
        "peak_bytes": None,
        "correct": None,
        "what": "serving",
        "items": items,
        "width": width,
        "threads": threads,
        "repeats": repeats,
        **conditions("cpu"),
    }


def _draw(rows: int, mixing: Tensor, generator: torch.Generator) -> Tensor:
    """(rows, K) normal vectors, four fifths of their variance in directions of ``mixing``."""
    noise = torch.randn(rows, mixing.shape[1], generator=generator) / 2
    return noise.addmm_(torch.randn(rows, len(mixing), generator=generator), mixing)


def _model(item_vectors: Tensor) -> CrossDomainHSTU:
    """A model of these item vectors; what else it is made of does not matter."""
    catalog = DomainCatalog(torch.zeros(len(item_vectors), dtype=torch.int64), ["all"])
    settings = EncoderSettings(
        num_domains=1, norm_length=1, embedding_dim=item_vectors.shape[1], num_blocks=1
    )
    model = CrossDomainHSTU(catalog, settings)
    model.get_parameter("_embedding_module._item_emb.weight").copy_(item_vectors)
    return model


def _quality(found: list[Found], exact: list[Found], model: CrossDomainHSTU, users: Tensor) -> Row:
    hits, correct = 0, True
    for best, truth, user in zip(found, exact, users):
        items = [item for item, _ in best]
        hits += len({item for item, _ in truth} & set(items))
        vectors = model.item_vectors(torch.tensor(items)).double()
        difference = vectors @ user.double() - torch.tensor([score for _, score in best])
        correct &= len(set(items)) == len(truth) and float(difference.abs().max()) <= _BUDGET
    return {"recall": hits / sum(map(len, exact)), "correct": correct}


def _request(index: ItemIndex, users: Tensor) -> Pass:
    turns = cycle(users)

    def run(mark: Mark) -> dict[str, Tensor]:
        index.best(next(turns), 0, _TOP, None)
        return {}

    return run
