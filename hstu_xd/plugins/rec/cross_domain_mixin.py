"""What HSTU_XD and HLLM_XD share: domains, signals of the next one, an evaluation's request."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.model.inputs import next_domain_modules, next_domain_signal
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.plugins.rec.jagged import JaggedBatch
from hstu_xd.plugins.rec.session import SESSION
from hstu_xd.plugins.rec.settings import RecSettings
from hstu_xd.plugins.rec.warm_start import start_from

_logger = logging.getLogger(__name__)


class CrossDomainParts:
    """For a model of REC's to inherit beside it. Names begin with ``_xd_``, as REC's may change.

    The settings and the domains are those of the run in progress.
    """

    _xd_settings: RecSettings
    _xd_encoder_settings: EncoderSettings
    _xd_catalog: DomainCatalog | None
    _tape: nn.Module | None
    _target_domain_emb: nn.Embedding | None

    def _xd_configure(self, model: str) -> None:
        """Take the settings; nothing is added to the model yet."""
        self._xd_settings = SESSION.settings or RecSettings(model)
        self._xd_is_plain = self._xd_settings.is_plain
        self._tape = None
        self._target_domain_emb = None

    def _xd_add_parts(self, sizes: Mapping[str, Any]) -> None:
        """Add the catalogue and what tells the input of the next domain; it starts at zero.

        Args:
            sizes: of :mod:`hstu_xd.plugins.rec.sizes`.
        """
        known = SESSION.catalog
        self._xd_catalog = known and DomainCatalog(known.item_domains, known.domain_names)
        settings = self._xd_settings.encoder_settings(sizes, known.num_domains if known else 1)
        self._xd_encoder_settings = settings
        self._tape, self._target_domain_emb = next_domain_modules(settings)

    def _xd_warm_start(self) -> None:
        """Take the parameters of ``xd_warm_start``, where there is one; the last thing to do.

        Raises:
            InputError: not a checkpoint, or one of another model or size.
        """
        if not self._xd_settings.warm_start:
            return
        assert isinstance(self, nn.Module)
        start_from(self, Path(self._xd_settings.warm_start))
        if self._xd_settings.relative_bias:
            _logger.warning(
                "xd_relative_bias: REC never applies the bias that its HSTU holds, so of such a "
                "checkpoint it is noise, and step 0 differs from it"
            )

    def _xd_domains_of(self, items: Tensor) -> Tensor:
        """Domain of each item, 0 where it has none, as random padding may, or none is known."""
        if self._xd_catalog is None:
            return torch.zeros_like(items)
        return self._xd_catalog.item_domains[items].clamp(min=0)

    def _xd_jagged(self, valid: Tensor, domains: Tensor, times: Tensor) -> JaggedBatch:
        """See :meth:`JaggedBatch.of`."""
        return JaggedBatch.of(valid, domains, times)

    def _xd_signal(self, batch: JaggedBatch) -> Tensor | None:
        """What the input is told of the next domain: (L, K) float; None with those switches off."""
        events = batch.events
        return next_domain_signal(
            self._tape, self._target_domain_emb, events.domains, events.target_domains
        )

    def _xd_request(self, item_seq: Tensor, time_seq: Tensor) -> tuple[Tensor, Tensor]:
        """Domains and times of histories and of what is asked after them.

        Args:
            item_seq: (B, N) int64.
            time_seq: (B, N + 2) int64 of :func:`hstu_xd.plugins.rec.evaluation.with_request`.

        Returns:
            (B, N + 1) int64 each.

        Raises:
            InputError: a ``time_seq`` of another shape.
        """
        users, columns = item_seq.shape
        if time_seq.shape != (users, columns + 2):
            raise InputError(
                f"time_seq has shape {tuple(time_seq.shape)}; {type(self).__name__} needs "
                f"({users}, {columns + 2}): the history's times, the request's time and its "
                "domain, see hstu_xd.plugins.rec.evaluation.with_request"
            )
        domains = torch.cat([self._xd_domains_of(item_seq), time_seq[:, -1:]], dim=1)
        return domains, time_seq[:, :-1]
