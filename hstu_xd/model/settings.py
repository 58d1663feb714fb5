"""Every setting of the encoder, declared once; names, keys and warnings are derived from here."""

from dataclasses import dataclass
from functools import cached_property

from hstu_xd.declaration import check, requirements, setting, settings_of
from hstu_xd.errors import InputError
from hstu_xd.parts import Part

# The value of ``layer`` for SASRec's.
SASREC = "sasrec"


@dataclass(frozen=True)
class EncoderSettings:
    """Sizes and switches. All switches False and 0 heads in the target view: plain HSTU.

    Attributes:
        num_domains: number of domains ``D``.
        norm_length: the padded length ``N`` that scores are divided by and positions run up to;
            upstream's ``max_sequence_length + max_output_length``.
        embedding_dim: model width ``K``.
        num_blocks: number of layers.
        num_heads: number of attention heads ``H``.
        dqk: width of each head's queries and keys.
        dv: width of each head's values.
        linear_dropout_rate: dropout before each layer's output projection.
        linear_activation: activation after the input projection, "silu" or "none".
        concat_ua: feed the output projection with gate, attention and their product.
        enable_relative_attention_bias: add a bias for relative positions and times to the scores.
        domain_mask: attend inside the domain only.
        target_view_heads: number of heads that read the target domain's run; 0: none does.
        tape: tell the input of a switch to another domain (transition-aware positional embedding).
        ddsr: let every event read the latest states of all domains (dynamic domain states).
        ddsr_layers: layers, counted from 0, that have DDSR, the last one -1; none named: all of
            them.
        target_domain_embedding: add a plain embedding of the target domain to the input.
        full_attention_layers: layers, counted from 0, that keep full attention under domain_mask,
            the last one -1.
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
        segment_length: events of a segment that is cut by "count".
        segment_gap: pause that ends a segment, in the log's unit of time.
        segment_lookback: segments of the run before an event's own that it reads all the same.
        history_tokens: learnable tokens ``K`` that stand for a segment from then on; 0: nothing
            does.
        normalization: how attention scores become weights, by "silu" as in HSTU or by "softmax".
        impl: implementation of the attention, see :func:`hstu_xd.ops.available_impls`; "auto" takes
            the fused kernels, or on a CPU the loops in C, where they hold; "triton" and "native"
            insist on them.
        layer: "hstu", "sasrec" (needs normalization "softmax", and knows neither relative bias nor
            DDSR), or a class of your own in its place, ``@MyLayer``: built and called as
            :class:`hstu_xd.model.encoder.HSTULayer` is.

    Raises:
        InputError: a value outside its range; the message names it.
    """

    num_domains: int = setting(at_least=1, from_data=True)
    norm_length: int = setting(at_least=1, from_data=True)
    embedding_dim: int = setting(64, at_least=1, from_data=True)
    num_blocks: int = setting(2, at_least=1, upstream=True, also=("layers", "num_layers", "depth"))
    num_heads: int = setting(4, at_least=1, upstream=True)
    dqk: int = setting(32, at_least=1, upstream=True, also=("attention_dim",))
    dv: int = setting(32, at_least=1, upstream=True, also=("linear_dim", "hidden_dim"))
    linear_dropout_rate: float = setting(
        0.5, at_least=0, below=1, upstream=True, also=("dropout", "hidden_dropout_prob")
    )
    linear_activation: str = setting("silu", allowed=("silu", "none"), upstream=True)
    concat_ua: bool = setting(False, upstream=True, tag="concat_ua")
    enable_relative_attention_bias: bool = setting(
        True, upstream=True, reads="time", also=("rab", "relative_bias")
    )
    domain_mask: bool = setting(False, per_domain=True, around_llm=True, tag="mask")
    target_view_heads: int = setting(
        0,
        per_domain=True,
        reads="target_domain",
        tag="view{target_view_heads}",
        # Two of four heads are what the recipes say; their runs keep the name they have had.
        label={2: "target view", ...: "target view of {target_view_heads}"},
    )
    tape: bool = setting(
        False, per_domain=True, around_llm=True, reads="target_domain", tag="tape", label="TAPE"
    )
    ddsr: bool = setting(
        False, per_domain=True, around_llm=True, tag="ddsr{states_per_domain}", label="DDSR"
    )
    ddsr_layers: tuple[int, ...] = setting(
        (), needs={"ddsr": True}, label="DDSR in layers {ddsr_layers}"
    )
    target_domain_embedding: bool = setting(
        False,
        per_domain=True,
        around_llm=True,
        reads="target_domain",
        tag="target",
        label="target-domain embedding",
    )
    full_attention_layers: tuple[int, ...] = setting(
        (), needs={"domain_mask": True}, around_llm=True
    )
    state_from: str = setting("input", allowed=("input", "output"), needs={"ddsr": True})
    combine: str = setting(
        "before_gate", allowed=("before_gate", "after_gate"), needs={"ddsr": True}
    )
    query_target_domain: bool = setting(
        True, needs={"ddsr": True}, around_llm=True, reads="target_domain"
    )
    states_per_domain: int = setting(4, at_least=1, needs={"ddsr": True}, around_llm=True)
    state_age_bias: bool = setting(True, needs={"ddsr": True}, around_llm=True, reads="time")
    segment_by: str = setting(
        "none",
        allowed=("none", "count", "time_gap", "session"),
        reads={"time_gap": "time", "session": "time"},
        tag={
            "count": "count{segment_length}-tokens{history_tokens}",
            "time_gap": "time_gap{segment_gap}-tokens{history_tokens}",
            "session": "session{segment_gap}-tokens{history_tokens}",
        },
    )
    segment_length: int = setting(64, at_least=1, needs={"segment_by": "count"})
    segment_gap: int = setting(86_400, at_least=0, needs={"segment_by": ("time_gap", "session")})
    segment_lookback: int = setting(0, at_least=0, tag="lookback{segment_lookback}")
    history_tokens: int = setting(0, at_least=0, also=("tokens",))
    normalization: str = setting("silu", allowed=("silu", "softmax"), tag="{normalization}")
    impl: str = setting("auto", same_model=True, also=("backend", "implementation"))
    layer: str = setting(
        "hstu", part=True, tag="layer {layer}", label={SASREC: "SASRec", ...: "layer {layer}"}
    )

    def __post_init__(self) -> None:
        check(self, "{name} is {value!r}; {needed} is needed")
        if self.layer not in ("hstu", SASREC) and not isinstance(self.layer, Part):
            raise InputError(
                f"layer is {self.layer!r}; 'hstu', '{SASREC}', or a reference to a class of your "
                "own is needed: xd_encoder.layer = @MyLayer"
            )
        if self.layer == SASREC:
            self._check_sasrec()
        if not 0 <= self.target_view_heads <= self.num_heads:
            raise InputError(
                f"target_view_heads is {self.target_view_heads}; 0..num_heads={self.num_heads} "
                "heads can read the target domain"
            )
        for name in ("full_attention_layers", "ddsr_layers"):
            layers: tuple[int, ...] = getattr(self, name)
            outside = [i for i in layers if not -self.num_blocks <= i < self.num_blocks]
            if outside:
                raise InputError(
                    f"{name} names layer {outside[0]}; the layers are 0 to {self.num_blocks - 1}, "
                    f"or -{self.num_blocks} to -1 from the end"
                )
            # One name for a layer, whatever side it was counted from.
            object.__setattr__(self, name, tuple(i % self.num_blocks for i in layers))
        if self.combine == "after_gate" and self.concat_ua:
            raise InputError("combine='after_gate' needs concat_ua=False: the widths differ")
        if self.state_from == "output" and self.embedding_dim != self.num_heads * self.dv:
            raise InputError(
                "state_from='output' needs num_heads * dv = embedding_dim, got "
                f"{self.num_heads} * {self.dv} and {self.embedding_dim}"
            )

        self._check_segments()

    def _check_sasrec(self) -> None:
        for name, needed in (
            ("normalization", "softmax"),
            ("enable_relative_attention_bias", False),
            ("ddsr", False),
        ):
            if getattr(self, name) != needed:
                raise InputError(
                    f"layer = '{SASREC}' needs {name} = {needed!r}, got {getattr(self, name)!r}: "
                    "SASRec has no other"
                )

    def _check_segments(self) -> None:
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
    def state_layers(self) -> tuple[int, ...]:
        """The layers that have DDSR, in order; none where it is off."""
        if not self.ddsr:
            return ()
        return tuple(sorted({*self.ddsr_layers})) or tuple(range(self.num_blocks))

    @property
    def is_cross_domain(self) -> bool:
        """Whether anything is on that needs the domain of every item."""
        return any(getattr(self, name) for name in PER_DOMAIN)

    @property
    def is_plain(self) -> bool:
        """Whether this is HSTU as upstream computes it: every switch off, no ``impl`` asked for."""
        return all(
            getattr(self, name) == each.default
            for name, each in settings_of(type(self)).items()
            if each.is_own and not each.needs
        )

    @property
    def has_segments(self) -> bool:
        """Whether histories are cut into segments."""
        return self.segment_by != "none"

    @property
    def reads_target_domain(self) -> bool:
        """Whether the encoder needs to know the domain of the next event."""
        return "target_domain" in self._requirements

    @property
    def reads_time(self) -> bool:
        """Whether the encoder needs timestamps."""
        return "time" in self._requirements

    @cached_property
    def _requirements(self) -> frozenset[str]:
        return requirements(type(self), vars(self))


_DECLARED = settings_of(EncoderSettings)
# What makes another model of HSTU when it alone is set.
SWITCHES = tuple(name for name, each in _DECLARED.items() if each.is_switch)
# Those of them that need the domain of every item.
PER_DOMAIN = tuple(name for name, each in _DECLARED.items() if each.per_domain)
