"""One layer of the decoder, and the group of layers that a pattern repeats."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..cache import KVCache
from .attention import ParamInfo
from .chunks import in_chunks
from .decoder_config import DecoderConfig
from .nnx_attention import RingAttention, Weights
from .norm import Normed, normed, products, rms_norm
from .placement import FSDP, TENSOR, Mesh, Placement, Role
from .rope import Rotation

_TOKENS = 65_536  # per device, of a prompt, for which an MLP's activations exist at a time

_Path = tuple[Any, ...]  # of a parameter, in a Decoder's state

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + down(silu(gate(norm(x))) * up(norm(x))) (SwiGLU, arXiv:2002.05202).

    With post_norms, norm(attention(...)) and norm(down(...)) are added. ``place`` is the layer's in a period of the
    pattern.
    """

    def __init__(self, config: DecoderConfig, place: int = 0, *, mesh: Mesh | None, rngs: nnx.Rngs):
        embed, width = config.embed_dim, config.mlp_dim
        window, rope = config.period[place]
        inner = nnx.initializers.lecun_normal()
        # Each layer adds two of these to the stream: with this variance their sum does not grow with depth.
        outer = nnx.initializers.variance_scaling(1 / (2 * config.num_layers), "fan_in", "truncated_normal")
        self.attention = RingAttention(
            config.num_heads,
            embed,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            use_bias=config.attention_bias,
            rope_theta=rope.theta,
            rotary_dim=rope.rotary_dim,
            rope_scaling=rope.scaling,
            qk_norm=config.qk_norm,
            use_sinks=config.use_sinks,
            norm_eps=config.norm_eps,
            scale=config.attention_scale,
            is_causal=True,
            local_window_size=window,
            logits_soft_cap=config.logits_soft_cap,
            layout=config.layout,
            num_shards=config.num_shards,
            config=config.ring,
            axis_name=config.axis_name,
            batch_axis_name=config.batch_axis_name,
            head_axis_name=config.head_axis_name,
            mesh=mesh,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            kernel_init=inner,
            out_kernel_init=outer,
            rngs=rngs,
        )

        def weights(**table: ParamInfo) -> Weights:
            inits = {"kernel": inner, "out_kernel": outer, "bias": nnx.initializers.zeros}
            return Weights(table, self.attention.distribution.here(), inits, param_dtype=config.param_dtype, rngs=rngs)

        def projection(kernel: ParamInfo, out: Role) -> Weights:
            bias = {"bias": ParamInfo(kernel.shape[1:], "bias", (out,))} if config.mlp_bias else {}
            return weights(kernel=kernel, **bias)

        norm = ParamInfo((embed,), "ones", (None,))
        self.attention_norm = weights(scale=norm)
        self.mlp_norm = weights(scale=norm)
        if config.post_norms:
            self.attention_post_norm = weights(scale=norm)
            self.mlp_post_norm = weights(scale=norm)
        self.gate = projection(ParamInfo((embed, width), "kernel", (FSDP, TENSOR), embed), TENSOR)
        self.up = projection(ParamInfo((embed, width), "kernel", (FSDP, TENSOR), embed), TENSOR)
        self.down = projection(ParamInfo((width, embed), "out_kernel", (TENSOR, FSDP), width), None)
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        placement: Placement,
        *,
        rotated_by: Rotation | None,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
        promised: Mapping[str, Any],
    ) -> jax.Array:
        def attend(y: jax.Array) -> tuple[jax.Array, None]:
            out = self.attention.within(
                y, placement, rotated_by=rotated_by, positions=positions, segment_ids=segment_ids, promised=promised
            )
            return out, None

        return self._around(attend, x, placement)[0]

    def cached(
        self,
        x: jax.Array,
        placement: Placement,
        cache: KVCache,
        *,
        rotated_by: Rotation | None,
        counts: jax.Array | None,
        prompt: bool,
    ) -> tuple[jax.Array, KVCache]:
        """The layer while prompts are read and tokens written."""

        def attend(y: jax.Array | Normed) -> tuple[jax.Array, KVCache]:
            within = self.attention.within_cached
            return within(y, placement, cache, rotated_by=rotated_by, counts=counts, prompt=prompt)

        return self._around(attend, x, placement, prompt=prompt)

    def _around(
        self, attend: Callable[[Any], Any], x: jax.Array, placement: Placement, *, prompt: bool = False
    ) -> tuple[jax.Array, Any]:
        """x + attention and x + MLP; and what attention returned beside its result."""
        y, kept = attend(normed(placement, *self._norm_of("attention_norm", x)))
        x = x + (rms_norm(*self._norm_of("attention_post_norm", y)) if self.config.post_norms else y)
        mlp = self._mlp(x.dtype, placement)
        return (in_chunks(placement, mlp, x, _TOKENS) if prompt else mlp(x)), kept

    def _mlp(self, dtype: Any, placement: Placement) -> Callable[[jax.Array], jax.Array]:
        """x + MLP, of the stream [B, T, E]. Its kernels are gathered here, not for every chunk of tokens."""
        gate, up, down = (part.arrays() for part in (self.gate, self.up, self.down))
        first = [placement.gather(part["kernel"].astype(dtype), FSDP, TENSOR) for part in (gate, up)]
        last = placement.gather(down["kernel"].astype(dtype), TENSOR, FSDP)

        def biased(y: jax.Array, part: Mapping[str, jax.Array]) -> jax.Array:
            return y + part["bias"].astype(y.dtype)[None, None] if "bias" in part else y

        def run(x: jax.Array) -> jax.Array:
            gated, plain = products(placement, normed(placement, *self._norm_of("mlp_norm", x)), first)
            wide = _ACTIVATIONS[self.config.activation](biased(gated, gate)) * biased(plain, up)
            y = biased(placement.product_out("btf,fe->bte", wide, last), down)
            return placement.stream(x + (rms_norm(*self._norm_of("mlp_post_norm", y)) if self.config.post_norms else y))

        return run

    def _norm_of(self, name: str, x: jax.Array) -> tuple[jax.Array, jax.Array, float]:
        """What a norm of this name is of."""
        return x, getattr(self, name).arrays()["scale"], self.config.norm_eps


