"""Every setting of the encoder in one frozen place, checked once."""

from dataclasses import dataclass

from hstu_xd.errors import InputError
from hstu_xd.parts import Part


@dataclass(frozen=True)
class EncoderSettings:
    """Sizes and switches. All switches False and 0 heads in the target view: plain HSTU.

    Attributes:
        num_domains: number of domains ``D``.
        norm_length: the padded length ``N`` that scores are divided by and positions run up to;
            upstream's ``max_sequence_length + max_output_length``.
        embedding_dim: model width ``K``.
        num_blocks: layers.
        num_heads: heads ``H``.
        dqk: width of queries and keys a head.
        dv: width of values a head.
        linear_dropout_rate: dropout before each layer's output projection.
        linear_activation: "silu" or "none", after the input projection.
        concat_ua: feed the output projection with gate, attention and their product.
        enable_relative_attention_bias: relative position and time bias.
        domain_mask: attend inside the domain only.
        tape: transition-aware positional embedding.
        ddsr: dynamic domain states.
        target_domain_embedding: add a plain embedding of the target domain to the input.
        target_view_heads: heads that read the target domain's run.
        full_attention_layers: layers, counted from 0, that keep full attention under domain_mask.
        state_from: what a token writes as its domain's state, the layer's "input" or the
            attention's "output".
        combine: add DDSR's answer "before_gate" or "after_gate".
        query_target_domain: DDSR's query knows the target domain.
        states_per_domain: latest states that DDSR keeps per domain; the paper keeps one.
        state_age_bias: DDSR's scores know how old a state is.
        segment_by: where a run (a domain's events under domain_mask, else all of a user's) is cut
            into segments: "none", after "segment_length" events ("count"), where the run pauses
            longer than segment_gap ("time_gap"), or where the user does ("session"). Events of a
            segment are hidden once another one begins in the run.
        segment_length: events of a segment.
        segment_gap: pause, in the log's unit of time.
        segment_lookback: segments of the run before an event's own that it reads all the same.
        history_tokens: learnable tokens ``K`` that stand for a segment from then on; 0: nothing
            does.
        normalization: of the attention's scores, "silu" as in HSTU or "softmax".
        impl: implementation of the attention, see :func:`hstu_xd.ops.available_impls`.
        layer: "hstu", or a class of your own in its place, ``@MyLayer``: built and called as
            :class:`hstu_xd.model.encoder.HSTULayer` is.

    Raises:
        InputError: a value outside its range; the message names it.
    """

    num_domains: int
    norm_length: int
    embedding_dim: int = 64
    num_blocks: int = 2
    num_heads: int = 4
    dqk: int = 16
    dv: int = 16
    linear_dropout_rate: float = 0.4
    linear_activation: str = "silu"
    concat_ua: bool = False
    enable_relative_attention_bias: bool = True
    domain_mask: bool = False
    tape: bool = False
    ddsr: bool = False
    target_domain_embedding: bool = False
    target_view_heads: int = 0
    full_attention_layers: tuple[int, ...] = ()
    state_from: str = "input"
    combine: str = "before_gate"
    query_target_domain: bool = True
    states_per_domain: int = 4
    state_age_bias: bool = True
    segment_by: str = "none"
    segment_length: int = 64
    segment_gap: int = 86_400
    segment_lookback: int = 0
    history_tokens: int = 0
    normalization: str = "silu"
    impl: str = "auto"
    layer: str = "hstu"

    def __post_init__(self) -> None:
        if self.layer != "hstu" and not isinstance(self.layer, Part):
            raise InputError(
                f"layer is {self.layer!r}; 'hstu', or a reference to a class of your own is "
                "needed: xd_encoder.layer = @MyLayer"
            )
        for name in (
            "num_domains", "norm_length", "embedding_dim", "num_blocks", "num_heads", "dqk", "dv",
            "states_per_domain", "segment_length",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if not 0 <= self.target_view_heads <= self.num_heads:
            raise InputError(
                f"target_view_heads is {self.target_view_heads}; 0..num_heads={self.num_heads} "
                "heads can read the target domain"
            )
        if not 0 <= self.linear_dropout_rate < 1:
            raise InputError(f"linear_dropout_rate is {self.linear_dropout_rate}; 0 <= rate < 1")
        for name, allowed in (
            ("linear_activation", ("silu", "none")),
            ("state_from", ("input", "output")),
            ("combine", ("before_gate", "after_gate")),
            ("segment_by", ("none", "count", "time_gap", "session")),
            ("normalization", ("silu", "softmax")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; one of {', '.join(allowed)}")
        outside = [i for i in self.full_attention_layers if not 0 <= i < self.num_blocks]
        if outside:
            raise InputError(
                f"full_attention_layers names layer {outside[0]}; the last layer is "
                f"{self.num_blocks - 1}"
            )
        if self.combine == "after_gate" and self.concat_ua:
            raise InputError("combine='after_gate' needs concat_ua=False: the widths differ")
        if self.state_from == "output" and self.embedding_dim != self.num_heads * self.dv:
            raise InputError(
                "state_from='output' needs num_heads * dv = embedding_dim, got "
                f"{self.num_heads} * {self.dv} and {self.embedding_dim}"
            )

        self._check_segments()

    def _check_segments(self) -> None:
        for name in ("history_tokens", "segment_gap", "segment_lookback"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; 0 or more is needed")
        if self.segment_by == "none":
            for name in ("history_tokens", "segment_lookback"):
                if getattr(self, name):
                    raise InputError(
                        f"{name} is {getattr(self, name)} but segment_by is 'none'; say where "
                        "segments end: count, time_gap or session"
                    )
        elif self.full_attention_layers:
            raise InputError(
                "full_attention_layers cannot be cut into a domain's segments; drop it"
            )
        elif self.normalization != "silu":
            raise InputError(
                f"segment_by needs normalization='silu', got {self.normalization!r}: softmax of a "
                "segment and tokens is no sum of two"
            )
        elif self.target_view_heads and not self.domain_mask:
            raise InputError("target_view_heads with segment_by needs domain_mask=True")

    @property
    def is_cross_domain(self) -> bool:
        """Whether any switch is on; plain HSTU otherwise."""
        return bool(
            self.domain_mask
            or self.tape
            or self.ddsr
            or self.target_domain_embedding
            or self.target_view_heads
            or self.has_segments
        )

    @property
    def has_segments(self) -> bool:
        """Whether histories are cut into segments."""
        return self.segment_by != "none"

    @property
    def reads_target_domain(self) -> bool:
        """Whether the encoder needs to know the domain of the next event."""
        return bool(
            self.tape
            or self.target_domain_embedding
            or self.target_view_heads
            or (self.ddsr and self.query_target_domain)
        )

    @property
    def reads_time(self) -> bool:
        """Whether the encoder needs timestamps."""
        return (
            self.enable_relative_attention_bias
            or (self.ddsr and self.state_age_bias)
            or self.segment_by in ("time_gap", "session")
        )
