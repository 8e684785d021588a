"""Ring attention under the call protocol of Flax and of ``jax.nn.dot_product_attention``. Imports neither.

What the ring cannot honour raises. Linen passes only those options that the callable's signature names, so the
signature names all of them: an option left out would be dropped without a word.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypedDict, Unpack, cast, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .attention import ring_attention
from .config import RingConfig
from .layout import Layout

_MASKS = (
    "say what the mask means instead: is_causal=True or local_window_size in ringjax.attention_fn(...), "
    "segment_ids for packed documents, key_value_seq_lengths for padding. "
    "Decoding with a cache (decode=True) is not implemented either: it masks the cache with an array."
)


class AttentionOptions(TypedDict, total=False):
    """Options of a call, by the names that Flax and ``jax.nn`` give them. Those that the ring lacks must be None."""

    broadcast_dropout: bool
    dropout_rng: PRNGKeyArray | None
    dropout_rate: float
    deterministic: bool
    dtype: jax.typing.DTypeLike | None
    precision: jax.lax.PrecisionLike
    module: object | None
    promote_dtype: Callable[..., tuple[Array, ...]] | None
    is_causal: bool
    force_fp32_for_softmax: bool
    einsum_dot_general: Callable[..., Array] | None
    qk_attn_weights_einsum: Callable[..., Array] | None
    attn_weights_value_einsum: Callable[..., Array] | None
    input_positions: Int[Array, "..."] | None
    scale: float | None
    local_window_size: int | tuple[int | None, int | None] | None
    query_seq_lengths: Int[Array, " B"] | None
    key_value_seq_lengths: Int[Array, " B"] | None
    implementation: str | None


class AttentionFn(Protocol):
    """What :func:`ringjax.attention_fn` returns: ``fn(query, key, value, bias=None, mask=None, **options) -> out``.

    With ``return_residual=True`` it returns (out, log-sum-exp), as :func:`ringjax.ring_attention` does.
    """

    @overload
    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K Hv"],
        bias: Float[Array, "..."] | None = None,
        mask: Bool[Array, "..."] | None = None,
        *,
        return_residual: Literal[False] = False,
        **options: Unpack[AttentionOptions],
    ) -> Float[Array, "*B T N Hv"]: ...

    @overload
    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K Hv"],
        bias: Float[Array, "..."] | None = None,
        mask: Bool[Array, "..."] | None = None,
        *,
        return_residual: Literal[True],
        **options: Unpack[AttentionOptions],
    ) -> tuple[Float[Array, "*B T N Hv"], Float[Array, "*B T N"]]: ...


def attention_fn(
    axis_name: str | tuple[str, ...] = "sp",
    *,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    batch_axis_name: str | tuple[str, ...] | None = None,
    head_axis_name: str | tuple[str, ...] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    query_seq_lengths: Int[Array, " B"] | None = None,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    max_segment_length: int | None = None,
    shared_length: int | tuple[int, ...] | None = None,
    positions: Int[Array, "..."] | tuple[Int[Array, "..."], Int[Array, "..."]] | None = None,
    layout: str | Layout = "contiguous",
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    config: RingConfig | None = None,
) -> AttentionFn:
    """Ring attention as an ``attention_fn``: for ``flax.nnx.MultiHeadAttention``, Linen's, and as a drop-in. ::

        layer = nnx.MultiHeadAttention(8, 512, attention_fn=ringjax.attention_fn(is_causal=True), decode=False, ...)
        layer = nn.MultiHeadDotProductAttention(8, attention_fn=ringjax.attention_fn(is_causal=True))
        dot_product_attention = ringjax.attention_fn("sp", mesh=mesh)      # in place of jax.nn's

    The callable takes the arguments of ``flax.nnx.dot_product_attention``, of its Linen namesake and of
    ``jax.nn.dot_product_attention``. Linen has no ``is_causal``: give it here. Options of the call replace those given
    here, except ``is_causal``, which holds if either says so. Query, key and value may have any number of batch
    dimensions. The softmax is always computed in float32 (float64 for float64), which is what
    ``force_fp32_for_softmax`` asks for, and the sequence is in ring order of ``layout``.

    Args:
      axis_name, mesh, batch_axis_name, head_axis_name, scale, is_causal, local_window_size, query_seq_lengths,
        key_value_seq_lengths, segment_ids, max_segment_length, shared_length, positions, layout, logits_soft_cap,
        sinks, config: as in :func:`ringjax.ring_attention`.

    Returns:
      A callable ``(query, key, value, bias=None, mask=None, ...) -> out``. It raises NotImplementedError for a mask
      or bias array, active dropout, sown attention weights, a precision, an einsum of the caller's, RoPE positions and
      an implementation of jax.nn.

    Raises:
      ValueError: of the callable, for arguments that do not fit, as :func:`ringjax.ring_attention`.
    """
    ring: dict[str, Any] = dict(
        axis_name=axis_name,
        mesh=mesh,
        batch_axis_name=batch_axis_name,
        head_axis_name=head_axis_name,
        layout=layout,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        positions=positions,
        segment_ids=segment_ids,
        max_segment_length=max_segment_length,
        shared_length=shared_length,
        config=RingConfig() if config is None else config,
    )
    always_causal, default_scale, default_window = is_causal, scale, local_window_size
    default_query_lengths, default_key_lengths = query_seq_lengths, key_value_seq_lengths

    def ring_attention_fn(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: jax.typing.DTypeLike | None = None,
        precision: jax.lax.PrecisionLike = None,
        module: object | None = None,
        *,  # From here on NNX and Linen differ in their order.
        promote_dtype: Callable[..., tuple[Array, ...]] | None = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Callable[..., Array] | None = None,
        qk_attn_weights_einsum: Callable[..., Array] | None = None,
        attn_weights_value_einsum: Callable[..., Array] | None = None,
        input_positions: jax.Array | None = None,
        scale: float | None = None,
        local_window_size: int | tuple[int | None, int | None] | None = None,
        query_seq_lengths: jax.Array | None = None,
        key_value_seq_lengths: jax.Array | None = None,
        implementation: str | None = None,
        return_residual: bool = False,
    ) -> Any:
        # These two need no honouring: without dropout there is nothing to broadcast or to draw.
        del broadcast_dropout, dropout_rng
        del force_fp32_for_softmax  # True in any case.
        _refuse_arrays(bias, mask)
        _refuse_dropout(dropout_rate, deterministic)
        _refuse_the_rest(
            precision=precision,
            module=module,
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
            input_positions=input_positions,
            implementation=implementation,
        )
        query, key, value = (promote_dtype or _promote)((query, key, value), dtype=dtype)
        call = dict(
            ring,
            scale=default_scale if scale is None else scale,
            is_causal=always_causal or is_causal,
            local_window_size=default_window if local_window_size is None else local_window_size,
            query_seq_lengths=default_query_lengths if query_seq_lengths is None else query_seq_lengths,
            key_value_seq_lengths=default_key_lengths if key_value_seq_lengths is None else key_value_seq_lengths,
        )
        return _with_one_batch_axis(query, key, value, call, return_residual)

    # Spelt out above, where Linen reads the names; a type checker would want **options for the protocol's.
    return cast(AttentionFn, ring_attention_fn)


def _promote(arrays: tuple[jax.Array, ...], *, dtype: jax.typing.DTypeLike | None) -> tuple[jax.Array, ...]:
    """Flax's rule: the dtype asked for, otherwise the common one."""
    target = jnp.result_type(*arrays) if dtype is None else dtype
    return tuple(jnp.asarray(x, target) for x in arrays)


