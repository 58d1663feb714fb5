"""Rebind the names that upstream's trainer looks up, so that its gin files can ask for hstu-xd."""

import logging
import os

from hstu_xd.errors import HstuXdError
from hstu_xd.plugins.gr.research.evaluation import domain_scoped
from hstu_xd.plugins.gr.research.factories import with_hstu_xd, with_stores
from hstu_xd.plugins.gr.research.features import with_domains
from hstu_xd.plugins.gr.research.negatives import in_batch_sampler, local_sampler
from hstu_xd.plugins.gr.research.verified import RESEARCH, VERIFIED_COMMITS, inspect_upstream
from hstu_xd.plugins.rebinding import Patch, Rebinding, apply

_logger = logging.getLogger(__name__)

TRAINER = f"{RESEARCH}.trainer.train"
OVERRIDE = "HSTU_XD_ALLOW_UNVERIFIED"

# Names as train_fn looks them up: in its own module, each time it runs.
REBINDINGS = (
    Rebinding(
        TRAINER,
        "get_reco_dataset",
        with_stores,
        ("dataset_name", "max_sequence_length", "chronological", "positional_sampling_ratio"),
    ),
    Rebinding(
        TRAINER,
        "get_sequential_encoder",
        with_hstu_xd,
        ("module_type", "embedding_module", "interaction_module", "input_preproc_module"),
    ),
    Rebinding(
        TRAINER,
        "movielens_seq_features_from_row",
        with_domains,
        ("row", "device", "max_output_length"),
    ),
    Rebinding(TRAINER, "LocalNegativesSampler", local_sampler, ("item_emb", "all_item_ids")),
    Rebinding(TRAINER, "InBatchNegativesSampler", in_batch_sampler, ("dedup_embeddings",)),
    Rebinding(
        TRAINER,
        "eval_metrics_v2_from_tensors",
        domain_scoped,
        ("eval_state", "model", "seq_features", "target_ids", "target_ratings", "dtype"),
    ),
)

_patch: Patch | None = None


def activate() -> Patch:
    """Rebind upstream's names; a second call changes nothing.

    Returns:
        The handle; its ``revert()`` puts the identical originals back.

    Raises:
        HstuXdError: an upstream that was not verified, unless the environment variable
            HSTU_XD_ALLOW_UNVERIFIED is 1.
    """
    global _patch
    if _patch is None or not _patch.originals:
        check_version()
        _patch = apply(REBINDINGS)
    return _patch


def check_version() -> None:
    """Refuse, or with the override warn about, an upstream that differs from the verified ones."""
    status = inspect_upstream()
    if not status.importable:
        raise HstuXdError(
            f"generative_recommenders is not importable ({status.error}); put its checkout on "
            "PYTHONPATH or run from inside it"
        )
    if status.verified:
        return
    text = (
        f"{status.path} (commit {status.commit or 'unknown'}) differs from the verified commits "
        f"{', '.join(VERIFIED_COMMITS)}: {'; '.join(status.problems)}"
    )
    if os.environ.get(OVERRIDE) != "1":
        raise HstuXdError(f"{text}. Check out a verified one, or set {OVERRIDE}=1 to go on anyway")
    _logger.warning("%s; going on because %s=1", text, OVERRIDE)
