"""Records tiny random models of every family, as transformers writes and runs them: tests/data/models/.

Run by hand where torch, transformers and ringjax[models] are installed: `python tests/record_models.py`. Weights are
drawn, saved by transformers, and run by it in float64. What `ringjax.models.save` makes of them is loaded by
transformers once more: the logits must be the same.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from safetensors.numpy import save_file

from ringjax import models

FOLDER = Path(__file__).parent / "data" / "models"
TOKENS = np.random.default_rng(0).integers(0, 128, (2, 24), np.int32)
SIZES = dict(
    vocab_size=128,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    head_dim=16,
    pad_token_id=None,
    bos_token_id=1,
    eos_token_id=2,
)


def llama(rope: dict, **more):
    return transformers.LlamaConfig(**(SIZES | dict(rope_parameters={"rope_theta": 500.0} | rope) | more))


def yarn(**more) -> dict:
    return dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, **more)


LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
FAR = dict(rope_type="linear", rope_theta=1e5, factor=8.0)
NEAR = dict(rope_type="default", rope_theta=1e3)
GEMMA = dict(sliding_window=8, query_pre_attn_scalar=20)
# name: (configuration, dtype of the file)
CASES = {
    "llama_llama3": (llama(LLAMA3), "float32"),
    "llama_yarn": (llama(yarn(beta_fast=8.0, beta_slow=2.0)), "float32"),
    "llama_yarn_mscale": (llama(yarn(mscale=1.2, mscale_all_dim=0.7)), "bfloat16"),
    "llama_linear_bias": (
        llama(dict(rope_type="linear", factor=3.0), attention_bias=True, mlp_bias=True, head_dim=8),
        "float32",
    ),
    "llama_dynamic": (llama(dict(rope_type="dynamic", factor=2.0), max_position_embeddings=16), "float32"),
    "smollm2": (llama({}, tie_word_embeddings=True), "bfloat16"),
    "mistral": (transformers.MistralConfig(**SIZES, sliding_window=8), "float16"),
    "qwen2": (
        transformers.Qwen2Config(
            **(SIZES | dict(head_dim=8)),
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
        ),
        "float32",
    ),
    "qwen3": (transformers.Qwen3Config(**SIZES, tie_word_embeddings=True), "bfloat16"),
    "gemma2": (
        transformers.Gemma2Config(**SIZES, **GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        "float32",
    ),
    "gemma3": (
        transformers.Gemma3TextConfig(
            **(SIZES | dict(num_hidden_layers=3)),
            **GEMMA,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={"full_attention": FAR, "sliding_attention": NEAR},
        ),
        "bfloat16",
    ),
}


def draw(model: torch.nn.Module, gemma: bool) -> None:
    """Weights with which every part of the model shows in its logits."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, w in model.named_parameters():
            noise = torch.randn(w.shape, generator=source)
            if "norm" in name:
                w.copy_(0.3 * noise + (0 if gemma else 1))
            elif w.ndim == 1:
                w.copy_(0.5 * noise)
            elif "embed" in name:
                w.copy_(0.5 * noise)
            else:
                w.copy_(noise * 1.5 / w.shape[1] ** 0.5)


def run(folder: Path) -> np.ndarray:
    """Logits [B, T, V] in float64, by transformers."""
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def record(name: str) -> float:
    """Writes a case. Returns how far transformers' logits of what ringjax saved are from those of the original."""
    config, dtype = CASES[name]
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    draw(model, name.startswith("gemma"))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    logits = run(folder)
    save_file({"tokens": TOKENS, "logits": logits.astype(np.float32)}, folder / "logits.safetensors")
    with tempfile.TemporaryDirectory() as scratch:
        again = Path(scratch) / "again"
        models.save(models.load(folder, num_shards=1), again)
        return float(np.abs(run(again) - logits).max())


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    worst = {name: record(name) for name in sys.argv[1:] or CASES}
    for name, error in worst.items():
        size = sum(file.stat().st_size for file in (FOLDER / name).iterdir())
        sys.stdout.write(
            f"{name:20} {size / 1024:6.0f} KiB, saved by ringjax and run by transformers: off by {error:.1e}\n"
        )
    if max(worst.values()) > 1e-5:
        sys.exit("transformers makes something else of what ringjax saved")
