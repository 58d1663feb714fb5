"""The encoder: a stack of HSTU layers, input embeddings in, one hidden state a row out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from hstu_xd.batch import Questions
from hstu_xd.errors import InputError
from hstu_xd.model.asked_rows import AskedRows, check_asked, pays
from hstu_xd.model.ddsr import DynamicDomainState, side_by_side
from hstu_xd.model.fused_layer import EPS, FusedLayer, LayerCache
from hstu_xd.model.inputs import dropout
from hstu_xd.model.sasrec import SASRecLayer
from hstu_xd.model.settings import SASREC, EncoderSettings
from hstu_xd.model.views import EncoderRows, Events, View
from hstu_xd.ops import domain_attention
from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.relative_bias import NUM_TIME_BUCKETS, RelativeBias
from hstu_xd.parts import Part

# Of the number of a view and one of its groupings, (n, h, dqk) keys and (n, h, dv) values.
Memory = Callable[[int, DomainGrouping], tuple[Tensor, Tensor]]


class RelativeBucketedTimeAndPositionBias(nn.Module):
    """Tables over the position difference and the log-bucketed time difference.

    Args:
        max_length: the padded length ``N``; positions run from 0 to ``N - 1``.

    Source: arXiv 2402.17152; parameter names as in generative-recommenders.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self._ts_w = nn.Parameter(torch.empty(NUM_TIME_BUCKETS + 1).normal_(std=0.02))
        self._pos_w = nn.Parameter(torch.empty(2 * max_length - 1).normal_(std=0.02))

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Return the tables of positions, (2 N - 1,), and of times, (buckets + 1,)."""
        return self._pos_w, self._ts_w

    def forward(
        self, positions: Tensor, timestamps: Tensor, next_timestamps: Tensor
    ) -> RelativeBias:
        """Tie the tables to a batch's tokens: three (L,) int64 tensors."""
        return RelativeBias(self._pos_w, self._ts_w, positions, timestamps, next_timestamps)


