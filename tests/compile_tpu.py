"""python compile_tpu.py TOPOLOGY NAME...: compiles these programs for it, and prints what became of each as JSON.

A process of its own, since the compiler may abort. On the default tiles, forward and backward in one program.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import ringjax

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
            compile_one(device, *PROGRAMS[name])
            answers[name] = "compiled"
        except Exception as error:  # all are tried, whatever becomes of one
            answers[name] = f"{type(error).__name__}: {str(error)[:300]}"
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
