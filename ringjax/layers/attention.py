"""The attention layer without a framework: its options, its parameters and its equation.

``ringjax.nnx`` and ``ringjax.linen`` only declare the parameters; everything they compute is here, so the two agree.
Letters: B batch, T length, E features, N query heads, K key/value heads, H head size.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ..arguments import check_scale, check_soft_cap, check_window
from ..cache import KVCache
from ..config import RingConfig
from . import checks
from .norm import Normed, products, rms_norm, spread
from .placement import BATCH, FSDP, SEQUENCE, TENSOR, Placement, Role
from .rope import Rotation, rotate, rotation
from .rope_scaling import RopeScaling, rope_scaling

Initializer = Callable[..., jax.Array]
LayerArrays = Mapping[str, Mapping[str, jax.Array]]  # of a layer, by part and name


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """Shape of a parameter, how it starts, and the role of each dimension."""

    shape: tuple[int, ...]
    kind: Literal["kernel", "out_kernel", "bias", "ones", "zeros"]
    roles: tuple[Role, ...]
    fan_in: int = 1  # kernels: the product of the dimensions that are summed over


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What both RingAttention layers compute; checked here, once."""

    in_features: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    out_features: int
    use_bias: bool | Literal["qkv"]
    qk_norm: bool
    use_sinks: bool
    norm_eps: float
    rope_theta: float | None
    rotary_dim: int | None
    rope_scaling: RopeScaling | None
    scale: float | None
    is_causal: bool
    local_window_size: int | tuple[int | None, int | None] | None
    logits_soft_cap: float | None
    dtype: jax.typing.DTypeLike | None
    config: RingConfig

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {}
        for name in ("in_features", "num_heads", "num_kv_heads", "head_dim", "out_features"):
            checked[name] = checks.positive_integer(name, getattr(self, name))
        for name in ("qk_norm", "use_sinks", "is_causal"):
            checks.flag(name, getattr(self, name))
        checked["use_bias"] = checks.bias("use_bias", self.use_bias)
        checked["norm_eps"] = checks.positive_number("norm_eps", self.norm_eps)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads. Got num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}."
            )
        if self.rope_theta is not None:
            checked["rope_theta"] = checks.positive_number("rope_theta", self.rope_theta, ", or None for no RoPE")
            checked["rotary_dim"] = checks.rotary_dim("rotary_dim", self.rotary_dim, self.head_dim)
            rope_scaling("rope_scaling", self.rope_scaling)
            if self.head_dim % 2 and self.rotary_dim is None:
                raise ValueError(
                    "head_dim must be even for RoPE (rope_theta=None turns it off, rotary_dim limits it). "
                    f"Got {self.head_dim}."
                )
        else:
            for name in ("rotary_dim", "rope_scaling"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} must be None where rope_theta is None: there is no RoPE. Got {getattr(self, name)!r}."
                    )
        if self.scale is not None:
            checked["scale"] = check_scale(self.scale, self.head_dim)
        checked["logits_soft_cap"] = check_soft_cap(self.logits_soft_cap)
        check_window(self.local_window_size, self.is_causal)
        if isinstance(self.local_window_size, list):
            checked["local_window_size"] = tuple(self.local_window_size)  # hashable
        if self.dtype is not None:
            checked["dtype"] = checks.floating("dtype", self.dtype)
        checks.ring_config("config", self.config)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def knows_positions(self) -> bool:
        """Whether the result depends on the positions of the tokens."""
        return self.rope_theta is not None or self.is_causal or self.local_window_size is not None

    @classmethod
    def of(
        cls,
        *,
        in_features: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        out_features: int | None,
        **rest: Any,
    ) -> "AttentionSpec":
        """With Flax's defaults filled in: a key/value head per query head, in_features / num_heads, in_features."""
        if head_dim is None:
            checks.positive_integer("in_features", in_features)
            checks.positive_integer("num_heads", num_heads)
            if in_features % num_heads:
                raise ValueError(
                    "head_dim must be given where num_heads does not divide the features. "
                    f"Got {in_features} features, num_heads={num_heads}."
                )
            head_dim = in_features // num_heads
        return cls(
            in_features=in_features,
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=head_dim,
            out_features=in_features if out_features is None else out_features,
            **rest,
        )

    def parameters(self) -> dict[str, dict[str, ParamInfo]]:
        """All parameters. Names and shapes are those of Flax's MultiHeadAttention, so its weights fit."""
        features, size = self.in_features, self.head_dim

        def projection(heads: int) -> dict[str, ParamInfo]:
            kernel = ParamInfo((features, heads, size), "kernel", (FSDP, TENSOR, None), features)
            bias = ParamInfo((heads, size), "bias", (TENSOR, None))
            return {"kernel": kernel, "bias": bias} if self.use_bias else {"kernel": kernel}

        out_shape = (self.num_heads, size, self.out_features)
        out = {"kernel": ParamInfo(out_shape, "out_kernel", (TENSOR, None, FSDP), self.num_heads * size)}
        if self.use_bias is True:
            out["bias"] = ParamInfo((self.out_features,), "bias", (None,))
        table = {
            "query": projection(self.num_heads),
            "key": projection(self.num_kv_heads),
            "value": projection(self.num_kv_heads),
            "out": out,
        }
        if self.qk_norm:
            scale = {"scale": ParamInfo((size,), "ones", (None,))}
            table |= {"query_norm": scale, "key_norm": scale}
        if self.use_sinks:
            table["sinks"] = {"logit": ParamInfo((self.num_heads,), "zeros", (TENSOR,))}
        return table