class HSTULayer(nn.Module):
    """``H = X + Wo(U * (LN(Y) + C))`` with ``Y`` the attention and ``C`` the domain states' answer.

    Without ``C`` (DDSR off) and with one group a user (mask off) this is upstream's layer, with
    upstream's parameter names.

    Args:
        settings: sizes and switches of the encoder.

    Source: arXiv 2402.17152 (layer), arXiv 2508.20945 (intra-domain attention and DDSR).
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        s = self._settings = settings
        self._widths = [s.num_heads * w for w in (s.dv, s.dv, s.dqk, s.dqk)]
        self._uvqk = nn.Parameter(torch.empty(s.embedding_dim, sum(self._widths)).normal_(std=0.02))
        self._o = nn.Linear(s.num_heads * s.dv * (3 if s.concat_ua else 1), s.embedding_dim)
        nn.init.xavier_uniform_(self._o.weight)
        self._rel_attn_bias = (
            RelativeBucketedTimeAndPositionBias(s.norm_length)
            if s.enable_relative_attention_bias
            else None
        )
        self._ddsr = DynamicDomainState.from_settings(s) if s.ddsr else None

    def forward(
        self,
        x: Tensor,
        rows: EncoderRows,
        views: Sequence[View],
        caches: list[LayerCache] | None = None,
        *,
        asked: AskedRows | None = None,
    ) -> Tensor:
        """Run the layer over the rows of a jagged batch.

        Args:
            x: (L', K) float, or (n, K) of the rows that are given, see :class:`AskedRows`.
            rows: their coordinates, and which domain states they read.
            views: what the heads read.
            caches: takes what the rows leave behind for later ones, if given.
            asked: the rows whose output is wanted; None: all.

        Returns:
            (L', K) float, or (Q, K) of the rows that are asked for.
        """
        if asked is not None and not asked.attends_everywhere:
            return self._forward_asked(x, rows, caches, asked)
        normed, u, v, q, k = self.project(x)
        # The gradient of a slice would be zeros for all other heads; that of a split is whole.
        keys, values = (self._by_view(part, views) for part in (k, v))
        attended = self._attend(q, lambda number, _: (keys[number], values[number]), rows, views)
        states = self.state(normed, attended)
        if caches is not None:
            caches.append(LayerCache(k, v, states))
        answer = self._answer(normed, states, rows, asked)
        if asked is not None:
            x, u, attended = (asked.take(part) for part in (x, u, attended))
        return self.combine(x, u, attended, answer)

    def _forward_asked(
        self, x: Tensor, rows: EncoderRows, caches: list[LayerCache] | None, asked: AskedRows
    ) -> Tensor:
        """Run the layer for the rows that are asked for: (n, K) of those given -> (Q, K)."""
        s = self._settings
        normed = layer_norm(x, x.shape[-1:], eps=EPS)
        u, v, q, k = self._uvqk.split(self._widths, dim=1)
        if caches is not None:
            keys, values = self._products(normed, k, v)
            caches.append(LayerCache(keys, values, normed))
        of_views = [self._by_view(weights, asked.views) for weights in (k, v)]

        def memory(number: int, grouping: DomainGrouping) -> tuple[Tensor, Tensor]:
            weights = (of_view[number].flatten(1) for of_view in of_views)
            keys, values = self._products(asked.memory(grouping, normed), *weights)
            return keys.unflatten(1, (-1, s.dqk)), values.unflatten(1, (-1, s.dv))

        gates, queries = self._products(asked.take(normed), u, q)
        attended = self._attend(queries, memory, rows, asked.views)
        answer = self._answer(normed, normed, rows, asked)
        return self.combine(asked.take(x), gates, attended, answer)

    def _answer(
        self, normed: Tensor, states: Tensor, rows: EncoderRows, asked: AskedRows | None
    ) -> Tensor | None:
        """Let rows ask the domain states, those asked for or all; None where nobody asks."""
        if self._ddsr is None or (asked is not None and not asked.entries.numel()):
            return None
        if asked is not None:
            return self._ddsr(
                asked.take(normed),
                asked.take_states(states),
                asked.state_reads,
                asked.targets,
                questions=asked.question_reads,
            )
        read = self._ddsr(
            rows.take_entries(normed),
            rows.take_entries(states),
            rows.state_reads,
            rows.entry_targets,
            questions=rows.question_reads,
        )
        return rows.spread_entries(read)

    def fused(self) -> FusedLayer:
        """Lay the weights out for rows that arrive one at a time; later changes are not seen."""
        heads = self._settings.num_heads
        states = None if self._ddsr is None else self._ddsr.fused()
        u, v, q, k = self._uvqk.split(self._widths, dim=1)
        columns = [u, q, side_by_side(k, v, heads), q[:, :0], q[:, :0]]
        if states is not None:
            columns[3] = states.query
            if self._settings.state_from == "input":
                columns[4] = states.memory
        bias = self._rel_attn_bias
        return FusedLayer(
            settings=self._settings,
            projection=torch.cat(columns, dim=1),
            widths=[x.shape[1] for x in columns],
            states=states,
            bias_tables=None if bias is None else bias.tables,
            combine=self.combine,
        )

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return normed (..., K) and gates u, values v, queries q, keys k (..., H d)."""
        normed = layer_norm(x, x.shape[-1:], eps=EPS)
        return normed, *self._activated(normed @ self._uvqk).split(self._widths, dim=-1)

    def _products(self, normed: Tensor, *weights: Tensor) -> Sequence[Tensor]:
        """Project rows by some columns of the weights, in one product: (n, K) -> (n, W) each."""
        projected = self._activated(normed @ torch.cat(weights, dim=1))
        return projected.split([part.shape[1] for part in weights], dim=1)

    def _activated(self, projected: Tensor) -> Tensor:
        return silu(projected) if self._settings.linear_activation == "silu" else projected

    def normalise(self, attended: Tensor) -> Tensor:
        """Normalise what all heads read: (..., H dv) -> (..., H dv)."""
        return layer_norm(attended, attended.shape[-1:], eps=EPS)

    def state(self, normed: Tensor, attended: Tensor) -> Tensor:
        """Return what a token writes as its domain's state: (..., K)."""
        return normed if self._settings.state_from == "input" else attended

    def combine(self, x: Tensor, u: Tensor, attended: Tensor, answer: Tensor | None) -> Tensor:
        """Gate, project and add to the input.

        Args:
            x: (..., K) float, the layer's input.
            u: (..., H dv) float, gates.
            attended: (..., H dv) float, normalised.
            answer: (..., H dv) float, the domain states' answer, if there is one.

        Returns:
            (..., K) float.
        """
        s = self._settings
        after_gate: Tensor | None = None
        if answer is not None:
            if s.combine == "before_gate":
                attended = attended + answer
            else:
                after_gate = answer
        gated = torch.cat([u, attended, u * attended], dim=-1) if s.concat_ua else u * attended
        if after_gate is not None:
            gated = gated + after_gate
        return self._o(dropout(gated, rate=s.linear_dropout_rate, training=self.training)) + x

    def _by_view(self, x: Tensor, views: Sequence[View]) -> Sequence[Tensor]:
        """Split what heads have among the views: (n, H d) -> (n, h, d) of the h heads of each."""
        sizes = [view.heads.stop - view.heads.start for view in views]
        return x.unflatten(1, (self._settings.num_heads, -1)).split(sizes, dim=1)

    def _attend(
        self, q: Tensor, memory: Memory, rows: EncoderRows, views: Sequence[View]
    ) -> Tensor:
        """Let (Q, H dqk) queries attend to the memories of their views: (Q, H dv), normalised."""
        s = self._settings
        bias = None
        if self._rel_attn_bias is not None:
            bias = self._rel_attn_bias(rows.positions, rows.timestamps, rows.next_timestamps)
        outputs = []
        for number, (view, queries) in enumerate(zip(views, self._by_view(q, views))):
            read = [
                domain_attention(
                    queries,
                    *memory(number, grouping),
                    grouping,
                    norm_length=s.norm_length,
                    bias=bias,
                    normalization=s.normalization,
                    impl=s.impl,
                )
                for grouping in view.groupings
            ]
            outputs.append(sum(read[1:], start=read[0]))
        return self.normalise(torch.cat(outputs, dim=1).flatten(1))


class CrossDomainEncoder(nn.Module):
    """A stack of HSTU layers, which share what the rows of a batch read.

    Args:
        settings: sizes and switches.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        without_states = replace(settings, ddsr=False, ddsr_layers=())
        self._attention_layers = nn.ModuleList(
            _build_layer(settings if layer in settings.state_layers else without_states)
            for layer in range(settings.num_blocks)
        )
        self._settings = settings
        # SASRec's layers begin with a norm, so the last one's output lacks its own.
        is_sasrec = settings.layer == SASREC
        self._last_norm = nn.LayerNorm(settings.embedding_dim) if is_sasrec else nn.Identity()
        self._history_tokens: nn.Parameter | None = None
        if settings.history_tokens:
            tokens = torch.empty(settings.history_tokens, settings.embedding_dim)
            self._history_tokens = nn.Parameter(tokens.normal_(std=0.02))

    @property
    def layers(self) -> list[HSTULayer]:
        """Return the layers, first to last."""
        return cast(list[HSTULayer], list(self._attention_layers))

    @property
    def history_tokens(self) -> Tensor | None:
        """Return the input of history tokens, (K', K); None without them."""
        return self._history_tokens

    def take_parameters(self, layers: Iterable[nn.Module]) -> None:
        """Hold the parameters of HSTU layers, the very objects, in place of one's own.

        Args:
            layers: upstream's, of the same sizes and number.
        """
        for own, theirs in zip(self._attention_layers, layers):
            for name, parameter in theirs.named_parameters():
                path, _, leaf = name.rpartition(".")
                setattr(own.get_submodule(path), leaf, parameter)

    def forward(
        self,
        x: Tensor,
        events: Events,
        *,
        questions: Questions | None = None,
        caches: list[LayerCache] | None = None,
        asked: Tensor | None = None,
    ) -> Tensor:
        """Encode the events of a batch, and questions that are put to some of them.

        Args:
            x: (L + R, K) float, input of the L events, then of the R questions.
            events: of the batch.
            questions: events to be encoded once more, for another domain or time.
            caches: takes what each layer's rows leave behind for later ones, if given.
            asked: (Q,) int64, which of the L + R outputs are wanted, in any order; where it pays,
                layers compute no other rows than these need. None: all.

        Returns:
            (L + R, K) float, or (Q, K) of what is asked for.

        Raises:
            InputError: questions or rows that do not fit the batch, or the settings.
        """
        rows = EncoderRows(self._settings, events, questions)
        x = rows.lay_out(x, self._history_tokens)
        layers: list[nn.Module] = list(self._attention_layers)
        if asked is not None:
            check_asked(asked, rows.entry_targets.numel())
        # Whether a class of the user's can compute some rows alone is not known.
        if asked is None or isinstance(self._settings.layer, Part) or not pays(x, asked):
            x = rows.take_entries(self._through(layers, x, rows, caches))
            return self._last_norm(x if asked is None else x.index_select(0, asked))
        all_below = caches is not None
        wanted, places = AskedRows.of(rows, asked, len(layers) - 1, all_below=all_below)
        return self._last_norm(self._through(layers, x, rows, caches, wanted.of_layers()))[places]

    def _through(
        self,
        layers: Sequence[nn.Module],
        x: Tensor,
        rows: EncoderRows,
        caches: list[LayerCache] | None,
        plan: Sequence[AskedRows | None] = (),
    ) -> Tensor:
        """Take rows through the layers; of each those alone that a plan, if given, asks for."""
        for number, layer in enumerate(layers):
            some = {"asked": plan[number]} if plan else {}
            x = layer(x, rows, rows.views(number), caches=caches, **some)
        return x


def _build_layer(settings: EncoderSettings) -> nn.Module:
    """Build a layer, of the class that the settings name.

    Raises:
        InputError: the user's class makes something else.
    """
    if isinstance(settings.layer, Part):
        make = settings.layer.value
    else:
        make = SASRecLayer if settings.layer == SASREC else HSTULayer
    layer = make(settings)
    if not isinstance(layer, nn.Module):
        raise InputError(
            f"xd_encoder.layer = {settings.layer!r} makes a {type(layer).__name__}; a "
            "torch.nn.Module is needed"
        )
    return layer
