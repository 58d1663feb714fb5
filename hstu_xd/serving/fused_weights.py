"""A model's weights laid out for rows that arrive one at a time, once a session."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from hstu_xd.model.encoder import HSTULayer, LayerCache
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.views import heads_by_run

# Added to a score that must not count: silu of it is 0.
HIDDEN = torch.finfo(torch.float32).min / 2


@dataclass(frozen=True, eq=False)
class PreparedLayer:
    """One layer: what its rows are multiplied with, merged into one matrix.

    Attributes:
        layer: the layer itself: it computes what is the same for one row as for many.
        projection: (K, W), columns of gates, of queries, and of each head's key and value side by
            side; with DDSR further those of its scaled queries and, where a state is the layer's
            input, of its keys and values side by side.
        widths: how many columns each of the five has.
        state_projection: (K, H * (dqk + dv)), DDSR's keys and values; None without DDSR.
    """

    layer: HSTULayer
    projection: Tensor
    widths: list[int]
    state_projection: Tensor | None

    @classmethod
    def of(cls, layer: HSTULayer) -> "PreparedLayer":
        """Lay out the weights of a layer."""
        heads, ddsr = layer._settings.num_heads, layer._ddsr
        u, v, q, k = layer._uvqk.split(layer._widths, dim=1)
        columns = [u, q, side_by_side(k, v, heads), q[:, :0], q[:, :0]]
        states = None
        if ddsr is not None:
            states = side_by_side(ddsr._key.weight.T, ddsr._value.weight.T, heads)
            columns[3] = ddsr._query.weight.T * ddsr._dqk**-0.5
            if layer._settings.state_from == "input":
                columns[4] = states
        return cls(layer, torch.cat(columns, dim=1), [x.shape[1] for x in columns], states)

    def project(
        self, normed: Tensor, added: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All products of the layer's normalised input.

        Args:
            normed: (R, K) float.
            added: (R, W), what is added to the products, of ``PreparedModel.added``.

        Returns:
            (R, H * dv) gates, (H, R, dqk) queries, (H, dqk + dv, R) keys and values,
            (R, H * dqk) DDSR's queries, and (R, H * (dqk + dv)) its keys and values; the last
            two are empty where the layer has none of them, or not of its input.
        """
        s = self.layer._settings
        projected = torch.addmm(added, normed, self.projection)
        if s.linear_activation == "silu":
            silu(projected[:, : sum(self.widths[:3])], inplace=True)
        u, q, kv, query, states = projected.split_with_sizes(self.widths, 1)
        return u, by_head(q, s.num_heads), columns_by_head(kv, s.num_heads), query, states

    def states(self, of_input: Tensor, attended: Tensor) -> Tensor:
        """DDSR's keys and values of what the rows write: (H, R, dqk + dv).

        Args:
            of_input: the last result of :meth:`project`.
            attended: (R, H * dv), normalised.
        """
        assert self.state_projection is not None
        s = self.layer._settings
        written = of_input if s.state_from == "input" else attended @ self.state_projection
        return by_head(written, s.num_heads)


