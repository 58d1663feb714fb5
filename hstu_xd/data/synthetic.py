"""Write a synthetic cross-domain log in which one domain truly tells about another.

An invented catalogue has domains, themes that link them, and items; synthetic users with tastes
walk through it event by event: domain, then theme, then item.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data import store_files
from hstu_xd.data.encode import Events
from hstu_xd.data.filters import Filters
from hstu_xd.data.ids import number_tokens
from hstu_xd.data.prepare import build_log
from hstu_xd.data.store import is_store
from hstu_xd.data.store_files import write_store
from hstu_xd.errors import InputError
from hstu_xd.files import check_output, replaced_folder

NAMES = ("books", "films", "groceries", "games", "music")
TASTE_WIDTH = 8
ITEMS_PER_THEME = 20
TASTE_STRENGTH = 1.5
ITEM_STRENGTH = 0.5
ZIPF_EXPONENT = 0.8
STAY_WEIGHT = 1.2
SINKHORN_ROUNDS = 200


@dataclass(frozen=True)
class SynthOptions:
    """Size and shape of a synthetic log.

    Attributes:
        users: number of users.
        domains: number of domains.
        items_per_domain: number of items in each domain.
        skew: 0 = all domains get the same share of events; towards 1 the first takes nearly all:
            its share is 1 / D + skew * (1 - 1 / D).
        seed: equal seeds give equal logs.
        mean_length: mean number of events of a user.
    """

    users: int = 2000
    domains: int = 5
    items_per_domain: int = 400
    skew: float = 0.0
    seed: int = 0
    mean_length: float = 40.0

    def check(self) -> None:
        """Raise InputError for a value out of range."""
        least = {"users": 1, "domains": 1, "items_per_domain": 2, "seed": 0, "mean_length": 5}
        for name, low in least.items():
            value = getattr(self, name)
            if not value >= low:
                raise InputError(f"--{name.replace('_', '-')} {value}: give at least {low}")
        if not 0 <= self.skew < 1:
            raise InputError(f"--skew {self.skew}: give a number from 0 to below 1")


@dataclass(frozen=True)
class World:
    """What is true of all users.

    Attributes:
        themes: (C, TASTE_WIDTH) one vector a theme, shared by all domains.
        theme_items: (D, C, M) item of each place in each theme, -1 beyond a short theme's end.
            The items of one place in one theme are companions: the film of the book.
        item_vectors: (D, I, TASTE_WIDTH) what sets an item apart within its theme.
        log_popularity: (D, I).
        transitions: (D, D) chance of the next event's domain given the domain of this one.
        links: (D, D) chance that the first event after a switch takes up the theme just left.
    """

    themes: NDArray[np.float64]
    theme_items: NDArray[np.int64]
    item_vectors: NDArray[np.float64]
    log_popularity: NDArray[np.float64]
    transitions: NDArray[np.float64]
    links: NDArray[np.float64]


def domain_names(count: int) -> list[str]:
    """Readable names for the first domains, then domain_06, domain_07, ..."""
    return [NAMES[d] if d < len(NAMES) else f"domain_{d + 1:02d}" for d in range(count)]


def make_world(options: SynthOptions, rng: np.random.Generator) -> World:
    """Draw themes, items, popularity and the way users move between domains."""
    domains, items = options.domains, options.items_per_domain
    num_themes = max(2, items // ITEMS_PER_THEME)
    places = -(-items // num_themes)
    theme_items = np.full((domains, num_themes, places), -1)
    for d in range(domains):
        # Which items make up a theme differs by domain: numbers alone must not give it away.
        slots = theme_items[d].T.reshape(-1)
        slots[:items] = rng.permutation(items)
        theme_items[d] = slots.reshape(places, num_themes).T
    rank = np.empty((domains, items))
    for d in range(domains):
        inside = theme_items[d] >= 0
        rank[d, theme_items[d][inside]] = np.nonzero(inside)[1]
    return World(
        themes=rng.standard_normal((num_themes, TASTE_WIDTH)) / np.sqrt(TASTE_WIDTH),
        theme_items=theme_items,
        item_vectors=rng.standard_normal((domains, items, TASTE_WIDTH)) / np.sqrt(TASTE_WIDTH),
        log_popularity=-ZIPF_EXPONENT * np.log1p(rank),
        transitions=_transitions(options, rng),
        links=rng.uniform(0.5, 0.9, (domains, domains)),
    )


def _transitions(options: SynthOptions, rng: np.random.Generator) -> NDArray[np.float64]:
    """Build a Markov chain whose long-run shares are those that ``skew`` asks for.

    Symmetric scaling (Sinkhorn) of a matrix of affinities between domains gives flows whose row
    sums are the shares; the chain with these flows has the shares as its stationary distribution.
    """
    count = options.domains
    shares = np.full(count, (1 - options.skew) / count)
    shares[0] += options.skew
    affinity = np.exp(rng.standard_normal((count, count)))
    affinity += affinity.T
    np.fill_diagonal(affinity, STAY_WEIGHT * (affinity.sum(1) - affinity.diagonal()))
    if count == 1:
        return np.ones((1, 1))
    scale = np.ones(count)
    for _ in range(SINKHORN_ROUNDS):
        scale = np.sqrt(scale * shares / (affinity @ scale))
    flows = scale[:, None] * affinity * scale
    return flows / flows.sum(1, keepdims=True)


def stationary(transitions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Long-run share of each domain: (D,), the start of every history is drawn from it."""
    shares = np.full(len(transitions), 1 / len(transitions))
    for _ in range(SINKHORN_ROUNDS):
        shares = shares @ transitions
    return shares / shares.sum()


