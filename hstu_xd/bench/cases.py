"""Cases: the sizes of one row of a benchmark, the batch drawn for them, and the preset of cases.

The preset (``--sweep``) changes one size at a time around a base, so that a curve has one cause.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hstu_xd.errors import InputError
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.ops.grouping import DomainGrouping

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTERLEAVINGS = ("random", "blocks")
PLANS = ("each", "once")

# About half a day: buckets of short and of long times both occur.
_MEAN_PAUSE_SECONDS = 40_000


@dataclass(frozen=True)
class Case:
    """Sizes of one row; all users have ``seq_len`` events.

    Attributes:
        what: name of the benchmark: "encoder" (a stack of layers), "attention" (the operator
            alone), "train-step", "serving" or "service".
        seq_len: number of events of a user ``N``.
        num_domains: number of domains ``D``; the domain mask is on where there are several.
        skew: 0 = balanced, else the share of domain 0; the others divide the rest evenly.
        batch_size: number of users ``B``.
        heads: number of heads ``H``.
        dqk: width of queries and keys in a head.
        dv: width of values in a head.
        width: width of the model ``K``; attention alone has none.
        layers: layers of the model; attention alone has one.
        device: "cpu" or "cuda".
        dtype: type of all numbers, a name of :data:`DTYPES`.
        interleaving: "random", or "blocks": every user visits one domain after the other.
        biased: use the relative bias of position and time, where a provider has one.
        plan: build groupings and block masks in "each" pass, or "once" before all of them, as the
            layers of a model share them.

    Raises:
        InputError: a size is below 1, a skew outside 0..1, a name unknown, or the device is not
            here.
    """

    what: str
    seq_len: int
    num_domains: int
    skew: float = 0.0
    batch_size: int = 8
    heads: int = 4
    dqk: int = 16
    dv: int = 16
    width: int = 64
    layers: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    interleaving: str = "random"
    biased: bool = True
    plan: str = "each"

    def __post_init__(self) -> None:
        for name in (
            "seq_len", "num_domains", "batch_size", "heads", "dqk", "dv", "width", "layers",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if not 0 <= self.skew <= 1:
            raise InputError(f"skew is {self.skew}; 0 (balanced) or the share of domain 0, up to 1")
        for name, known in (
            ("dtype", DTYPES), ("interleaving", INTERLEAVINGS), ("plan", PLANS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; one of {', '.join(known)}")
        if self.device != "cpu" and (self.device != "cuda" or not torch.cuda.is_available()):
            raise InputError(f"device is {self.device!r}; cpu, or cuda where PyTorch finds a GPU")

    @property
    def small(self) -> "Case":
        """The same case, small enough for the float64 reference."""
        return replace(self, seq_len=min(self.seq_len, 70), batch_size=min(self.batch_size, 3))

    @property
    def torch_dtype(self) -> torch.dtype:
        """PyTorch's name of ``dtype``."""
        return DTYPES[self.dtype]

    def encoder_settings(self, **switches: Any) -> EncoderSettings:
        """Return the settings of an encoder of these sizes, without dropout."""
        return EncoderSettings(
            num_domains=self.num_domains,
            norm_length=self.seq_len,
            embedding_dim=self.width,
            num_blocks=self.layers,
            num_heads=self.heads,
            dqk=self.dqk,
            dv=self.dv,
            linear_dropout_rate=0.0,
            **switches,
        )


@dataclass(frozen=True, eq=False)
class Draw:
    """The batch of a case, always the same for the same case.

    Attributes:
        case: the sizes.
        offsets: (B + 1,) int64.
        domains: (L,) int64.
        timestamps: (L,) int64, rising for each user.
        next_timestamps: (L,) int64; a user's last event is followed by a request at its own time.
    """

    case: Case
    offsets: Tensor
    domains: Tensor
    timestamps: Tensor
    next_timestamps: Tensor

    @classmethod
    def from_case(cls, case: Case) -> "Draw":
        """Draw the batch of a case."""
        generator = torch.Generator().manual_seed(case.seq_len + case.num_domains)
        shape = case.batch_size, case.seq_len
        share = torch.full((case.num_domains,), 1.0)
        if case.skew and case.num_domains > 1:
            share[0] = case.skew
            share[1:] = (1 - case.skew) / (case.num_domains - 1)
        domains = torch.multinomial(
            share, case.batch_size * case.seq_len, replacement=True, generator=generator
        )
        if case.interleaving == "blocks":
            domains = domains.view(shape).sort(1).values.flatten()
        pauses = torch.empty(shape).exponential_(1 / _MEAN_PAUSE_SECONDS, generator=generator)
        times = pauses.long().cumsum(1)
        next_times = torch.cat([times[:, 1:], times[:, -1:]], dim=1)
        lengths = torch.full((case.batch_size,), case.seq_len)
        offsets = pad(lengths.cumsum(0), (1, 0))
        tensors = offsets, domains, times.flatten(), next_times.flatten()
        return cls(case, *(x.to(case.device) for x in tensors))

    @property
    def num_tokens(self) -> int:
        """Tokens ``L`` of the batch."""
        return self.domains.numel()

    def normal(self, *shape: int, dtype: torch.dtype, seed: int) -> Tensor:
        """Draw unit-normal numbers that the case's own dtype holds exactly, as ``dtype``."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.empty(shape).normal_(generator=generator)
        return drawn.to(self.case.device, self.case.torch_dtype).to(dtype)

    def grouping(self, *, masked: bool) -> DomainGrouping:
        """Group the batch by user and domain, or (not ``masked``) by user."""
        if masked:
            return DomainGrouping.from_jagged(self.domains, self.offsets, self.case.num_domains)
        return DomainGrouping.single(self.offsets, self.num_tokens)


SEQ_LENS = (256, 512, 1024, 2048, 4096, 8192, 16384)
NUM_DOMAINS = (1, 2, 4, 8, 16, 32, 64)
SKEWS = (0.0, 0.4, 0.6, 0.8)


def sweep(case: Case) -> Iterator[Case]:
    """Yield the cases of the preset, each once; everything else is as in ``case``."""
    base = replace(case, seq_len=4096, num_domains=8)
    yield from dict.fromkeys(
        [
            *(replace(base, seq_len=n) for n in SEQ_LENS),
            *(replace(base, num_domains=d) for d in NUM_DOMAINS),
            *(replace(base, skew=s) for s in SKEWS),
            *(replace(base, interleaving=name) for name in INTERLEAVINGS),
        ]
    )