@dataclass(frozen=True, eq=False)
class PreparedModel:
    """A model and what its layers have in common.

    Attributes:
        model: in evaluation mode.
        layers: first to last.
        sources: (D + 1, K), a domain's factor in the embedding of a switch from it; 0 in the last
            row, for rows whose domain stays.
        destinations: (D, K), a domain's factor in the embedding of a switch to it.
        requests: (D, K), the embedding of a target domain.
        history_tokens: (., K), their input; None without.
        positions: (layers, 2 N - 1), the tables of the relative position bias; None without bias.
        times: (layers, buckets + 1), those of the time bias.
        state_ages: (layers, H, buckets + 1), of DDSR's age bias; None without it.
        added: (layers, D, W), what a target domain adds to a layer's products: to DDSR's queries.
        initial_memory: (layers, H, D, dqk + dv), DDSR's keys and values of the initial states.
        views: (H,) or (layers * H,) int64, what each head reads: 0 everything, 1 the row's own
            domain, 2 its target domain; once where all layers read alike.
        domain_scores: (D + 1, D), added to scores of events of a domain (column) by a head that
            reads one domain (row), or everything (last row).
    """

    model: CrossDomainHSTU
    layers: list[PreparedLayer]
    sources: Tensor
    destinations: Tensor
    requests: Tensor
    history_tokens: Tensor | None
    positions: Tensor | None
    times: Tensor | None
    state_ages: Tensor | None
    added: Tensor
    initial_memory: Tensor
    views: Tensor
    domain_scores: Tensor

    @classmethod
    def of(cls, model: CrossDomainHSTU) -> "PreparedModel":
        """Lay out the weights of a model; later changes of them are not seen."""
        s, layers = model.settings, model._hstu.layers
        sources, destinations, requests = _signals(model)
        biases = [x._rel_attn_bias for x in layers if x._rel_attn_bias is not None]
        ddsr = [x._ddsr for x in layers if x._ddsr is not None]
        ages = [x._age_w.T for x in ddsr if x._age_w is not None]
        prepared = [PreparedLayer.of(layer) for layer in layers]
        initial = [
            by_head(x._initial_state @ layer.state_projection, s.num_heads)
            for x, layer in zip(ddsr, prepared)
            if layer.state_projection is not None
        ]
        views = [
            [int(run) for heads, run in heads_by_run(s, layer) for _ in range(s.num_heads)[heads]]
            for layer in range(s.num_blocks)
        ]
        scores = torch.full((s.num_domains + 1, s.num_domains), HIDDEN)
        scores[-1] = 0
        added = torch.zeros(s.num_blocks, s.num_domains, sum(prepared[0].widths))
        for index, x in enumerate(ddsr):
            if x._target_emb is not None:
                queries = added[index].split(prepared[index].widths, dim=1)[3]
                queries.copy_(x._target_emb.weight * x._dqk**-0.5)
        return cls(
            model=model,
            layers=prepared,
            sources=sources,
            destinations=destinations,
            requests=requests,
            history_tokens=model._hstu._history_tokens,
            positions=torch.stack([x._pos_w for x in biases]) if biases else None,
            times=torch.stack([x._ts_w for x in biases]) if biases else None,
            state_ages=torch.stack(ages) if ages else None,
            added=added,
            initial_memory=torch.stack(initial) if initial else torch.zeros(s.num_blocks, 0),
            views=torch.tensor(views if len({*map(tuple, views)}) > 1 else views[:1]).flatten(),
            domain_scores=scores.fill_diagonal_(0),
        )

    def memories(
        self, caches: list[LayerCache], kept: Tensor, events: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What the full encoder's rows left behind, as a user's state keeps it.

        Args:
            caches: of every layer.
            kept: (R,) int64, rows to remember.
            events: (n,) int64, rows that write states.

        Returns:
            (layers, H, dqk + dv, R) keys and values of the rows, and (layers, H, n, dqk + dv)
            those of the states they write; None without DDSR.
        """
        heads = self.model.settings.num_heads
        memory = [
            columns_by_head(side_by_side(w.keys[kept], w.values[kept], heads), heads)
            for w in caches
        ]
        states = [
            by_head(w.states[events] @ layer.state_projection, heads)
            for w, layer in zip(caches, self.layers)
            if layer.state_projection is not None
        ]
        return torch.stack(memory), torch.stack(states) if states else None


def _signals(model: CrossDomainHSTU) -> tuple[Tensor, Tensor, Tensor]:
    """TAPE's two factors and the target domain's embedding, zeros where a switch is off."""
    nothing = torch.zeros(model.settings.num_domains, model.settings.embedding_dim)
    sources, destinations, requests = nothing, nothing, nothing
    if model._tape is not None:
        destinations = model._tape._domain_emb.weight
        sources = model._tape._transition(destinations) * model._tape._scale
    if model._target_domain_emb is not None:
        requests = model._target_domain_emb.weight
    return torch.cat([sources, nothing[:1]]), destinations, requests


def by_head(x: Tensor, heads: int) -> Tensor:
    """(R, H * d) -> (H, R, d), a view."""
    return x.view(x.shape[0], heads, -1).transpose(0, 1)


def columns_by_head(x: Tensor, heads: int) -> Tensor:
    """(R, H * d) -> (H, d, R), a view."""
    return x.view(x.shape[0], heads, -1).permute(1, 2, 0)


def side_by_side(keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """(R, H * dqk), (R, H * dv) -> (R, H * (dqk + dv)): each head's key, then its value."""
    parts = [x.unflatten(1, (heads, -1)) for x in (keys, values)]
    return torch.cat(parts, dim=2).flatten(1)
