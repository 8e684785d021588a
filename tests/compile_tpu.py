"""python compile_tpu.py TOPOLOGY NAME...: compiles these programs for it, and prints what became of each as JSON.

A process of its own, since the compiler may abort. On the default tiles, forward and backward in one program.
"""

import json
import math
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import ringjax
from ringjax.inspect.hlo import parse

# dtype, head size, value head size, T, S, options of ring_attention.
PROGRAMS = {
    "everything": (
        jnp.bfloat16, 64, 128, 1000, 1000,
        dict(is_causal=True, local_window_size=(500, 0), logits_soft_cap=20.0, lengths=True, segments=True, sinks=True),
    ),
    "cross, odd lengths": (jnp.bfloat16, 80, 48, 777, 1333, dict(segments=False)),
    "head size 256": (jnp.bfloat16, 256, 256, 2048, 2048, dict(is_causal=True)),
    "float32": (jnp.float32, 128, 128, 2048, 2048, dict(is_causal=True)),
    "float32, head size 256": (jnp.float32, 256, 256, 2048, 2048, dict(is_causal=True)),
    "float16": (jnp.float16, 128, 128, 1024, 1024, dict(is_causal=True)),
}  # fmt: skip


# Few queries against a cache: dtype, K/V heads, head size, value head size, T, options of cached_attention.
CACHED = {
    "one token": (jnp.bfloat16, 8, 128, 128, 1, {}),
    "a few tokens": (
        jnp.bfloat16, 2, 128, 128, 5, dict(local_window_size=(700, 0), logits_soft_cap=20.0, sinks=True),
    ),
    "a chunk, heads of 64": (jnp.bfloat16, 4, 64, 64, 64, {}),
    "one token, heads of 256": (jnp.bfloat16, 4, 256, 256, 1, {}),
    "a few tokens, float32": (jnp.float32, 16, 128, 64, 3, dict(sinks=True)),
}  # fmt: skip
# What makes no array, and the kernel, whose results are small.
_NAMES = ("parameter", "bitcast", "tuple", "get-tuple-element")


def compile_cached(device: object, dtype: object, heads: int, size: int, v_size: int, t: int, options: dict) -> None:
    """The cache is what the kernel gets: nothing makes an array of its size, whatever the order."""
    options = dict(options)
    mesh = jax.sharding.Mesh([device], ("sp",))
    place = lambda *sizes, dtype=dtype: jax.ShapeDtypeStruct(  # noqa: E731
        sizes, dtype, sharding=jax.NamedSharding(mesh, jax.P())
    )
    sinks = place(4 * heads) if options.pop("sinks", False) else None
    make = lambda: ringjax.KVCache.empty(2, 4096, heads, size, value_head_dim=v_size, dtype=dtype)  # noqa: E731
    cache = jax.tree.map(lambda x: place(*x.shape, dtype=x.dtype), jax.eval_shape(make))

    def run(query: jax.Array, cache: ringjax.KVCache, sinks: jax.Array | None) -> jax.Array:
        return ringjax.cached_attention(query, cache, mesh=mesh, sinks=sinks, **options)

    text = jax.jit(run).lower(place(2, t, 4 * heads, size), cache, sinks).compile().as_text()
    assert "ringjax_decode" in text, "few queries have a kernel of their own"
    least = 2 * 4096 * heads * min(size, v_size)
    for computation in parse(text).computations.values():
        for op in computation.ops:
            largest = max((math.prod(shape) for _, shape in op.arrays()), default=0)
            assert op.opcode in _NAMES or largest < least, f"{op.name} makes {op.type}"


def compile_one(device: object, dtype: object, size: int, v_size: int, t: int, s: int, options: dict) -> None:
    options = dict(options)
    lengths, segments, sinks = (options.pop(name, False) for name in ("lengths", "segments", "sinks"))
    mesh = jax.sharding.Mesh([device], ("sp",))
    shape = lambda *sizes, dtype=dtype: jax.ShapeDtypeStruct(  # noqa: E731
        sizes, dtype, sharding=jax.NamedSharding(mesh, jax.P())
    )
    extra = {}
    if lengths:
        extra |= {"key_value_seq_lengths": shape(2, dtype=jnp.int32), "query_seq_lengths": shape(2, dtype=jnp.int32)}
    if segments:
        extra["segment_ids"] = shape(2, t, dtype=jnp.int32)
    if sinks:
        extra["sinks"] = shape(4)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, extra: dict) -> object:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            out, lse = ringjax.ring_attention(q, k, v, mesh=mesh, return_residual=True, **options, **extra)
            return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(lse)

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    q, k, v = shape(2, t, 4, size), shape(2, s, 2, size), shape(2, s, 2, v_size)
    text = jax.jit(run).lower(q, k, v, extra).compile().as_text()
    assert "ringjax_forward" in text and "ringjax_backward" in text, "the Pallas kernels are the default"


def main(topology: str, *names: str) -> None:
    options = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices[0]
    answers = {}
    for name in names:
        try:
            if name in CACHED:
                compile_cached(device, *CACHED[name])
            else:
                compile_one(device, *PROGRAMS[name])
            answers[name] = "compiled"
        except Exception as error:  # all are tried, whatever becomes of one
            answers[name] = f"{type(error).__name__}: {str(error)[:300]}"
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
