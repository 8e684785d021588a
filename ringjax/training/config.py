"""The configuration of a training run: frozen, strictly typed dataclasses. Starts no JAX.

Every key of a TOML file under `configs/` is a field below; `loading.py` reads the file and words the errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from ringjax import RingConfig

NUM_BYTES = 256  # the vocabulary without a tokenizer
_STRICT = pydantic.ConfigDict(extra="forbid", strict=True)

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]  # loading.py refuses inf and nan
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Model:
    """A decoder of the Llama architecture, or a pretrained one; the fields are those of `ringjax.nnx.DecoderConfig`.

    With `init_from` the architecture is that of its files: only `loss_chunk`, `remat`, `dtype` and `param_dtype` may be
    set beside it.
    """

    init_from: str | None = None  # a Hugging Face directory or GGUF file; absent: fresh parameters
    vocab_size: Count | None = None  # absent: of the tokenizer, without one the 256 bytes
    num_layers: Count = 2
    embed_dim: Count = 128
    num_heads: Count = 4
    num_kv_heads: Count = 2
    head_dim: Count = 32
    mlp_dim: Count = 384
    rope_theta: Positive = 10000.0
    local_window_size: Natural | None = None  # tokens before itself that a token attends to; absent: all of them
    logits_soft_cap: Positive | None = None
    tie_embeddings: bool = True
    norm_eps: Positive = 1e-5
    loss_chunk: Count = 512  # tokens of a shard whose logits exist at one time
    remat: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations
    param_dtype: Literal["float32", "bfloat16"] = "float32"


BESIDE_INIT_FROM = ("init_from", "loss_chunk", "remat", "dtype", "param_dtype")


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Data:
    """What is read, and the shape of a batch."""

    # Python's own standard library, or `paths`: as bytes, as UTF-8 text, as lines of JSON, as .npy files of ids.
    source: Literal["stdlib", "paths", "text", "jsonl", "tokens"] = "stdlib"
    paths: tuple[str, ...] = ()  # files, directories and globs; relative ones start at the working directory
    tokenizer: str | None = None  # a Hugging Face directory or GGUF file; absent: the one beside model.init_from
    text_key: str = "text"  # of a line of JSON; source "jsonl" only
    eval_fraction: Fraction = 0.0  # of the tokens, which training never sees: measured at each checkpoint
    # "stream": documents end to end, cut where a sequence ends; "balanced": whole ones, so that devices work equally
    packing: Literal["stream", "balanced"] = "stream"
    sequence_length: Count = 8192
    batch_size: Count = 1  # sequences per optimizer step, over all devices
    seed: Natural = 0


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Mesh:
    """Devices along each axis; their product is the number of devices."""

    data: Count = 1
    sequence: Count = 1
    tensor: Count = 1

    @property
    def num_devices(self) -> int:
        return self.data * self.sequence * self.tensor


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Ring:
    """How the ring runs: the layout, and every field of `ringjax.RingConfig`, whose defaults these are but for one."""

    layout: Literal["contiguous", "zigzag", "striped"] = "zigzag"
    stripe: Count = 1  # tokens per stripe; striped layout only
    implementation: Literal["xla", "pallas_tpu", "pallas_gpu", "pallas_triton"] | None = None
    strategy: Literal["ring", "all_to_all", "all_gather", "auto"] = "ring"
    direction: Literal["forward", "both"] = "forward"
    rings: Count = 1  # without a common link, on a torus of TPUs
    block_q: Count | None = None
    block_kv: Count | None = None
    unroll: Count | None = None
    dkv_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    interpret: bool = False
    deterministic: bool = True  # a run that was stopped and resumed has the bits of one that was not

    @property
    def tuning(self) -> RingConfig:
        fields = dataclasses.asdict(self)
        del fields["layout"], fields["stripe"]
        return RingConfig(**fields)


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Optimizer:
    """AdamW under a linear warmup and a cosine decay, with clipping by the global norm.

    Attributes:
      steps: how many.
      learning_rate: at the end of the warmup.
      final_fraction: of learning_rate, after the last step.
      warmup_steps: fewer than steps.
      b1, b2, eps, weight_decay: of AdamW.
      clip_norm: of the gradients of all parameters together.
      accumulate: parts of a batch that run one after another: less memory, the same step.
      float32_masters: of bfloat16 parameters: without them small updates are lost.

    Raises:
      ValueError: for a number out of its range; the keys of ``[optimizer]`` have the same ones.
    """

    steps: Count = 100
    learning_rate: Positive = 1e-3  # at the end of the warmup
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1  # of learning_rate, after the last step
    warmup_steps: Natural = 10
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    clip_norm: Positive = 1.0
    accumulate: Count = 1  # parts of a batch that run one after another: less memory, the same step
    float32_masters: bool = True  # of bfloat16 parameters: without them small updates are lost


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Checkpoint:
    """When a checkpoint is written. The last step always writes one."""

    every_steps: Count = 50
    keep: Count = 2


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Logging:
    """What a terminal that is not interactive prints; metrics.jsonl gets every step."""

    every_steps: Count = 10
    tensorboard: bool | None = None  # absent: where tensorboardX or torch's writer is installed


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Export:
    """What is written once all steps are done."""

    path: str | None = None  # of a Hugging Face directory, with the tokenizer; absent: none


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Devices:
    """Which devices there are."""

    simulate: Natural = 0  # CPU devices that this process simulates; 0: the real ones


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Distributed:
    """More than one process. Absent keys come from the environment, where it is a cluster that JAX recognises."""

    initialize: bool | None = None  # absent: when the environment is a cluster that JAX recognises
    coordinator: str | None = None  # "host:port" of process 0
    num_processes: Count | None = None
    process_id: Natural | None = None


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Config:
    """A whole run."""

    output: str = "runs/default"
    seed: Natural = 0  # of the initial parameters
    model: Model = Model()
    data: Data = Data()
    mesh: Mesh = Mesh()
    ring: Ring = Ring()
    optimizer: Optimizer = Optimizer()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    export: Export = Export()
    devices: Devices = Devices()
    distributed: Distributed = Distributed()


def conflicts(config: Config) -> Iterator[str]:
    """Yields one line for each pair of keys that cannot stand together."""
    model, data, mesh, ring, optimizer = config.model, config.data, config.mesh, config.ring, config.optimizer
    if model.init_from is None:  # the sizes of a pretrained model are checked once they are known
        for key, value, by, divisor in (
            ("model.num_heads", model.num_heads, "model.num_kv_heads", model.num_kv_heads),
            ("model.num_kv_heads", model.num_kv_heads, "mesh.tensor", mesh.tensor),
            ("model.mlp_dim", model.mlp_dim, "mesh.tensor", mesh.tensor),
        ):
            if value % divisor:
                yield f"{key}: must be a multiple of {by} = {divisor}. Got {value}."
        if model.head_dim % 2:
            yield f"model.head_dim: must be even (RoPE turns pairs). Got {model.head_dim}."
    elif not model.init_from.strip():
        yield "model.init_from: must name a Hugging Face directory or a GGUF file. Got an empty string."
    if data.batch_size % (optimizer.accumulate * mesh.data):
        parts = f"optimizer.accumulate x mesh.data = {optimizer.accumulate} x {mesh.data}"
        by = f"mesh.data = {mesh.data}" if optimizer.accumulate == 1 else parts
        yield f"data.batch_size: must be a multiple of {by}. Got {data.batch_size}."
    unit = {"contiguous": 1, "zigzag": 2, "striped": ring.stripe}[ring.layout] * mesh.sequence
    if data.sequence_length % unit:
        yield (
            f"data.sequence_length: must be a multiple of {unit} (layout {ring.layout!r} on mesh.sequence = "
            f"{mesh.sequence}). Got {data.sequence_length}."
        )
    if data.packing == "balanced" and ring.layout != "contiguous":
        yield (
            "ring.layout: must be 'contiguous' when data.packing = 'balanced', which deals the tokens itself. "
            f"Got {ring.layout!r}."
        )
    if ring.stripe != 1 and ring.layout != "striped":
        yield f"ring.stripe: only layout 'striped' has stripes. Got {ring.stripe} with layout {ring.layout!r}."
    try:
        _ = ring.tuning
    except ValueError as error:
        yield str(error).replace("RingConfig: ", "ring.", 1)
    if optimizer.warmup_steps >= optimizer.steps:
        yield (
            f"optimizer.warmup_steps: must be less than optimizer.steps = {optimizer.steps}. "
            f"Got {optimizer.warmup_steps}."
        )
    if not optimizer.float32_masters and model.param_dtype == "float32":
        yield "optimizer.float32_masters: must be true where model.param_dtype is 'float32'. Got false."
    yield from _data_conflicts(model, data)
    for key, value in (("output", config.output), ("export.path", config.export.path)):
        if value is not None and not value.strip():
            yield f"{key}: must name a directory. Got an empty string."


def _data_conflicts(model: Model, data: Data) -> Iterator[str]:
    """Where text comes from, and who makes tokens of it."""
    source = f"data.source = {data.source!r}"
    if data.source != "stdlib" and not data.paths:
        yield f"data.paths: must name at least one file, directory or glob when {source}. Got none."
    if data.source == "stdlib" and data.paths:
        yield f"data.paths: must be absent when {source}. Got {list(data.paths)}."
    if data.source != "jsonl" and data.text_key != "text":
        yield f"data.text_key: must be absent unless data.source = 'jsonl'. Got {data.text_key!r} with {source}."
    if data.source == "paths":
        if data.tokenizer is not None:
            yield f"data.tokenizer: must be absent when {source}, which is bytes. Got {data.tokenizer!r}."
        if model.init_from is not None:
            yield (
                "data.source: must be 'text', 'jsonl', 'tokens' or 'stdlib' with model.init_from, whose vocabulary is "
                "not that of bytes. Got 'paths'."
            )
    if data.source in ("text", "jsonl") and data.tokenizer is None and model.init_from is None:
        yield f"data.tokenizer: must name a tokenizer when {source} and there is no model.init_from. Got none."
    if model.init_from is not None:
        return
    of_bytes = data.source in ("stdlib", "paths") and data.tokenizer is None
    if of_bytes and model.vocab_size is not None and model.vocab_size < NUM_BYTES:
        yield f"model.vocab_size: must be at least {NUM_BYTES}, the number of bytes. Got {model.vocab_size}."
    if data.source == "tokens" and data.tokenizer is None and model.vocab_size is None:
        yield f"model.vocab_size: must be given when {source} and there is no data.tokenizer. Got none."
