"""What this package's models of REC share: sizes, domains, signals of the next one, requests."""

import json
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
from hstu_xd.plugins.bridge import CheckpointFormat, UnpaddedBatch
from hstu_xd.plugins.rec.rec_session import SESSION
from hstu_xd.plugins.rec.settings import RecSettings

_logger = logging.getLogger(__name__)

# The relative bias that REC's HSTU holds and never applies is left out where a model has none.
CHECKPOINTS = CheckpointFormat(
    host="REC's",
    entry="model",
    kept_in="a run's checkpoint_dir",
    setting="xd_warm_start",
    folder_hint=", of deepspeed's the one that its zero_to_fp32.py makes",
    weights_only=False,
    ignored="._rel_attn_bias.",
)


class CrossDomainMixin:
    """What a model that extends one of REC's inherits beside it.

    Names begin with ``_xd_``, for those of REC may change.

    The settings and the domains are those of the run in progress.
    """

    _xd_model: str  # its name, REC's key ``model``
    _xd_settings: RecSettings
    _xd_encoder_settings: EncoderSettings
    _xd_catalog: DomainCatalog | None
    _tape: nn.Module | None
    _target_domain_emb: nn.Embedding | None

    def _xd_configure(self) -> None:
        """Take the settings; nothing is added to the model yet."""
        self._xd_settings = SESSION.settings or RecSettings(self._xd_model)
        self._xd_is_plain = self._xd_settings.is_plain
        self._tape = None
        self._target_domain_emb = None

    def _xd_add_parts(self, sizes: Mapping[str, Any]) -> None:
        """Add the catalogue, and the modules that tell the input of the next domain, zero at first.

        Args:
            sizes: of :func:`hstu_sizes` or :func:`llm_sizes`.
        """
        known = SESSION.catalog
        self._xd_catalog = SESSION.new_catalog() if known else None
        settings = self._xd_settings.encoder_settings(sizes, known.num_domains if known else 1)
        self._xd_encoder_settings = settings
        self._tape, self._target_domain_emb = next_domain_modules(settings)

    def _xd_warm_start(self) -> None:
        """Take the parameters of ``xd_warm_start``, where it is given. This is to be called last.

        Raises:
            InputError: not a checkpoint, or one of another model or size.
        """
        if not self._xd_settings.warm_start:
            return
        assert isinstance(self, nn.Module)
        CHECKPOINTS.load_into(self, Path(self._xd_settings.warm_start))
        if self._xd_settings.relative_bias:
            _logger.warning(
                "xd_relative_bias: REC never applies the bias that its HSTU holds, so of such a "
                "checkpoint it is noise, and step 0 differs from it"
            )

    def _xd_domains_of(self, items: Tensor) -> Tensor:
        """Look up each item's domain; 0 where it has none, as random padding, or none is known."""
        if self._xd_catalog is None:
            return torch.zeros_like(items)
        return self._xd_catalog.item_domains[items].clamp(min=0)

    def _xd_unpadded(self, valid: Tensor, domains: Tensor, times: Tensor) -> UnpaddedBatch:
        """Cut the padding off.

        Args:
            valid: (B, N) bool.
            domains: (B, N + 1) int64, that of the event after the last included.
            times: (B, N + 1) int64, likewise.
        """
        return UnpaddedBatch.build(
            valid,
            domains=domains[:, :-1],
            next_domains=domains[:, 1:],
            times=times[:, :-1],
            next_times=times[:, 1:],
        )

    def _xd_signal(self, batch: UnpaddedBatch) -> Tensor | None:
        """Build what the input is told of the next domain: (L, K), None with those switches off."""
        events = batch.events
        return next_domain_signal(
            self._tape, self._target_domain_emb, events.domains, events.target_domains
        )

    def _xd_request(self, item_seq: Tensor, time_seq: Tensor) -> tuple[Tensor, Tensor]:
        """Split an evaluation's entries into domains and times of histories and of the request.

        Args:
            item_seq: (B, N) int64.
            time_seq: (B, N + 2) int64 of :func:`hstu_xd.plugins.rec.rec_metrics.with_request`.

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
                "domain, see hstu_xd.plugins.rec.rec_metrics.with_request"
            )
        domains = torch.cat([self._xd_domains_of(item_seq), time_seq[:, -1:]], dim=1)
        return domains, time_seq[:, :-1]


def hstu_sizes(config: Any) -> dict[str, Any]:
    """Read the sizes of REC's HSTU, under this package's names.

    Args:
        config: REC's configuration, or a mapping like it: None for a key that is not there.

    Raises:
        InputError: a size that is missing or no number.
    """
    width, heads = _size(config, "hstu_embedding_size"), _size(config, "n_heads")
    rate = config["hidden_dropout_prob"]
    if not isinstance(rate, int | float):
        raise InputError(
            f"hidden_dropout_prob: {rate!r}; a number is needed, IDNet/hstu.yaml has one"
        )
    return {
        "norm_length": _size(config, "MAX_ITEM_LIST_LENGTH"),
        "embedding_dim": width,
        "num_blocks": _size(config, "n_layers"),
        "num_heads": heads,
        "dqk": width // heads,
        "dv": width // heads,
        "linear_dropout_rate": rate,
        "linear_activation": config["hidden_act"] or "silu",
    }


def llm_sizes(llm: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Read the sizes of HLLM's user LLM, under this package's names.

    Args:
        llm: the LLM's own configuration: its config.json.
        config: REC's configuration, or a mapping like it: None for a key that is not there.

    Raises:
        InputError: MAX_ITEM_LIST_LENGTH is missing or no number.
    """
    width, heads = llm["hidden_size"], llm["num_attention_heads"]
    return {
        "norm_length": _size(config, "MAX_ITEM_LIST_LENGTH"),
        "embedding_dim": width,
        "num_blocks": llm["num_hidden_layers"],
        "num_heads": heads,
        "dqk": width // heads,
        "dv": width // heads,
    }


def _size(config: Any, name: str) -> int:
    value = config[name]
    if type(value) is not int or value < 1:
        raise InputError(
            f"{name}: {value!r}; a whole number from 1 on is needed; REC's own two files come "
            "first: overall/ID.yaml IDNet/hstu.yaml xd.yaml"
        )
    return value


def local_llm_config(pretrain_dir: str) -> dict[str, Any] | None:
    """Read the config.json of an LLM in a folder; None for a name that only a hub knows.

    Raises:
        InputError: a folder without it.
    """
    folder = Path(pretrain_dir)
    if not folder.is_dir():
        return None
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{folder}: no config.json here; give the folder of a pretrained LLM")
    return json.loads(file.read_text(encoding="utf-8"))
