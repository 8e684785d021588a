"""Which tensor of a file is which parameter of a Decoder, and how one becomes the other.

A matrix lies in files as [outputs, inputs] with the axes of ours run together: the query's kernel [E, N, H] is
[N H, E] there. Letters as in ringjax.nnx.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from ..layers.decoder_config import DecoderConfig
from ..layers.decoder_layer import layer_path

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a file.

    Attributes:
      name: in the file.
      path: of the parameter in the decoder's state.
      index: of the layer in the stack that the parameter is, or None where it is no stack.
      inputs: how many leading axes of the parameter are summed over; 0: no matrix of a projection.
      offset: parameter = tensor + offset.
    """

    name: str
    path: Path
    index: int | None
    inputs: int
    offset: float

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """In the file, of a parameter (one layer of a stack) of this shape."""
        if self.inputs:
            return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])
        # The bias of a projection has its axes run together too; a table stays as it is.
        return (math.prod(shape),) if self.path[-1] == "bias" else shape

    def from_file(self, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The parameter, a view of the tensor where there is no offset."""
        x = (x.T if self.inputs else x).reshape(shape)
        return x.astype(np.promote_types(x.dtype, np.float32)) + self.offset if self.offset else x

    def to_file(self, x: np.ndarray) -> np.ndarray:
        """The tensor of a parameter."""
        if self.offset:
            x = (x.astype(np.promote_types(x.dtype, np.float32)) - self.offset).astype(x.dtype)
        shape = self.file_shape(x.shape)
        return x.reshape(shape[::-1]).T if self.inputs else x.reshape(shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """Names of the parts of a decoder in a kind of file; those of a layer have a {} for its number."""

    embedding: str
    norm: str
    output: str
    layers: Mapping[str, str]  # part of a layer, dotted -> prefix in the file
    norm_offset: float = 0.0


def _hugging_face(norms: Mapping[str, str], norm_offset: float = 0.0) -> Scheme:
    layers = {f"attention.{ours}": f"self_attn.{theirs}_proj" for ours, theirs in _QKVO.items()}
    layers |= {part: f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    layers |= {f"attention.{side}_norm": f"self_attn.{side[0]}_norm" for side in ("query", "key")}
    return Scheme(
        embedding="model.embed_tokens",
        norm="model.norm",
        output="lm_head",
        layers={part: f"model.layers.{{}}.{name}" for part, name in (layers | dict(norms)).items()},
        norm_offset=norm_offset,
    )


_QKVO = {"query": "q", "key": "k", "value": "v", "out": "o"}
HUGGING_FACE = _hugging_face({"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"})
GEMMA = _hugging_face(
    {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
    norm_offset=1.0,  # its files hold the scales less one
)
GGUF = Scheme(
    embedding="token_embd",
    norm="output_norm",
    output="output",
    layers={
        part: f"blk.{{}}.{name}"
        for part, name in {
            "attention.query": "attn_q",
            "attention.key": "attn_k",
            "attention.value": "attn_v",
            "attention.out": "attn_output",
            "attention.query_norm": "attn_q_norm",
            "attention.key_norm": "attn_k_norm",
            "attention_norm": "attn_norm",
            "attention_post_norm": "post_attention_norm",
            "mlp_norm": "ffn_norm",
            "mlp_post_norm": "post_ffw_norm",
            "gate": "ffn_gate",
            "up": "ffn_up",
            "down": "ffn_down",
        }.items()
    },
)


def tensors(config: DecoderConfig, scheme: Scheme) -> Iterator[Tensor]:
    """Every tensor that a file of this decoder holds."""

    def make(name: str, path: Path, index: int | None = None) -> Tensor:
        matrix = path[-1] == "kernel" and path[-2] not in ("embedding", "output")
        return Tensor(
            name=f"{name}.bias" if path[-1] == "bias" else f"{name}.weight",
            path=path,
            index=index,
            inputs=0 if not matrix else 2 if path[-2] == "out" else 1,
            offset=scheme.norm_offset if path[-1] == "scale" else 0.0,
        )

    yield make(scheme.embedding, ("embedding", "kernel"))
    for layer in range(config.num_layers):
        prefix, index = layer_path(config, layer)
        for part, leaves in _layer_parts(config).items():
            for leaf in leaves:
                yield make(scheme.layers[part].format(layer), (*prefix, *part.split("."), leaf), index)
    yield make(scheme.norm, ("norm", "scale"))
    if not config.tie_embeddings:
        yield make(scheme.output, ("output", "kernel"))


def _layer_parts(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """Parts of a layer and what each holds."""
    kernel, both, scale = ("kernel",), ("kernel", "bias"), ("scale",)
    parts = {f"attention.{part}": both if config.attention_bias else kernel for part in ("query", "key", "value")}
    parts["attention.out"] = both if config.attention_bias is True else kernel
    parts |= dict.fromkeys(("gate", "up", "down"), both if config.mlp_bias else kernel)
    parts |= dict.fromkeys(("attention_norm", "mlp_norm"), scale)
    if config.post_norms:
        parts |= dict.fromkeys(("attention_post_norm", "mlp_post_norm"), scale)
    if config.qk_norm:
        parts |= dict.fromkeys(("attention.query_norm", "attention.key_norm"), scale)
    return parts
