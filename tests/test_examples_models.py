"""examples/: each runs as a user runs it, and prints what dense attention in natural order on one device gives."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ringjax

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
CLOSE = 2e-5  # of losses of about 5 that are printed with five decimals
dense = jax.nn.dot_product_attention


def run(name: str) -> str:
    """All that an example prints. It compiles as this suite's programs do, see conftest.py; warnings are errors."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def numbers(pattern: str, said: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, said)]


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def as_users_have_it() -> Iterator[None]:
    """JAX as strict as it is by default."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def text_of(name: str, *shape: int) -> np.ndarray:
    """The bytes of an example, which is the text that it learns."""
    return np.resize(np.fromfile(ROOT / "examples" / f"{name}.py", np.uint8), shape)


def next_tokens(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, targets, weights) in natural order."""
    weights = np.ones(rows.shape, np.float32)
    weights[:, -1] = 0
    return rows, np.roll(rows, -1, axis=1), weights / weights.sum()


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_short_enough_to_read(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) < 80


def turned(x: jax.Array) -> jax.Array:
    """RoPE in natural order, as complex numbers."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    y = jax.lax.complex(x[..., :half], x[..., half:]) * np.exp(1j * angle).astype(np.complex64)
    return jnp.concatenate([y.real, y.imag], axis=-1)


def norm(x: jax.Array, weights: Any) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weights["scale"]


def test_nnx_model() -> None:
    said = run("nnx_model")
    example = load("nnx_model")
    model = example.Model(ringjax.ring_mesh((1, 1), ("data", "sp")), nnx.Rngs(0))

    def mean_loss(params: Any, tokens: Any, targets: Any, weights: Any) -> jax.Array:
        x = params["embed"]["embedding"][tokens]
        for number in range(example.LAYERS):
            layer = params["blocks"]["layers"][number]
            y, attention = norm(x, layer["attention_norm"]), layer["attention"]
            q, k, v = (jnp.einsum("bte,enh->btnh", y, attention[name]["kernel"]) for name in ("query", "key", "value"))
            y = jax.nn.dot_product_attention(turned(q), turned(k), v, is_causal=True)
            x = x + jnp.einsum("btnh,nhe->bte", y, attention["out"]["kernel"])
            y = jax.nn.gelu(norm(x, layer["mlp_norm"]) @ layer["up"]["kernel"] + layer["up"]["bias"])
            x = x + y @ layer["down"]["kernel"] + layer["down"]["bias"]
        logits = norm(x, params["norm"]) @ params["embed"]["embedding"].T
        return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params: Any, state: Any, *batch: Any) -> Any:
        loss, gradients = jax.value_and_grad(mean_loss)(params, *batch)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    expected = []
    with as_users_have_it():
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        state = optimizer.init(params)
        for rows in text_of("nnx_model", example.STEPS, example.BATCH, 2 * example.TOKENS_PER_DEVICE):
            params, state, loss = step(params, state, *next_tokens(rows))
            expected.append(loss)
    np.testing.assert_allclose(numbers(r"step \d: loss (\d+\.\d{5})", said), expected, atol=1e-4)
    assert expected[-1] < expected[0]


def test_equinox_model() -> None:
    said = run("equinox_model")
    example = load("equinox_model")
    keys = jax.random.split(jax.random.key(0), example.LAYERS + 1)
    expected = []
    with as_users_have_it():
        model = 0.1 * jax.random.normal(keys[0], (256, example.WIDTH)), [example.Block(key) for key in keys[1:]]
        length = 2 * example.TOKENS_PER_DEVICE
        for rows in text_of("equinox_model", example.STEPS, example.BATCH, length):
            model, loss = example.train_step(model, *next_tokens(rows), np.arange(length), dense)
            expected.append(loss)
    np.testing.assert_allclose(numbers(r"step \d: loss (\d+\.\d{5})", said), expected, atol=CLOSE)
    assert expected[-1] < expected[0] and equinox.is_array(model[0])


def test_scan_layers() -> None:
    said = run("scan_layers")
    example = load("scan_layers")
    rng, length = np.random.default_rng(0), 2 * example.TOKENS_PER_DEVICE
    normal = lambda shape: rng.normal(0, 0.1, shape).astype(np.float32)  # noqa: E731
    embedding = normal((256, example.WIDTH))
    params = {"embedding": embedding, "layers": {name: normal(shape) for name, (shape, _) in example.SHAPES.items()}}
    batch = (*next_tokens(text_of("scan_layers", example.BATCH, length)), np.arange(length))
    step = jax.jit(jax.value_and_grad(example.mean_loss), static_argnames="attention")
    with as_users_have_it():
        before, gradients = step(params, *batch, attention=dense)
        params = jax.tree.map(lambda weight, gradient: weight - 0.2 * gradient, params, gradients)
        after, _ = step(params, *batch, attention=dense)
    found = numbers(r"(?:loss|dense on one device|gradient descent) (\d+\.\d+)", said)
    np.testing.assert_allclose(found, [before, before, after], atol=CLOSE)
    assert after < before and numbers(r"gradients differ by (\S+)", said)[0] < 1e-6


def test_windows_by_layer() -> None:
    said = run("windows_by_layer")
    example = load("windows_by_layer")
    rng, count = np.random.default_rng(3), example.BATCH * 4 * example.TOKENS_PER_DEVICE // 24
    lengths = rng.lognormal(np.log(24), 0.8, count).astype(int) + 1
    text, starts = text_of("windows_by_layer", lengths.sum()), np.cumsum(lengths) - lengths
    normal = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)  # noqa: E731
    heads = example.HEADS + 2 * example.KV_HEADS
    layers = [
        {
            "qkv": normal(example.WIDTH, heads, example.HEAD_SIZE),
            "out": normal(example.HEADS, example.HEAD_SIZE, example.WIDTH),
        }
        for _ in example.WINDOWS
    ]
    params = {"embedding": normal(256, example.WIDTH), "layers": layers}

    # Each document alone, from its beginning: one a row, with padding behind it, to which nothing before attends.
    packing = ringjax.pack(lengths, num_shards=4, shard_length=example.TOKENS_PER_DEVICE)
    documents = sorted({int(which) for n in range(example.BATCH) for which in packing[n].document} - {-1})
    longest = lengths.max()
    rows = np.stack([np.resize(text[starts[n] : starts[n] + lengths[n]], longest) for n in documents])
    weights = (np.arange(longest) < lengths[documents][:, None] - 1).astype(np.float32)
    batch = {
        "inputs": rows,
        "targets": np.roll(rows, -1, axis=1),
        "weights": weights / weights.sum(),
        "positions": np.tile(np.arange(longest), (len(rows), 1)),
        "segment_ids": np.zeros(rows.shape, np.int32),
    }

    def attention(*qkv: Any, is_causal: bool, local_window_size: int | None, **documents: Any) -> jax.Array:
        return jax.nn.dot_product_attention(*qkv, is_causal=is_causal, local_window_size=local_window_size)

    def without_windows(*qkv: Any, is_causal: bool, **documents: Any) -> jax.Array:
        return jax.nn.dot_product_attention(*qkv, is_causal=is_causal)

    with as_users_have_it():
        expected = example.mean_loss(params, batch, attention)
        other = example.mean_loss(params, batch, without_windows)
    np.testing.assert_allclose(numbers(r"(?:loss|dense attention) (\d+\.\d+)", said), expected, atol=CLOSE)
    assert abs(expected - other) > 100 * CLOSE
    assert 0 < numbers(r"keys (\d+) travel", said)[0] < example.TOKENS_PER_DEVICE


def test_decode_loop() -> None:
    said = run("decode_loop")
    example = load("decode_loop")
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)  # noqa: E731
    heads, size = example.HEADS + 2 * example.KV_HEADS, example.SIZE
    layers = [(normal(example.WIDTH, heads, size), normal(example.HEADS, size, example.WIDTH)) for _ in range(2)]
    sizes = example.VOCABULARY, example.LONGEST
    embedding, position = (jnp.array(normal(size, example.WIDTH)) for size in sizes)

    @jax.jit
    def best(row: jax.Array) -> jax.Array:
        """The token after each of one row [T], from all of it at once."""
        x = embedding[row] + position
        for qkv, out in layers:
            y = x - jnp.mean(x, axis=-1, keepdims=True)
            y = y / jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)
            q, k, v = jnp.split(jnp.einsum("te,enh->tnh", y, qkv), [example.HEADS, heads - example.KV_HEADS], axis=1)
            x = x + jnp.einsum("tnh,nhe->te", jax.nn.dot_product_attention(q, k, v, is_causal=True), out)
        return jnp.argmax(x @ embedding.T, axis=-1)

    expected = ""
    for prompt, length in zip(example.PROMPTS, example.LENGTHS, strict=True):
        row = prompt[:length].tolist()
        with as_users_have_it():
            while len(row) == length or (row[-1] != example.STOP and len(row) < example.LONGEST):
                row.append(int(best(jnp.array(row + [0] * (example.LONGEST - len(row))))[len(row) - 1]))
        expected += f"{row[:length]} -> {row[length:]}\n"
    assert said == expected
    assert f"{example.STOP}]" in expected  # some rows end before the others


@pytest.mark.slow
def test_two_hosts() -> None:
    said = run("two_hosts")
    example = load("two_hosts")
    length = 2 * example.TOKENS_PER_DEVICE
    row = text_of("two_hosts", 1, length + 1)
    params, expected = example.initial_params(), []
    with as_users_have_it():
        for _ in range(example.STEPS):
            params, loss = example.train_step(params, row[:, :-1], row[:, 1:], dense)
            expected.append(loss)
    for process in (0, 1):
        assert f"process {process} made {length // 2} of {length} tokens" in said
        found = numbers(rf"process {process}, step \d: loss (\d+\.\d{{5}})", said)
        np.testing.assert_allclose(found, expected, atol=CLOSE)
    assert expected[-1] < expected[0]