def _with_one_batch_axis(
    query: jax.Array, key: jax.Array, value: jax.Array, call: dict[str, Any], return_residual: bool
) -> Any:
    """Flax allows any number of batch dimensions, also none; the ring has exactly one."""
    batch = query.shape[:-3]
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3 or x.shape[:-3] != batch:
            raise ValueError(
                f"{name} must have shape [batch..., length, heads, head size] with the batch dimensions of query. "
                f"Got {x.shape} beside query {query.shape}."
            )
    if len(batch) == 1:
        return ring_attention(query, key, value, return_residual=return_residual, **call)
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    result = ring_attention(query, key, value, return_residual=return_residual, **call)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), result)


def _refuse_arrays(bias: Any, mask: Any) -> None:
    if mask is not None:
        raise NotImplementedError(f"mask must be None: ring attention takes no mask array; {_MASKS} Got {_told(mask)}.")
    if bias is not None:
        raise NotImplementedError(
            "bias must be None: ring attention takes no bias array. A bias that only masks is a mask; "
            f"{_MASKS} Got {_told(bias)}."
        )


def _refuse_dropout(rate: float, deterministic: bool) -> None:
    if rate > 0 and not deterministic:
        raise NotImplementedError(
            "dropout_rate must be 0 or deterministic must be True: ring attention has no dropout of attention weights. "
            f"Put dropout after the layer instead. Got dropout_rate={rate}, deterministic={deterministic}."
        )


_INSTEAD = {
    "precision": "build the layer with precision=None; ring attention accumulates in float32 (float64 for float64). "
    "For its matmuls' inputs use jax.default_matmul_precision",
    "module": "call the layer with sow_weights=False; the attention weights never exist whole, so they cannot be sown",
    "einsum_dot_general": "the ring's kernels do their own matmuls",
    "qk_attn_weights_einsum": "build the layer without qk_attn_weights_einsum_cls; the kernels do their own matmuls",
    "attn_weights_value_einsum": "build the layer without attn_weights_value_einsum_cls; the kernels do their own "
    "matmuls",
    "input_positions": "in Flax these are RoPE positions, and no RoPE is applied here. Use ringjax.nnx.RingAttention, "
    "or ringjax.attention_fn(positions=...) for the positions of the mask",
    "implementation": "choose the kernel with ringjax.attention_fn(config=RingConfig(implementation=...))",
}


def _refuse_the_rest(**given: Any) -> None:
    for name, x in given.items():
        if x is not None:
            raise NotImplementedError(f"{name} must be None: {_INSTEAD[name]}. Got {_told(x)}.")


def _told(x: Any) -> str:
    shape = getattr(x, "shape", None)
    return f"an array of shape {shape}" if shape is not None else repr(x)[:80]