def checked_initializers(
    kernel_init: Initializer, out_kernel_init: Initializer | None, bias_init: Initializer
) -> dict[str, Initializer]:
    """What draws each kind of parameter; by default the output kernel is drawn as the others are."""
    out_kernel_init = kernel_init if out_kernel_init is None else out_kernel_init
    named = {"kernel_init": kernel_init, "out_kernel_init": out_kernel_init, "bias_init": bias_init}
    for name, init in named.items():
        if not callable(init):
            raise ValueError(f"{name} must be callable as init(key, shape, dtype). Got {init!r}.")
    return {"kernel": kernel_init, "out_kernel": out_kernel_init, "bias": bias_init}


def initial_value(
    info: ParamInfo, key: jax.Array, dtype: jax.typing.DTypeLike, inits: Mapping[str, Initializer]
) -> jax.Array:
    """A fresh parameter. Kernels are drawn as matrices [fan in, fan out], as in Flax, whatever their rank."""
    if info.kind == "ones":
        return jnp.ones(info.shape, dtype)
    if info.kind == "zeros":
        return jnp.zeros(info.shape, dtype)
    if info.kind == "bias":
        return inits["bias"](key, info.shape, dtype)
    matrix = (info.fan_in, math.prod(info.shape) // info.fan_in)
    return inits[info.kind](key, matrix, dtype).reshape(info.shape)


def layer_rotation(
    spec: AttentionSpec, placement: Placement, x: jax.Array, positions: jax.Array | None
) -> Rotation | None:
    """The RoPE rotation of the tokens of x [B, T, E]; None without RoPE."""
    if spec.rope_theta is None:
        return None
    length = None
    if positions is None:
        positions = placement.positions(x.shape[1])
        length = x.shape[1] * (placement.ring_size if placement.inside else 1)
    allowed = ((x.shape[1],), x.shape[:2])
    if positions.shape not in allowed:
        raise ValueError(
            f"positions must have shape [T] or [B, T], {allowed[0]} or {allowed[1]}. Got {positions.shape}."
        )
    return rotation(
        positions,
        spec.head_dim,
        spec.rope_theta,
        x.dtype if spec.dtype is None else spec.dtype,
        rotary_dim=spec.rotary_dim,
        scaling=spec.rope_scaling,
        length=length,
    )


def apply_attention(
    weights: LayerArrays,
    x: jax.Array,
    spec: AttentionSpec,
    placement: Placement,
    *,
    rotated_by: Rotation | None,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    promised: Mapping[str, Any],
    seq_lengths: jax.Array | None = None,
) -> jax.Array:
    """out = attention(rope(x W_q), rope(x W_k), x W_v) W_o on sequence-sharded activations x [B, T, E]."""
    query, key, value = _project_in(weights, x, spec, placement, rotated_by)
    attended = placement.attend(
        query,
        key,
        value,
        is_causal=spec.is_causal,
        query_seq_lengths=seq_lengths,
        key_value_seq_lengths=seq_lengths,
        segment_ids=segment_ids,
        positions=positions,
        **promised,
        **_options(weights, spec),
    )
    return _project_out(weights, attended, placement)


def apply_cached_attention(
    weights: LayerArrays,
    x: jax.Array | Normed,
    spec: AttentionSpec,
    placement: Placement,
    cache: KVCache,
    *,
    rotated_by: Rotation | None,
    counts: jax.Array | None,
    prompt: bool,
) -> tuple[jax.Array, KVCache]:
    """The same of the tokens behind those that are cached, and the cache with them.

    ``counts`` [B]: how many of the T tokens each row has, the first ones; None: all. ``prompt``: they are the first
    ones, and dealt over the ring.
    """
    query, key, value = _project_in(weights, x, spec, placement, rotated_by)
    options = _options(weights, spec)
    if prompt:
        attended, cache = placement.prefill(query, key, value, cache, counts, is_causal=True, **options)
    else:
        attended, cache = placement.decode(query, key, value, cache, counts, **options)
    return _project_out(weights, attended, placement), cache


def _options(weights: LayerArrays, spec: AttentionSpec) -> dict[str, Any]:
    """Of ring_attention and cached_attention alike."""
    return {
        "scale": spec.scale,
        "local_window_size": spec.local_window_size,
        "logits_soft_cap": spec.logits_soft_cap,
        "sinks": weights["sinks"]["logit"] if spec.use_sinks else None,
        "config": spec.config,
    }


def _project_in(
    weights: LayerArrays, x: jax.Array | Normed, spec: AttentionSpec, placement: Placement, rotated_by: Rotation | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key and value of each head."""
    dtype = jnp.result_type(x.dtype, weights["query"]["kernel"]) if spec.dtype is None else jnp.dtype(spec.dtype)
    x = x.astype(dtype)
    x = x if isinstance(x, Normed) else placement.stream(x)
    parts = [weights[name] for name in ("query", "key", "value")]
    kernels = [placement.gather(part["kernel"].astype(dtype), FSDP, TENSOR, None) for part in parts]
    found = products(placement, x, kernels)
    found = [placement.constrain(y, BATCH, SEQUENCE, TENSOR, None) for y in found]
    query, key, value = (
        y + spread(part["bias"].astype(dtype), 4) if "bias" in part else y for y, part in zip(found, parts, strict=True)
    )
    if spec.qk_norm:
        query = rms_norm(query, weights["query_norm"]["scale"], spec.norm_eps)
        key = rms_norm(key, weights["key_norm"]["scale"], spec.norm_eps)
    if rotated_by is not None:
        query, key = rotate(query, rotated_by), rotate(key, rotated_by)
    return query, key, value


def _project_out(weights: LayerArrays, attended: jax.Array, placement: Placement) -> jax.Array:
    dtype = attended.dtype
    kernel = placement.gather(weights["out"]["kernel"].astype(dtype), TENSOR, None, FSDP)
    out = placement.product_out("btnh,nhe->bte", attended, kernel)
    return out + spread(weights["out"]["bias"].astype(dtype), 3) if "bias" in weights["out"] else out


def run_layer(
    weights: LayerArrays,
    x: jax.Array,
    spec: AttentionSpec,
    placement: Placement,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    seq_lengths: jax.Array | None,
    max_segment_length: int | None,
    shared_length: int | tuple[int, ...] | None,
) -> jax.Array:
    """A whole layer from the outside: checks x, computes the rotation, and hides Explicit axes from the inside."""
    if x.ndim != 3 or x.shape[-1] != spec.in_features:
        raise ValueError(f"inputs must have shape [B, T, {spec.in_features}]. Got {x.shape}.")
    if seq_lengths is not None or (positions is None and spec.knows_positions):
        placement.require_num_shards()
    placement = placement.sharded_like(x)
    promised = placement.promised(segment_ids, max_segment_length, shared_length, seq_lengths)

    def run(weights: Any, x: jax.Array, positions: Any, segment_ids: Any, seq_lengths: Any) -> jax.Array:
        x = placement.to_natural(x, 1)
        positions = placement.to_natural(positions, -1)
        rotated_by = layer_rotation(spec, placement, x, positions)
        out = apply_attention(
            weights,
            x,
            spec,
            placement,
            rotated_by=rotated_by,
            positions=positions,
            segment_ids=placement.to_natural(segment_ids, -1),
            promised=promised,
            seq_lengths=seq_lengths,
        )
        return placement.from_natural(out, 1)

    out_spec = placement.spec((*x.shape[:2], spec.out_features), BATCH, SEQUENCE, None)
    return placement.with_auto_axes(run, out_spec, weights, x, positions, segment_ids, seq_lengths)
