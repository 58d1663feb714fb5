"""``bench serving``: one event and an answer, against encoding the whole history again.

The answers of every provider are compared with the dense definition in float64 first; then all
take turns in one process, each turn from a user with the same history. With ``--retrieval-items``
the search for the best of many items is measured too, by each kind of retrieval.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from hstu_xd.bench import encoder_passes, passes, providers
from hstu_xd.bench.cases import Case, Draw
from hstu_xd.bench.rows import Row, empty_row, environment, time_columns, times_faster
from hstu_xd.bench.timing import Mark, Pass, take_turns, torch_threads
from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.model.ddsr import attend_states_in_tiles
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.serving import EncoderSession
from hstu_xd.serving.retrieval import RETRIEVALS, ItemIndex
from hstu_xd.serving.state import expected_bytes

# Provider -> calls in a turn: ten of those that take a millisecond, one of those that take more.
PROVIDERS = {
    "append": 10,
    "re-encode": 1,
    "re-encode dense": 1,
    "upstream": 1,
    "ask one": 10,
    "ask all": 10,
    "in turn": 1,
    "together": 1,
    "state float16": 0,
}
# Ratio -> the provider whose time is the divisor, and the one whose time is divided.
_RATIOS = {
    "times_faster_than_re_encode": ("append", "re-encode"),
    "times_faster_than_dense": ("append", "re-encode dense"),
    "times_faster_than_upstream": ("append", "upstream"),
    "times_of_ask_one": ("ask one", "ask all"),
    "times_faster_than_in_turn": ("together", "in turn"),
}
# Largest difference of a user vector from the definition; the vector has length 1.
_BUDGET = 1e-5
# A state's bytes may differ from the formula by this share of it, or by a few events.
_BYTES_BUDGET, _SPARE_EVENTS = 0.05, 8
_ITEMS, _TOP = 20_000, 10
_USER = "user"
# Users whose events and answers come together, and the longest histories that are made for so many.
_CROWD = [f"user {number}" for number in range(64)]
_LONGEST_OF_CROWD = 2000
_UPSTREAM = providers.PROVIDERS["encoder"]["upstream"]

# Retrieval: the best hundred for 32 users. The vectors are drawn, four fifths of their variance in
# sixteen directions, as few directions matter to embeddings that were trained. The smaller that
# share is, the more an index misses.
_BEST, _ASKING_USERS, _DIRECTIONS = 100, 32, 16
# Largest difference of a score from the dot product in float64.
_SCORE_BUDGET = 1e-5

_Found = list[tuple[int, float]]


def measure(
    cases: Iterable[Case], names: Iterable[str], *, threads: int, repeats: int
) -> list[Row]:
    """Measure all cases and return their rows, one for each provider.

    "append" is one event and ten recommendations for one domain. "re-encode" encodes the history by
    this package's fastest path and recommends the same way, "re-encode dense" by the dense
    definition; "upstream" is the forward pass of generative-recommenders' layers alone, which know
    no domains. "ask one" and "ask all" are the user's vector for one domain and for all. "in turn"
    is an event and ten recommendations for each of 64 users, one after the other, "together" the
    same in two calls. Ratios are medians over turns. "state float16" has bytes instead of a time.

    Args:
        cases: the cases to measure; they have one user, whatever the batch size.
        names: names of the providers.
        threads: threads of PyTorch.
        repeats: number of turns.
    """
    chosen = list(names)
    with torch_threads(threads), torch.no_grad():
        return [row for case in cases for row in _rows(_Bench(case), chosen, threads, repeats)]


def _rows(bench: "_Bench", names: list[str], threads: int, repeats: int) -> list[Row]:
    case = bench.case
    absent = {name: reason for name in names if (reason := _missing(name, case))}
    errors = {name: bench.error(name) for name in names if name not in absent}
    times = bench.take_turns([name for name, error in errors.items() if error <= 1], repeats)
    rows = []
    for name in names:
        row = empty_row(name, bench.case, threads=threads, repeats=repeats)
        row |= {"dtype": "float16" if name == "state float16" else "float32"}
        row |= {"correct": None if name in absent else errors[name] <= 1}
        if name in absent:
            row["absent"] = absent[name]
        else:
            row["error_of_budget"] = errors[name]
        if name == "state float16":
            row["state_bytes"], row["formula_bytes"] = bench.bytes_of_state()
        elif name in times:
            low, median, high = np.percentile(times[name], [20, 50, 80])
            row |= {"ms_median": median, "ms_p20": low, "ms_p80": high}
        for ratio, (base, other) in _RATIOS.items():
            told_of = other if base == "ask one" else base
            if name == told_of and base in times and other in times:
                turns = np.median(times[other], axis=1) / np.median(times[base], axis=1)
                row[ratio] = float(np.median(turns))
        rows.append(row)
    return rows


def _missing(name: str, case: Case) -> str | None:
    """Return why a provider cannot run here; None where it can."""
    if name in ("in turn", "together") and case.seq_len > _LONGEST_OF_CROWD:
        return f"{len(_CROWD)} users have at most {_LONGEST_OF_CROWD} events each"
    return _UPSTREAM.missing(case) if name == "upstream" else None


class _Bench:
    """A model with every switch on, a user, and the providers that answer for this user."""

    def __init__(self, case: Case) -> None:
        self.case = replace(case, batch_size=1)
        draw = Draw.from_case(self.case)
        self._model, self._dense = _model(case, "auto"), _model(case, "reference")
        # The dense rival differs in its attention alone.
        attend_states_in_tiles(self._dense)
        self._truth = _model(case, "reference").double()
        self._session, self._index = EncoderSession(self._model), ItemIndex(self._model)
        self._crowd = EncoderSession(self._model)
        generator = torch.Generator().manual_seed(1)
        place = torch.randint(_ITEMS // case.num_domains, draw.domains.shape, generator=generator)
        # Items 1 + d, 1 + d + D, ... belong to domain d.
        self._items, self._times = 1 + place * case.num_domains + draw.domains, draw.timestamps
        every = list(range(case.num_domains))
        self._calls: dict[str, Callable[[], object]] = {
            "append": lambda: self._append_to(self._session, [_USER]),
            "re-encode": lambda: self._re_encode(self._model),
            "re-encode dense": lambda: self._re_encode(self._dense),
            "ask one": lambda: self._session.query([_USER], [every[:1]]),
            "ask all": lambda: self._session.query([_USER], [every]),
            "in turn": lambda: [self._append_to(self._crowd, [user]) for user in _CROWD],
            "together": lambda: self._append_to(self._crowd, _CROWD),
        }
        if _missing("upstream", self.case) is None:
            computes = _UPSTREAM.computation(self.case)
            _, forward = encoder_passes.upstream_stack(draw, torch.float32, computes)
            x = draw.normal(case.seq_len, case.width, dtype=torch.float32, seed=1)
            causal = torch.ones(case.seq_len, case.seq_len).tril()
            self._calls["upstream"] = lambda: forward(x, causal)

    def error(self, name: str) -> float:
        """Return the error of a provider, as a fraction of what is allowed."""
        if name == "upstream":
            with torch.enable_grad():
                return passes.largest_error(name, replace(self.case, what="encoder"))
        if name == "state float16":
            found, expected = self.bytes_of_state()
            allowed = max(_BYTES_BUDGET * expected, self._formula(_SPARE_EVENTS))
            return abs(found - expected) / allowed
        events = self.case.seq_len
        if name.startswith("re-encode"):
            model = self._model if name == "re-encode" else self._dense
            return _difference(self._encode(model, events), self._encode(self._truth, events))
        users = _CROWD if name in ("in turn", "together") else [_USER]
        return max(self._session_error(users, count) for count in (events - 1, events))

    def take_turns(self, names: list[str], repeats: int) -> dict[str, np.ndarray]:
        """Return the milliseconds of each provider (turns, calls), after a turn that warms up."""
        times: dict[str, list[list[float]]] = {name: [] for name in names if name in self._calls}
        for turn in range(repeats + 1):
            self._restart(self._session, [_USER], self.case.seq_len)
            if "in turn" in times or "together" in times:
                self._restart(self._crowd, _CROWD, self.case.seq_len)
            for name, kept in times.items():
                taken = [_milliseconds(self._calls[name]) for _ in range(PROVIDERS[name])]
                if turn:
                    kept.append(taken)
        return {name: np.array(kept) for name, kept in times.items()}

    def bytes_of_state(self) -> tuple[int, int]:
        """Return the bytes of a float16 state grown event by event, and those by the formula."""
        session = EncoderSession(self._model, dtype=torch.float16)
        self._restart(session, [_USER], self.case.seq_len)
        return session.num_bytes, self._formula(self.case.seq_len)

    def _formula(self, events: int) -> int:
        return expected_bytes(self._model.settings, events, torch.float16)

    def _restart(self, session: EncoderSession, users: list[str], events: int) -> None:
        """Give users the first events, the last of them on top of an existing state."""
        items, times = self._items[:events].tolist(), self._times[:events].tolist()
        for user in users:
            session.forget(user)
            session.append([user] * (events - 1), items[:-1], times[:-1])
        session.append(users, items[-1:] * len(users), times[-1:] * len(users))
        session.query(users, [0] * len(users))

    def _append_to(self, session: EncoderSession, users: list[str]) -> None:
        count = len(users)
        session.append(users, [1] * count, [int(self._times[-1])] * count)
        session.recommend(users, [0] * count, _TOP)

    def _re_encode(self, model: CrossDomainHSTU) -> None:
        vector = model.encode(self._items[None], self._times[None], torch.tensor([0]))[0]
        self._index.best(vector, 0, _TOP, self._items)

    def _encode(self, model: CrossDomainHSTU, events: int) -> Tensor:
        """Encode the user after the first events, for every domain: (D, K)."""
        domains = torch.arange(self.case.num_domains)
        items, times = (x[:events].expand(len(domains), -1) for x in (self._items, self._times))
        return model.encode(items, times, domains)

    def _session_error(self, users: list[str], events: int) -> float:
        if not events:
            return 0.0
        session = EncoderSession(self._model)
        self._restart(session, users, events)
        found = session.query(users, [list(range(self.case.num_domains))] * len(users))
        truth = self._encode(self._truth, events)
        return max(_difference(vectors, truth) for vectors in found)


def _model(case: Case, impl: str) -> CrossDomainHSTU:
    """Build a model with every switch on, away from its initial values, of which some are zero."""
    catalog = DomainCatalog(
        (torch.arange(_ITEMS + 1) - 1) % case.num_domains, [str(d) for d in range(case.num_domains)]
    )
    settings = EncoderSettings(
        num_domains=case.num_domains,
        norm_length=case.seq_len + PROVIDERS["append"],
        embedding_dim=case.width,
        num_blocks=case.layers,
        num_heads=case.heads,
        dqk=case.dqk,
        dv=case.dv,
        domain_mask=True,
        tape=True,
        ddsr=True,
        target_domain_embedding=True,
        target_view_heads=case.heads // 2,
        impl=impl,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CrossDomainHSTU(catalog, settings).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def _difference(found: Tensor, truth: Tensor) -> float:
    """Return the largest difference of a vector, as a fraction of what is allowed."""
    return float((found.to(truth.dtype) - truth).norm(dim=1).max()) / _BUDGET


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def measure_retrieval(items: int, *, width: int, threads: int, repeats: int) -> list[Row]:
    """Measure one request for the best hundred items of a domain, by each kind of retrieval.

    ``recall`` is the share of the exact best hundred that were found, over 32 users; ``correct``
    says that every score is the item's dot product and no item comes twice.

    Args:
        items: number of items of the one domain.
        width: width of the vectors.
        threads: threads of PyTorch; the index searches with one.
        repeats: timed requests of each kind, in turns.
    """
    with torch_threads(threads), torch.inference_mode():
        return _retrieval_rows(items, width, threads, repeats)


def _retrieval_rows(items: int, width: int, threads: int, repeats: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(_DIRECTIONS, width, generator=generator) / _DIRECTIONS**0.5
    model = _model_of_vectors(_draw_vectors(items + 1, mixing, generator))
    users = torch.nn.functional.normalize(_draw_vectors(_ASKING_USERS, mixing, generator), dim=1)
    rows: dict[str, Row] = {}
    found: dict[str, list[_Found]] = {}
    runs: dict[str, Pass] = {}
    for kind in RETRIEVALS:
        rows[kind] = _empty_retrieval_row(kind, items, width, threads, repeats)
        start = time.perf_counter()
        try:
            index = ItemIndex(model, kind)
        except InputError as absent:
            rows[kind]["absent"] = str(absent)
            continue
        rows[kind]["seconds"] = time.perf_counter() - start
        found[kind] = [index.best(user, 0, _BEST, None) for user in users]
        rows[kind] |= _retrieval_quality(found[kind], found["exact"], model, users)
        if rows[kind]["correct"]:
            runs[kind] = _retrieval_request(index, users)
    times = take_turns(runs, {}, device="cpu", repeats=repeats)
    for kind, taken in times.items():
        rows[kind] |= time_columns(taken) | times_faster(times, kind, "exact")
    rows["exact"].pop("times_faster_than_exact", None)
    return list(rows.values())


def _empty_retrieval_row(kind: str, items: int, width: int, threads: int, repeats: int) -> Row:
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
        **environment("cpu"),
    }


def _draw_vectors(rows: int, mixing: Tensor, generator: torch.Generator) -> Tensor:
    """Draw normal vectors (rows, K), four fifths of their variance in directions of ``mixing``."""
    noise = torch.randn(rows, mixing.shape[1], generator=generator) / 2
    return noise.addmm_(torch.randn(rows, len(mixing), generator=generator), mixing)


def _model_of_vectors(item_vectors: Tensor) -> CrossDomainHSTU:
    """Build a model with these item vectors; its other parts do not matter."""
    catalog = DomainCatalog(torch.zeros(len(item_vectors), dtype=torch.int64), ["all"])
    settings = EncoderSettings(
        num_domains=1, norm_length=1, embedding_dim=item_vectors.shape[1], num_blocks=1
    )
    model = CrossDomainHSTU(catalog, settings)
    model.get_parameter("_embedding_module._item_emb.weight").copy_(item_vectors)
    return model


def _retrieval_quality(
    found: list[_Found], exact: list[_Found], model: CrossDomainHSTU, users: Tensor
) -> Row:
    hits, correct = 0, True
    for best, truth, user in zip(found, exact, users):
        items = [item for item, _ in best]
        hits += len({item for item, _ in truth} & set(items))
        vectors = model.item_vectors(torch.tensor(items)).double()
        difference = vectors @ user.double() - torch.tensor([score for _, score in best])
        correct &= len(set(items)) == len(truth) and float(difference.abs().max()) <= _SCORE_BUDGET
    return {"recall": hits / sum(map(len, exact)), "correct": correct}


def _retrieval_request(index: ItemIndex, users: Tensor) -> Pass:
    turns = cycle(users)

    def run(mark: Mark) -> dict[str, Tensor]:
        index.best(next(turns), 0, _BEST, None)
        return {}

    return run
