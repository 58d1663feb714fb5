"""The stand-alone model: item table, input features, encoder, normalised user vectors.

It continues from a trained HSTU by :func:`load_hstu`: the checkpoint's parameters are found under
upstream's names, and this package's own start as they start.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hstu_xd.batch import JaggedBatch, Questions
from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.model.encoder import CrossDomainEncoder
from hstu_xd.model.featured_items import FeaturedItemEmbedding, FeatureTable
from hstu_xd.model.fused_layer import LayerCache
from hstu_xd.model.inputs import (
    ItemEmbedding,
    PositionalInput,
    next_domain_modules,
    next_domain_signal,
)
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.model.views import EncoderRows, Events

# A buffer of upstream's HSTU that every model of its size computes anew.
_ATTENTION_MASK = "_attn_mask"
# Modules and parameters that HSTU does not have.
_OURS = {"_tape", "_target_domain_emb", "_ddsr", "_history_tokens"}


def load_hstu(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Load a checkpoint of upstream's HSTU into a cross-domain model.

    Args:
        model: :class:`hstu_xd.model.hstu.CrossDomainHSTU` or the plug-in's ``HSTU_XD``; its
            additions start at zero, so it computes what the checkpoint's model computed.
        state: the checkpoint's state dict; DDP's ``module.`` prefix is allowed.

    Returns:
        Names of the parameters that the checkpoint does not have: this package's alone.

    Raises:
        InputError: sizes differ, a parameter of HSTU is missing, or unknown ones remain.
    """
    own = model.state_dict()
    given = {name.removeprefix("module."): value for name, value in state.items()}
    given.pop(_ATTENTION_MASK, None)
    unknown = sorted(set(given) - set(own))
    absent = sorted(set(own) - set(given) - {_ATTENTION_MASK})
    ours = [name for name in absent if is_cross_domain(name)]
    missing = [name for name in absent if not is_cross_domain(name)]
    if unknown or missing:
        raise InputError(
            f"not a checkpoint of this HSTU: unknown {unknown[:3]}, missing {missing[:3]}; "
            "give the model the checkpoint's num_blocks and bias settings"
        )
    for name, value in given.items():
        if value.shape != own[name].shape:
            raise InputError(
                f"{name} has shape {tuple(value.shape)} in the checkpoint and "
                f"{tuple(own[name].shape)} here; give the model the checkpoint's sizes"
            )
    model.load_state_dict(given, strict=False)
    return ours


def is_cross_domain(name: str) -> bool:
    """Whether a parameter is one that this package adds to HSTU."""
    return not _OURS.isdisjoint(name.split("."))


_L2_EPS = 1e-6


