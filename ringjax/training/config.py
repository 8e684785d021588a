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

_STRICT = pydantic.ConfigDict(extra="forbid", strict=True)

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]  # loading.py refuses inf and nan
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Model:
    """A decoder of the Llama architecture over bytes; the fields are those of `ringjax.nnx.DecoderConfig`."""

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


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Data:
    """What is read, and the shape of a batch."""

    source: Literal["stdlib", "paths"] = "stdlib"  # the interpreter's own standard library, or `paths`
    paths: tuple[str, ...] = ()  # files, directories and globs; relative ones start at the working directory
    sequence_length: Count = 8192
    batch_size: Count = 1  # sequences per step, over all devices
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
    direction: Literal["forward", "both"] = "forward"
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
    """AdamW under a linear warmup and a cosine decay, with clipping by the global norm."""

    steps: Count = 100
    learning_rate: Positive = 1e-3  # at the end of the warmup
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1  # of learning_rate, after the last step
    warmup_steps: Natural = 10
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    clip_norm: Positive = 1.0


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Checkpoint:
    """When a checkpoint is written. The last step always writes one."""

    every_steps: Count = 50
    keep: Count = 2


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Logging:
    """What a terminal that is not interactive prints; metrics.jsonl gets every step."""

    every_steps: Count = 10


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Devices:
    """Which devices there are."""

    simulate: Natural = 0  # CPU devices that this process simulates; 0: the real ones


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Distributed:
    """More than one process. Absent keys come from the environment, see `devices.py`."""

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
    devices: Devices = Devices()
    distributed: Distributed = Distributed()


def conflicts(config: Config) -> Iterator[str]:
    """Yields one line for each pair of keys that cannot stand together."""
    model, data, mesh, ring = config.model, config.data, config.mesh, config.ring
    for key, value, by, divisor in (
        ("model.num_heads", model.num_heads, "model.num_kv_heads", model.num_kv_heads),
        ("model.num_kv_heads", model.num_kv_heads, "mesh.tensor", mesh.tensor),
        ("model.mlp_dim", model.mlp_dim, "mesh.tensor", mesh.tensor),
        ("data.batch_size", data.batch_size, "mesh.data", mesh.data),
    ):
        if value % divisor:
            yield f"{key}: must be a multiple of {by} = {divisor}. Got {value}."
    if model.head_dim % 2:
        yield f"model.head_dim: must be even (RoPE turns pairs). Got {model.head_dim}."
    unit = {"contiguous": 1, "zigzag": 2, "striped": ring.stripe}[ring.layout] * mesh.sequence
    if data.sequence_length % unit:
        yield (
            f"data.sequence_length: must be a multiple of {unit} (layout {ring.layout!r} on mesh.sequence = "
            f"{mesh.sequence}). Got {data.sequence_length}."
        )
    if ring.stripe != 1 and ring.layout != "striped":
        yield f"ring.stripe: only layout 'striped' has stripes. Got {ring.stripe} with layout {ring.layout!r}."
    try:
        _ = ring.tuning
    except ValueError as error:
        yield str(error).replace("RingConfig: ", "ring.", 1)
    if config.optimizer.warmup_steps >= config.optimizer.steps:
        yield (
            f"optimizer.warmup_steps: must be less than optimizer.steps = {config.optimizer.steps}. "
            f"Got {config.optimizer.warmup_steps}."
        )
    if data.source == "paths" and not data.paths:
        yield "data.paths: must name at least one file, directory or glob when data.source = 'paths'. Got none."
    if data.source == "stdlib" and data.paths:
        yield f"data.paths: only read when data.source = 'paths'. Got {list(data.paths)} with data.source = 'stdlib'."
    if not config.output.strip():
        yield "output: must name a directory. Got an empty string."