BLOCK_USERS = 1024
SEEN_CELLS = 1 << 27
COMPANION_CHANCE = 0.5
DRIFT_CHANCE = 0.6
MIN_LENGTH = 5
LENGTH_SPREAD = 0.7
LENGTH_CAP = 8
FIRST_SECOND = 1_600_000_000
DAY = 86_400
YEAR = 365 * DAY


def simulate(options: SynthOptions) -> Events:
    """Draw all events of a synthetic log; equal options give equal events.

    A user has one taste for themes in all domains. Within a domain themes drift to their
    neighbours; after a switch the theme just left is often taken up in the new domain, half of
    the time with the very companion of the last item.
    """
    rng = np.random.default_rng(options.seed)
    world = make_world(options, rng)
    cells = options.domains * options.items_per_domain
    size = max(1, min(BLOCK_USERS, SEEN_CELLS // cells))
    parts = []
    for first in range(0, options.users, size):
        walk = _Walk(world, _lengths(options, rng, min(size, options.users - first)), rng)
        user, item, time = walk.run()
        parts.append((user + first, item, time))
    user, item, time = (np.concatenate(columns) for columns in zip(*parts))
    return _numbered(options, user, item, time)


def _lengths(options: SynthOptions, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """Log-normal history lengths, longest first: (count,)."""
    centre = np.log(options.mean_length) - LENGTH_SPREAD**2 / 2
    lengths = np.exp(rng.normal(centre, LENGTH_SPREAD, count)).round()
    most = min(LENGTH_CAP * options.mean_length, options.domains * options.items_per_domain / 2)
    # Cut while they are floats: what is too long for an integer would become the shortest.
    lengths = np.clip(lengths, MIN_LENGTH, max(MIN_LENGTH, int(most))).astype(np.int64)
    return np.sort(lengths)[::-1]


class _Walk:
    """A block of users, longest histories first, so that the active ones are a prefix."""

    def __init__(self, world: World, lengths: NDArray[np.int64], rng: np.random.Generator) -> None:
        self.world, self.lengths, self.rng = world, lengths, rng
        users, domains, items = len(lengths), *world.log_popularity.shape
        self.taste = rng.standard_normal((users, TASTE_WIDTH))
        weights = np.exp(TASTE_STRENGTH * self.taste @ world.themes.T)
        self.theme_cdf = np.cumsum(weights / weights.sum(1, keepdims=True), axis=1)
        self.transition_cdf = np.cumsum(world.transitions, axis=1)
        start_cdf = np.cumsum(stationary(world.transitions))
        self.domain = self._draw(np.broadcast_to(start_cdf, (users, domains)))
        self.theme = self._draw(self.theme_cdf)
        self.place = np.zeros(users, np.int64)
        self.last_theme = np.full((users, domains), -1)
        self.seen = np.zeros((users, domains, items), np.bool_)
        self.clock = FIRST_SECOND + rng.integers(0, YEAR, users)

    def run(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """User of the block, item (domain * I + number) and time of every event."""
        longest, items = int(self.lengths[0]), self.world.log_popularity.shape[1]
        item = np.zeros((len(self.lengths), longest), np.int64)
        time = np.zeros_like(item)
        # Lengths fall, so the users still active at a step are counted by one search.
        active = np.searchsorted(-self.lengths, -np.arange(longest), side="left")
        for step in range(longest):
            n = int(active[step])
            chosen = self._step(n, first=step == 0)
            item[:n, step] = self.domain[:n] * items + chosen
            time[:n, step] = self.clock[:n]
        inside = np.arange(longest) < self.lengths[:, None]
        return np.nonzero(inside)[0], item[inside], time[inside]

    def _draw(self, cdf: NDArray[np.float64]) -> NDArray[np.int64]:
        """One category a row of cumulative chances."""
        drawn = (self.rng.random((len(cdf), 1)) > cdf).sum(1)
        return np.minimum(drawn, cdf.shape[1] - 1)

    def _step(self, n: int, *, first: bool) -> NDArray[np.int64]:
        """Advance the first n users by one event; return the item's number in its domain."""
        rows = np.arange(n)
        before = self.domain[:n].copy()
        if not first:
            self.domain[:n] = self._draw(self.transition_cdf[before])
        domain = self.domain[:n]
        switched = domain != before
        linked = switched & (self.rng.random(n) < self.world.links[before, domain])
        self._choose_theme(n, rows, linked, first=first)
        companion = linked & (self.rng.random(n) < COMPANION_CHANCE)
        chosen = self._choose_item(n, rows, companion)
        self.last_theme[rows, domain] = self.theme[:n]
        self.seen[rows, domain, chosen] = True
        days = np.where(switched, 3.0, 1.0) * self.rng.exponential(size=n)
        self.clock[:n] += 1 + (days * DAY).astype(np.int64)
        return chosen

    def _choose_theme(
        self, n: int, rows: NDArray[np.int64], linked: NDArray[np.bool_], *, first: bool
    ) -> None:
        if first:
            return
        own = self.last_theme[rows, self.domain[:n]]
        drifted = (own + self.rng.integers(0, 2, n)) % len(self.world.themes)
        drifts = (own >= 0) & (self.rng.random(n) < DRIFT_CHANCE)
        fresh = np.where(drifts, drifted, self._draw(self.theme_cdf[:n]))
        self.theme[:n] = np.where(linked, self.theme[:n], fresh)

    def _choose_item(
        self, n: int, rows: NDArray[np.int64], companion: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        world, domain = self.world, self.domain[:n]
        pool = world.theme_items[domain, self.theme[:n]]
        vectors = world.item_vectors[domain[:, None], pool]
        score = world.log_popularity[domain[:, None], pool] + self.rng.gumbel(size=pool.shape)
        score += ITEM_STRENGTH * np.einsum("nmk,nk->nm", vectors, self.taste[:n])
        # An item seen before comes again only when its theme is used up.
        score -= 1e3 * self.seen[rows[:, None], domain[:, None], pool]
        score[pool < 0] = -np.inf
        place = score.argmax(1)
        again = self.seen[rows, domain, pool[rows, self.place[:n]]]
        follows = companion & ~again & (pool[rows, self.place[:n]] >= 0)
        place = np.where(follows, self.place[:n], place)
        self.place[:n] = place
        return pool[rows, place]


def _numbered(
    options: SynthOptions,
    user: NDArray[np.int64],
    item: NDArray[np.int64],
    time: NDArray[np.int64],
) -> Events:
    """Give users and items their tokens and the numbering of a prepared log."""
    import polars as pl

    width = max(5, len(str(options.users - 1)))
    users = pl.Series("user", [f"u{u:0{width}d}" for u in range(options.users)])
    names, count = domain_names(options.domains), options.items_per_domain
    width = max(5, len(str(count - 1)))
    catalogue = pl.DataFrame(
        {
            "item": [f"d{d:02d}_i{i:0{width}d}" for d in range(len(names)) for i in range(count)],
            "domain": [name for name in names for _ in range(count)],
        }
    )
    catalogue, ranks = number_tokens(catalogue.select("domain", "item"))
    return Events(
        users=users,
        items=catalogue.select("item", "domain"),
        user=user.astype(np.int32),
        item=ranks[item],
        time=time,
    )


def synthesize(out: Path, options: SynthOptions, *, force: bool = False) -> dict[str, Any]:
    """Simulate users and write a prepared store marked as synthetic.

    Args:
        out: the folder to write; appears whole or not at all.
        options: size and shape.
        force: replace an existing prepared store.

    Returns:
        The manifest.

    Raises:
        InputError: an option out of range, or an output folder that may not be written.
        HstuXdError: the store cannot be written.
    """
    options.check()
    check_output(
        out, force=force, ours=is_store, kind="prepared store", parts=store_files.ALL_FILES
    )
    log, facts = build_log(simulate(options), Filters())
    facts |= {"synthetic": True, "synth": vars(options)}
    with replaced_folder(out, force=force) as partial:
        return write_store(partial, log, facts)