class _UnitVectors(Function):
    """``x / max(|x|, eps)`` over the last dimension.

    It is ``torch.nn.functional.normalize``, to the bit; the gradient takes half of the passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Divide (..., K) vectors by their lengths."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(_L2_EPS)
        unit = x / length
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """Take away what lies along the vector, unless it is too short to be made a unit."""
        unit, length = ctx.saved_tensors
        along = (unit / length).mul_(grad).sum(-1, keepdim=True).mul_(length > _L2_EPS)
        return (grad / length).sub_(unit * along)


class CrossDomainHSTU(nn.Module):
    """HSTU with domain mask, target view, TAPE and DDSR, each behind its switch.

    With every switch off it is upstream's research HSTU, and upstream's parameter names load into
    it (see :meth:`load_hstu`).

    Args:
        catalog: item -> domain table.
        settings: sizes and switches of the encoder.
        dropout_rate: dropout on the input features.
        window: most events of a history, those of a run's window: later positions, for
            which the model has room, were never trained; default: ``settings.norm_length``.
        features: of the items, which their vectors are made of beside their rows; None: of none.
        row_dropout: share of the items' rows that are dropped in training beside features.

    Example:
        >>> catalog = DomainCatalog(torch.tensor([0, 0, 0, 1, 1]), ["books", "films"])
        >>> settings = EncoderSettings(num_domains=2, norm_length=8, domain_mask=True, ddsr=True)
        >>> model = CrossDomainHSTU(catalog, settings).eval()
        >>> items = torch.tensor([[1, 3, 2], [4, 0, 0]])
        >>> times = torch.tensor([[5, 6, 9], [7, 0, 0]])
        >>> model.encode(items, times, torch.tensor([1, 0])).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        catalog: DomainCatalog,
        settings: EncoderSettings,
        *,
        dropout_rate: float = 0.2,
        window: int | None = None,
        features: FeatureTable | None = None,
        row_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if settings.num_domains != catalog.num_domains:
            raise InputError(
                f"settings.num_domains is {settings.num_domains}, the catalogue has "
                f"{catalog.num_domains} domains; give both the same"
            )
        width = settings.embedding_dim
        self.catalog = catalog
        self.settings = settings
        self.window = settings.norm_length if window is None else window
        self._embedding_module: ItemEmbedding = (
            ItemEmbedding(catalog.num_items, width)
            if features is None
            else FeaturedItemEmbedding(catalog.num_items, width, features, row_dropout)
        )
        self._input_features_preproc = PositionalInput(settings.norm_length, width, dropout_rate)
        self._hstu = CrossDomainEncoder(settings)
        self._tape, self._target_domain_emb = next_domain_modules(settings)

    def forward(
        self,
        batch: JaggedBatch,
        *,
        questions: Questions | None = None,
        caches: list[LayerCache] | None = None,
        asked: Tensor | None = None,
    ) -> Tensor:
        """Encode every token of a jagged batch, and questions that are put to some of them.

        Args:
            batch: histories; no longer than the model's window each.
            questions: tokens to be encoded once more, for another domain or time.
            caches: takes what each layer's rows leave behind for later ones, if given.
            asked: (Q,) int64, which of the L + R vectors are wanted, in any order; of many rows on
                a CPU no more is computed than these need. None: all.

        Returns:
            (L + R, K) float, unit vectors: what each token says of its next event, then what each
            question is answered; R is 0 without questions. Or (Q, K), what is asked for.

        Raises:
            InputError: a history longer than that (checked on CPU, where it costs no wait, and not
                in compiled code), or questions or rows that do not fit.
        """
        on_cpu = batch.offsets.device.type == "cpu"
        # What padding is kept is longer than the history in it.
        if on_cpu and batch.padded_length is None and not torch.compiler.is_compiling():
            self._check_lengths(batch.offsets.diff())
        rows = self.rows(batch, questions)
        item_ids, positions = batch.item_ids, rows.events.positions
        if questions is not None:
            item_ids, positions = (torch.cat([x, x[questions.rows]]) for x in (item_ids, positions))
        extra = next_domain_signal(
            self._tape, self._target_domain_emb, rows.entry_domains, rows.entry_targets
        )
        x = self.embed(item_ids, positions, extra)
        x = self._hstu(x, rows.events, questions=questions, caches=caches, asked=asked)
        return self.unit_vectors(x)

    @property
    def item_table(self) -> ItemEmbedding:
        """Return the table of items, which ranks as well as it feeds the input."""
        return self._embedding_module

    @property
    def item_features(self) -> FeatureTable | None:
        """Return what item vectors are made of beside their rows."""
        table = self._embedding_module
        return table.table if isinstance(table, FeaturedItemEmbedding) else None

    @property
    def met_items(self) -> Tensor | None:
        """(I + 1,) bool, which items training meets; None where all are taken alike."""
        table = self._embedding_module
        return table.is_met if isinstance(table, FeaturedItemEmbedding) else None

    @property
    def encoder(self) -> CrossDomainEncoder:
        """Return the layers."""
        return self._hstu

    def embed(self, item_ids: Tensor, positions: Tensor, signal: Tensor | None) -> Tensor:
        """Make the encoder's input.

        Args:
            item_ids: (L,) int64.
            positions: (L,) int64, in the user's history.
            signal: (L, K) float, what the input is told of the next domain, if anything.

        Returns:
            (L, K) float.
        """
        return self._input_features_preproc(self._embedding_module(item_ids), positions, signal)

    def unit_vectors(self, encoded: Tensor) -> Tensor:
        """Make vectors of users or items units: (..., K) float -> (..., K) float32."""
        return _UnitVectors.apply(encoded.float())

    def next_domain_factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the signal of the next domain is made of, zeros where a switch is off.

        Returns:
            Three (D, K) float: the first by domain left times the second by domain entered is said
            of a switch, the third of every target domain.
        """
        nothing = torch.zeros(self.settings.num_domains, self.settings.embedding_dim)
        left, entered = (nothing, nothing) if self._tape is None else self._tape.factors()
        embedding = self._target_domain_emb
        return left, entered, nothing if embedding is None else embedding.weight

    def rows(self, batch: JaggedBatch, questions: Questions | None = None) -> EncoderRows:
        """Return the rows that a batch and questions make, and what each of them reads."""
        domains = self.catalog.domain_of(batch.item_ids)
        if batch.padded_length is not None:
            domains = domains.clamp(min=0)  # padding is later than all that is read
        events = Events(
            domains=domains,
            target_domains=batch.target_domains,
            timestamps=batch.timestamps,
            next_timestamps=batch.next_timestamps,
            offsets=batch.offsets,
            padded_length=batch.padded_length,
        )
        return EncoderRows(self.settings, events, questions)

    def item_vectors(self, item_ids: Tensor) -> Tensor:
        """Return unit vectors of items: (...) int64 -> (..., K) float."""
        return self.unit_vectors(self._embedding_module(item_ids))

    def encode(
        self,
        item_ids: Tensor,
        timestamps: Tensor,
        target_domains: Tensor,
        request_timestamps: Tensor | None = None,
    ) -> Tensor:
        """Return user vectors for one requested domain each.

        Args:
            item_ids: (B, N) int64, oldest first, padded with 0 at the end; at most the model's
                window of events a row.
            timestamps: (B, N) int64, in the log's unit, never falling from event to event; what
                stands at padding is ignored.
            target_domains: (B,) int64, the domain to recommend from.
            request_timestamps: (B,) int64, time of the request, not before the last event; default:
                that of the last event.

        Returns:
            (B, K) float, unit vectors: score items by the dot product with ``item_vectors``.

        Raises:
            InputError: shapes that do not fit, an empty history or one that is longer than the
                window, ids out of range, padding before items, or times that are out of order.
        """
        self._check_request(item_ids, timestamps, target_domains, request_timestamps)
        following = self._following(item_ids, timestamps, target_domains, request_timestamps)
        batch = JaggedBatch.from_padded(item_ids, timestamps, *following)
        return self(batch, asked=batch.offsets[1:] - 1)

    def encode_padded(
        self,
        item_ids: Tensor,
        timestamps: Tensor,
        target_domains: Tensor,
        request_timestamps: Tensor | None = None,
    ) -> Tensor:
        """Compute :meth:`encode` by steps whose sizes follow from shapes alone: what is exported.

        Nothing is checked, and the padding is encoded with the rest.

        Args:
            item_ids: (B, N) int64, oldest first, padded with 0 at the end.
            timestamps: (B, N) int64, in the log's unit.
            target_domains: (B,) int64, the domain to recommend from.
            request_timestamps: (B,) int64, time of the request; default: that of the last event.

        Returns:
            (B, K) float, unit vectors; zeros for a row without events.
        """
        following = self._following(item_ids, timestamps, target_domains, request_timestamps)
        batch = JaggedBatch.with_padding(item_ids, timestamps, *following)
        lengths = (item_ids != 0).sum(1)
        vectors = self(batch)[batch.offsets[:-1] + (lengths - 1).clamp(min=0)]
        return vectors * (lengths > 0).unsqueeze(1)

    def _following(
        self,
        item_ids: Tensor,
        timestamps: Tensor,
        target_domains: Tensor,
        request_timestamps: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return (B,) times of the requests and (B, N) domains of the events after each one."""
        last = ((item_ids != 0).sum(1) - 1).clamp(min=0).unsqueeze(1)
        if request_timestamps is None:
            request_timestamps = timestamps.gather(1, last).squeeze(1)
        next_domains = self.catalog.domain_of(item_ids).roll(-1, 1)
        return request_timestamps, next_domains.scatter(1, last, target_domains.unsqueeze(1))

    def _check_lengths(self, lengths: Tensor) -> None:
        longest = max(lengths.tolist(), default=0)
        if longest > self.window:
            raise InputError(
                f"a history of {longest} events exceeds the model's window of {self.window}; pass "
                f"the latest {self.window}"
            )

    def _check_request(
        self,
        item_ids: Tensor,
        timestamps: Tensor,
        target_domains: Tensor,
        request_timestamps: Tensor | None,
    ) -> None:
        if item_ids.ndim != 2 or timestamps.shape != item_ids.shape:
            raise InputError(
                f"item_ids {tuple(item_ids.shape)} and timestamps {tuple(timestamps.shape)} must "
                "both be (B, N)"
            )
        users, columns = item_ids.shape
        given = {"item_ids": item_ids, "timestamps": timestamps, "target_domains": target_domains}
        if request_timestamps is not None:
            given["request_timestamps"] = request_timestamps
        for name, tensor in given.items():
            if name in ("target_domains", "request_timestamps") and tensor.shape != (users,):
                raise InputError(
                    f"{name} has shape {tuple(tensor.shape)}; ({users},) is needed, one a user"
                )
            if tensor.dtype != torch.int64:
                raise InputError(f"{name} is {tensor.dtype}; torch.int64 is needed: {name}.long()")
        if users and not columns:
            raise InputError("item_ids has no columns; at least one event a user is needed")
        for name, ids, bound in (
            ("item_ids", item_ids, self.catalog.num_items + 1),
            ("target_domains", target_domains, self.catalog.num_domains),
        ):
            if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= bound):
                raise InputError(
                    f"{name} holds ids {int(ids.min())}..{int(ids.max())}; 0..{bound - 1} are known"
                )
        empty = (item_ids == 0).all(1)
        if bool(empty.any()):
            row = int(empty.nonzero()[0])
            raise InputError(f"item_ids row {row} is empty; at least one event is needed")
        self._check_lengths((item_ids != 0).sum(1))
        _check_times(item_ids != 0, timestamps, request_timestamps)

    def load_hstu(self, state: dict[str, Tensor]) -> list[str]:
        """Load a checkpoint of upstream's HSTU (DDP's ``module.`` prefix allowed).

        Args:
            state: its state dict.

        Returns:
            Names of this model's parameters that the checkpoint does not have: ours alone.

        Raises:
            InputError: sizes differ, a parameter of HSTU is missing, or unknown ones remain.
        """
        return load_hstu(self, state)


def _check_times(present: Tensor, timestamps: Tensor, request_timestamps: Tensor | None) -> None:
    """Refuse events that are not in the order of their times, and requests before the last event.

    Args:
        present: (B, N) bool, where events are.
        timestamps: (B, N) int64.
        request_timestamps: (B,) int64, if given.
    """
    falls = (timestamps[:, 1:] < timestamps[:, :-1]) & present[:, 1:] & present[:, :-1]
    if bool(falls.any()):
        row, column = falls.nonzero()[0].tolist()
        before, after = timestamps[row, column : column + 2].tolist()
        raise InputError(
            f"timestamps row {row} falls from {before} to {after} at column {column + 1}; give the "
            "events oldest first"
        )
    if request_timestamps is None:
        return
    last = timestamps.gather(1, (present.sum(1, keepdim=True) - 1).clamp(min=0)).squeeze(1)
    early = request_timestamps < last
    if bool(early.any()):
        row = int(early.nonzero()[0])
        raise InputError(
            f"request_timestamps row {row} is {int(request_timestamps[row])}, before the last "
            f"event at {int(last[row])}; ask for a later time, or leave them out"
        )
