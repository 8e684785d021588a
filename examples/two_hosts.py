"""One ring over the devices of two hosts, each of which makes only its own part of the sequence.

``python examples/two_hosts.py`` starts two processes on this machine, with one simulated device each. On real hosts
run it with ``--coordinator HOST:12345 --process 0`` on the one called HOST, and with ``--process 1`` on the other. Both
run the same program at the same time, and see the same loss.
"""

import argparse
import functools
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import NamedSharding, P

import ringjax

WIDTH, HEADS, HEAD_SIZE, TOKENS_PER_DEVICE, STEPS, LEARNING_RATE = 32, 4, 8, 64, 3, 0.1


def initial_params():
    rng, of_heads = np.random.default_rng(0), (WIDTH, HEADS, HEAD_SIZE)  # the same on every host
    shapes = {"embedding": (256, WIDTH), "q": of_heads, "k": of_heads, "v": of_heads, "out": (HEADS, HEAD_SIZE, WIDTH)}
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


@functools.partial(jax.jit, static_argnames="attention")
def train_step(params, tokens, targets, attention):
    def mean_loss(params):
        x = params["embedding"][tokens]
        query, key, value = (jnp.einsum("bte,enh->btnh", jax.nn.standardize(x), params[name]) for name in "qkv")
        x = x + jnp.einsum("btnh,nhe->bte", attention(query, key, value, is_causal=True), params["out"])
        log_probs = jax.nn.log_softmax(x @ params["embedding"].T)
        return -jnp.mean(jnp.take_along_axis(log_probs, targets[..., None], axis=-1))

    loss, gradients = jax.value_and_grad(mean_loss)(params)
    return jax.tree.map(lambda weight, gradient: weight - LEARNING_RATE * gradient, params, gradients), loss


def run(coordinator, process):
    jax.distributed.initialize(coordinator, num_processes=2, process_id=process)
    mesh = ringjax.ring_mesh(jax.device_count(), "sp")  # over the devices of both hosts
    ring, length = {"layout": "zigzag", "num_shards": jax.device_count()}, TOKENS_PER_DEVICE * jax.device_count()
    positions = np.asarray(ringjax.ring_positions(length, **ring))  # which token each place of the sequence has
    document = np.memmap(__file__, np.uint8, mode="r")  # reads from the disk what is asked for

    def of_shard(offset, index):  # for each device of this host; index is the rows and places that it holds
        return document[(positions[index[1]] + offset) % len(document)][None]

    make = functools.partial(jax.make_array_from_callback, (1, length), NamedSharding(mesh, P(None, "sp")))
    tokens, targets = (make(functools.partial(of_shard, offset)) for offset in (0, 1))  # targets are the next tokens
    attention = functools.partial(ringjax.ring_attention, mesh=mesh, layout="zigzag")
    params = jax.device_put(initial_params(), NamedSharding(mesh, P()))  # the same on every device
    print(f"process {process} made {len(tokens.addressable_shards) * TOKENS_PER_DEVICE} of {length} tokens")
    for step in range(STEPS):
        params, loss = train_step(params, tokens, targets, attention)
        print(f"process {process}, step {step}: loss {loss:.5f}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator")
    parser.add_argument("--process", type=int)
    if (told := parser.parse_args()).coordinator:
        return run(told.coordinator, told.process)
    with socket.create_server(("127.0.0.1", 0)) as probe:  # finds a port that is free
        here = f"127.0.0.1:{probe.getsockname()[1]}"
    command, env = [sys.executable, __file__, "--coordinator", here], os.environ | {"JAX_PLATFORMS": "cpu"}
    both = [subprocess.Popen([*command, "--process", number], env=env) for number in "01"]
    sys.exit(any([process.wait() for process in both]))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 1)  # of no effect where there are GPUs or TPUs
    main()
