"""Sizes and options of the decoder. Checked here, once; needs no flax."""

import dataclasses
from typing import Any, Literal

from ..arguments import check_soft_cap, check_window
from ..config import RingConfig
from ..layout import Layout, as_layout
from . import checks
from .placement import AxisNames, as_axes
from .rope_scaling import RopeConfig, RopeScaling, rope_scaling

ACTIVATIONS = ("silu", "gelu_tanh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What may differ from layer to layer of a decoder; its parameters have the same shapes in every layer.

    Attributes:
      local_window_size: None, w or (left, right), as in :class:`DecoderConfig`.
      rope: of these layers; None is the decoder's.
    """

    local_window_size: int | tuple[int | None, int | None] | None = None
    rope: RopeConfig | None = None

    def __post_init__(self) -> None:
        check_window(self.local_window_size, True)
        if isinstance(self.local_window_size, list):
            object.__setattr__(self, "local_window_size", tuple(self.local_window_size))
        if self.rope is not None and not isinstance(self.rope, RopeConfig):
            raise ValueError(f"rope must be a RopeConfig or None. Got {self.rope!r}.")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a Decoder.

    Attributes:
      vocab_size, num_layers, embed_dim, num_heads, num_kv_heads, head_dim, mlp_dim: sizes; num_heads a multiple of
        num_kv_heads, head_dim even.
      rope_theta: base of the rotary embedding, which turns the pairs (x_i, x_{i + H/2}) of a head, see
        :class:`ringjax.nnx.RingAttention`.
      rotary_dim: R, even: the first R features of a head turn; None is all of them.
      rope_scaling: LinearScaling, DynamicScaling, Llama3Scaling, YarnScaling or FrequencyDivisors; None is none.
      local_window_size: None, w or (left, right): a token attends to itself and to the w (left) tokens before it only.
      layer_pattern: kinds of layers, where they differ: layer i is of kind i modulo their number. Each gives its window
        and its RoPE; local_window_size is None then. Compile time grows with the number of kinds, not of layers.
      attention_scale: of the attention logits; None is 1 / sqrt(H).
      logits_soft_cap, output_soft_cap: cap tanh(x / cap) of the attention logits, and of the logits of the next token.
      qk_norm: RMSNorm with a learned scale on every query and key head, before RoPE.
      use_sinks: one learned logit per query head in the softmax's denominator.
      attention_bias: biases on the four projections of attention; "qkv": on all but the output's.
      mlp_bias: biases on the three projections of the MLP.
      post_norms: RMSNorms of what attention and MLP return too, before it is added to the stream.
      activation: of the MLP's gate, "silu" or "gelu_tanh" (GELU by its tanh approximation).
      embedding_scale: factor on the embeddings, not on the output projection.
      tie_embeddings: the output projection is the embedding table.
      norm_eps: of every RMSNorm.
      loss_chunk: tokens of one shard, of each sequence of the batch, whose logits exist at a time in the loss.
      remat: recompute layers in backward, all but what the ring returned.
      scan_layers: True, layers are stacked and scanned, and compile time does not grow with their number. False, each
        has arrays of its own and follows the one before: what is written token by token on a GPU reads them in place,
        where a loop copies each layer out of a stack. See :meth:`ringjax.nnx.Decoder.with_scan_layers`.
      dtype, param_dtype: of the computation and of the parameters, by name.
      axis_name: mesh axis of the sequence.
      batch_axis_name: mesh axis or axes of the batch.
      head_axis_name: mesh axis of heads, MLP width and vocabulary (tensor parallelism).
      layout: "contiguous", "zigzag", "striped" or a Layout object.
      num_shards: C, the number of shards for which the tokens are dealt; None is the number of devices on the ring. A
        ring of another number of devices raises, but one of a single device takes tokens in ring order of any C.
        Without a mesh a layout other than "contiguous" requires it: 1 for tokens in natural order.
      ring: tuning of the ring, the ``config`` of :func:`ringjax.ring_attention`.

    Raises:
      ValueError: for a field that is not what it must be, and for sizes that do not fit each other.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 10000.0
    local_window_size: int | tuple[int | None, int | None] | None = None
    logits_soft_cap: float | None = None
    output_soft_cap: float | None = None
    attention_scale: float | None = None
    rotary_dim: int | None = None
    rope_scaling: RopeScaling | None = None
    layer_pattern: tuple[LayerKind, ...] = ()
    qk_norm: bool = False
    use_sinks: bool = False
    attention_bias: bool | Literal["qkv"] = False
    mlp_bias: bool = False
    post_norms: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    loss_chunk: int = 512
    remat: bool = True
    scan_layers: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"
    axis_name: str = "sp"
    batch_axis_name: AxisNames = None
    head_axis_name: str | None = None
    layout: str | Layout = "zigzag"
    num_shards: int | None = None
    ring: RingConfig = RingConfig()

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {}
        for name in (
            "vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "loss_chunk",
        ):  # fmt: skip
            checked[name] = checks.positive_integer(name, getattr(self, name))
        for name in ("rope_theta", "norm_eps", "embedding_scale"):
            checked[name] = checks.positive_number(name, getattr(self, name))
        if self.output_soft_cap is not None:
            checked["output_soft_cap"] = checks.positive_number("output_soft_cap", self.output_soft_cap, " or None")
        if self.attention_scale is not None:
            checked["attention_scale"] = checks.finite_number("attention_scale", self.attention_scale, " or None")
        checked["attention_bias"] = checks.bias("attention_bias", self.attention_bias)
        checks.one_of("activation", self.activation, ACTIVATIONS)
        for name in ("tie_embeddings", "remat", "scan_layers", "qk_norm", "use_sinks", "mlp_bias", "post_norms"):
            checks.flag(name, getattr(self, name))
        for name in ("dtype", "param_dtype"):
            checks.one_of(name, getattr(self, name), checks.FLOATS)
        checked["axis_name"] = checks.required_axes("axis_name", self.axis_name)
        for name in ("batch_axis_name", "head_axis_name"):
            checked[name] = checks.axes(name, getattr(self, name))
        if self.num_shards is not None:
            checked["num_shards"] = checks.positive_integer("num_shards", self.num_shards)
        checked["logits_soft_cap"] = check_soft_cap(self.logits_soft_cap)
        check_window(self.local_window_size, True)
        if isinstance(self.local_window_size, list):  # of a file; a config must be hashable
            checked["local_window_size"] = tuple(self.local_window_size)
        as_layout(self.layout)
        checks.ring_config("ring", self.ring)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads. Got num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE turns pairs). Got {self.head_dim}.")
        checks.rotary_dim("rotary_dim", self.rotary_dim, self.head_dim)
        rope_scaling("rope_scaling", self.rope_scaling)
        self._check_pattern()
        axes = [*as_axes(self.batch_axis_name), *as_axes(self.axis_name), *as_axes(self.head_axis_name)]
        if len(set(axes)) != len(axes):
            raise ValueError(f"axis_name, batch_axis_name and head_axis_name must name different axes. Got {axes}.")

    def _check_pattern(self) -> None:
        given = self.layer_pattern
        if not isinstance(given, (tuple, list)) or not all(isinstance(kind, LayerKind) for kind in given):
            raise ValueError(f"layer_pattern must be a tuple of LayerKinds. Got {given!r}.")
        object.__setattr__(self, "layer_pattern", tuple(given))
        if given and self.local_window_size is not None:
            raise ValueError(
                "local_window_size must be None where layer_pattern is given: its kinds name their windows. "
                f"Got {self.local_window_size!r}."
            )
        for kind in given:
            if kind.rope is not None:
                checks.rotary_dim("layer_pattern: rotary_dim", kind.rope.rotary_dim, self.head_dim)

    @property
    def num_stacked(self) -> int:
        """Periods whose layers are stacked."""
        return self.num_layers // len(self.period) if self.scan_layers else 0

    @property
    def period(self) -> tuple[tuple[int | tuple[int | None, int | None] | None, RopeConfig], ...]:
        """(local_window_size, RoPE) of the layers of one period of the pattern, one layer where there is no pattern."""
        rope = RopeConfig(theta=self.rope_theta, rotary_dim=self.rotary_dim, scaling=self.rope_scaling)
        if not self.layer_pattern:
            return ((self.local_window_size, rope),)
        return tuple((kind.local_window_size, kind.rope or rope) for kind in self.layer_pattern[: self.num_layers])
