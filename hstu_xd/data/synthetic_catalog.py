"""The invented world behind ``hstu-xd synth``: tastes, themes, domains and what links them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hstu_xd.errors import InputError

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