class LayerGroup(nnx.Module):
    """Layers of the pattern from its beginning, one after the other: layer_0, layer_1, ..."""

    def __init__(self, config: DecoderConfig, count: int, *, mesh: Mesh | None, rngs: nnx.Rngs):
        self.count = count
        for place in range(count):
            setattr(self, f"layer_{place}", DecoderLayer(config, place % len(config.period), mesh=mesh, rngs=rngs))


def layers_of(block: DecoderLayer | LayerGroup) -> list[DecoderLayer]:
    """Its layers, in order."""
    if isinstance(block, DecoderLayer):
        return [block]
    return [getattr(block, f"layer_{place}") for place in range(block.count)]


def layer_path(config: DecoderConfig, layer: int) -> tuple[tuple[str, ...], int | None]:
    """Where layer number i is in a Decoder's state: its path, and its index there or None where it is no stack."""
    kinds = len(config.period)
    period, place = divmod(layer, kinds)
    if period >= config.num_stacked:
        return ("rest", f"layer_{layer - config.num_stacked * kinds}"), None
    return ("blocks",) if kinds == 1 else ("blocks", f"layer_{place}"), period


def restacked(arrays: Mapping[_Path, jax.Array], before: DecoderConfig, after: DecoderConfig) -> dict[_Path, jax.Array]:
    """The parameters of a Decoder of the first configuration, by their paths, for one of the second.

    These differ in ``scan_layers`` alone.
    """
    moved = {path: x for path, x in arrays.items() if path[0] not in ("blocks", "rest")}
    stacks: dict[_Path, list[jax.Array]] = {}
    for layer in range(before.num_layers):
        (old, at), (new, to) = layer_path(before, layer), layer_path(after, layer)
        for path in [path for path in arrays if path[: len(old)] == old]:
            value, there = arrays[path] if at is None else arrays[path][at], (*new, *path[len(old) :])
            if to is None:
                moved[there] = value
            else:
                stacks.setdefault(there, []).append(value)
    return moved | {path: jnp.stack(layers) for path, layers in stacks.items()}
