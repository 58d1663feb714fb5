"""What was recorded, under which conditions, and how close a repetition has to come.

A processor with other instructions rounds otherwise, so equality to the bit is asked only where the
arithmetic is that of the recording; elsewhere a stated tolerance holds.
"""

import contextlib
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hstu_xd.cli.app import run as run_command

RECORDED = Path(__file__).parent / "recorded"
STORE = RECORDED / "store"
RUNS = RECORDED / "runs"
USER_FILES = RECORDED / "user_files"
EVENTS = RECORDED / "events.sqlite"
ANSWERS = RECORDED / "answers.json"
CONDITIONS = RECORDED / "conditions.json"
TRAINING = RECORDED / "training"

_SMALL = (
    "xd_encoder.num_heads = 2",
    "xd_encoder.dqk = 4",
    "xd_encoder.dv = 4",
    "xd_train.item_embedding_dim = 8",
    "xd_train.max_sequence_length = 24",
    "xd_train.local_batch_size = 16",
    "xd_train.num_negatives = 32",
    "xd_train.num_warmup_steps = 4",
    "xd_train.temperature = 0.05",
    "xd_train.average_decay = 0.0",
    "xd_encoder.linear_dropout_rate = 0.4",
    "xd_train.dropout_rate = 0.4",
    "xd_train.learning_rate = 3e-3",
    "xd_train.weight_decay = 1e-3",
)
_ALL = (
    "xd_encoder.domain_mask = True",
    "xd_encoder.target_view_heads = 1",
    "xd_encoder.tape = True",
    "xd_encoder.ddsr = True",
)
_TOKENS = (
    'xd_encoder.segment_by = "count"',
    "xd_encoder.segment_length = 4",
    "xd_encoder.history_tokens = 2",
    "xd_encoder.segment_lookback = 1",
)
# Recipe -> its bindings. Whatever they leave out has the default of the recording.
RECIPES: dict[str, tuple[str, ...]] = {
    "hstu": (),
    "mask": ("xd_encoder.domain_mask = True",),
    "all": _ALL,
    "all+tokens": (*_ALL, *_TOKENS),
    "softmax": ('xd_encoder.normalization = "softmax"',),
}
EPOCHS = 2
# The log that the recipes are trained on: steps enough to tell a change, few enough to be quick.
LOG = ("--users", "240", "--domains", "3", "--items-per-domain", "60", "--mean-length", "20")

# How far the losses of a repetition may be whose arithmetic rounds otherwise. Between AVX-512 and
# no vector instructions at all they differ by 2e-8 and no rank does; other makes and other versions
# of PyTorch get some room, a changed formula does not fit into it.
RELATIVE_LOSS = 1e-4


def bindings(recipe: str, *, epochs: int) -> tuple[str, ...]:
    """Return all gin bindings of a recipe."""
    return (*_SMALL, *RECIPES[recipe], f"xd_train.num_epochs = {epochs}")


def train_words(data: Path, out: Path, settings: Sequence[str]) -> list[str]:
    """Return the command line that trains with these bindings."""
    words = ["train", "--data", str(data), "--out", str(out)]
    return words + [word for one in settings for word in ("--gin_bindings", one)]


def ask(*words: str | Path) -> str:
    """Run one command in this process and return what it printed on stdout."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = run_command([str(word) for word in words])
    assert code == 0, f"hstu-xd {' '.join(map(str, words))}: exit code {code}"
    return printed.getvalue()


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def encode_input(users: int = 12, length: int = 20) -> tuple[torch.Tensor, ...]:
    """Return made-up histories of the small store's items: item ids, timestamps, target domains."""
    places = torch.arange(length)
    owners = torch.arange(users)[:, None]
    lengths = 1 + owners * 7 % length
    present = places < lengths
    items = (1 + (owners * 11 + places * 17) % 60) * present
    times = (1_600_000_000 + owners * 1_000 + places * (50_000 + 700 * owners)) * present
    return items, times, torch.arange(users) % 3


def conditions() -> dict[str, Any]:
    """Return what decides how this process rounds."""
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "arithmetic": _arithmetic(),
    }


def _arithmetic() -> str:
    """Return a hash of the bits that some operations of a training step give here.

    Libraries below PyTorch choose their kernels by the make of the processor, too, which its
    capability does not tell.
    """
    draws = torch.Generator().manual_seed(0)
    found = []
    for rows, inner, columns in ((7, 8, 32), (240, 8, 24), (333, 24, 60), (64, 100, 16)):
        left = torch.randn(rows, inner, generator=draws).requires_grad_()
        right = torch.randn(inner, columns, generator=draws).requires_grad_()
        normal = torch.nn.functional.layer_norm(left @ right, (columns,))
        scores = torch.nn.functional.silu(normal) + torch.log_softmax(normal, -1).exp()
        batched = torch.bmm(scores[None].expand(3, -1, -1), scores.T[None].expand(3, -1, -1))
        (batched / batched.norm()).logsumexp(-1).sum().backward()
        found += [batched.detach(), left.grad, right.grad]
    whole = hashlib.sha256()
    for tensor in found:
        whole.update(tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()


def difference_in_metrics(
    found: Mapping[str, Any], recorded: Mapping[str, Any], *, exact: bool, users: int
) -> str:
    """Return the first difference between two sets of metrics; empty where there is none.

    What version 0.1.0 recorded ranks a target that was met before among the unseen items. It is a
    miss today, which lowers the metrics of its groups by at most its share of their targets.

    Args:
        found: of the repetition.
        recorded: as it was.
        exact: whether every number has to be the same to the bit.
        users: where not exact, how many users of each group may have got another rank. A metric
            is a mean over a group's users of a value within 0..1, and a step function of scores,
            so rounding moves it by whole users or not at all: by at most ``users / count``.
    """
    missed = {
        k: v for k, v in found.items() if k.startswith("count_unreachable") and k not in recorded
    }
    # Means over domains, and what is said of tiny domains, came later.
    later = ("[macro]", "[nontrivial]")
    added = {k for k in found if k.startswith("count_trivial@") or k.endswith(later)}
    found = {k: v for k, v in found.items() if k in recorded or k not in missed.keys() | added}
    if list(found) != list(recorded):
        return f"other names or another order: {list(found)} for {list(recorded)}"
    for name, old in recorded.items():
        new = found[name]
        group = "".join(name.partition("[")[1:])
        lost = missed.get(f"count_unreachable{group}", 0)
        if lost and isinstance(old, float):
            moved = 0 if exact else users
            close = -moved <= (old - new) * recorded[f"count{group}"] <= lost + moved + 1e-9
        elif exact or not isinstance(old, float):
            close = new == old
        elif name == "loss":
            close = math.isclose(new, old, rel_tol=RELATIVE_LOSS)
        else:
            close = abs(new - old) <= users / recorded[f"count{group}"]
        if not close:
            return f"{name} is {new!r}, recorded was {old!r}"
    return ""
