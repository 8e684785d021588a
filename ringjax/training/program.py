"""The program of a run: parameters, optimizer and one training step, on a real mesh or an abstract one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

import ringjax
from ringjax.hopper import ring_options
from ringjax.nnx import Decoder, DecoderConfig, param_shardings

from .config import Config, Optimizer
from .data import VOCAB_SIZE, Batch
from .loading import ConfigError


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Int[Array, ""]  # steps done
    params: dict[str, Any]
    opt_state: Any


class StepMetrics(NamedTuple):
    """What a step reports; all float32 scalars, the same on every device."""

    loss: Float[Array, ""]  # mean over the tokens that have a target, before the update
    grad_norm: Float[Array, ""]  # global norm before clipping
    learning_rate: Float[Array, ""]
    targets: Float[Array, ""]  # number of tokens that have a target


@dataclasses.dataclass(frozen=True)
class Functions:
    """Functions of a run and where their arrays lie."""

    mesh: Mesh | AbstractMesh
    init: Callable[[], TrainState]  # to be jitted with out_shardings
    step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]  # to be jitted, first argument donated
    state: TrainState  # of jax.ShapeDtypeStruct with shardings
    batch: Batch  # of jax.ShapeDtypeStruct with shardings

    @property
    def state_shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)

    @property
    def batch_sharding(self) -> NamedSharding:
        return self.batch["tokens"].sharding  # pyright: ignore[reportReturnType]

    @property
    def compiler_options(self) -> dict[str, int]:
        """XLA's options for the step alone, beside XLA_FLAGS; none for an abstract mesh: nothing is compiled for it."""
        if not isinstance(self.mesh, Mesh):
            return {}
        kind = self.mesh.devices.flat[0].device_kind
        return ring_options(kind, self.mesh.shape["sequence"], os.environ.get("XLA_FLAGS", ""))

    def jit_init(self) -> Any:
        """Creates each parameter in place, sharded; none ever exists whole."""
        return jax.jit(self.init, out_shardings=self.state_shardings)

    def jit_step(self) -> Any:
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        batch = dict.fromkeys(self.batch, self.batch_sharding)
        return jax.jit(
            self.step,
            in_shardings=(self.state_shardings, batch),
            out_shardings=(self.state_shardings, everywhere),
            donate_argnums=0,
        )

    def trace_step(self) -> Any:
        """The step, traced to shapes.

        Raises:
          ConfigError: the ring cannot run as `[ring]` says on this platform.
        """
        try:
            return self.jit_step().trace(self.state, self.batch)
        except NotImplementedError as error:
            raise ConfigError(f"ring.{error}") from error
        except ValueError as error:
            if not str(error).startswith("config."):  # RingConfig's fields, as ring_attention names them
                raise
            raise ConfigError(f"ring.{str(error).removeprefix('config.')}") from error

    def compile_step(self) -> Any:
        """The step, compiled for the devices of the mesh.

        Raises:
          ConfigError: as trace_step.
        """
        return self.trace_step().lower().compile(compiler_options=self.compiler_options or None)


def build(config: Config, mesh: Mesh | AbstractMesh) -> Functions:
    """Makes the program of a configuration. Allocates nothing, so an abstract mesh of any size will do."""
    settings = decoder_config(config)
    optimizer, schedule = make_optimizer(config.optimizer)
    abstract = nnx.eval_shape(lambda: Decoder(settings, mesh=mesh, rngs=nnx.Rngs(config.seed)))
    graph, params = nnx.split(abstract)  # the decoder has no state but parameters

    def init() -> TrainState:
        decoder = Decoder(settings, mesh=mesh, rngs=nnx.Rngs(config.seed))
        fresh = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
        return TrainState(jnp.zeros((), jnp.int32), fresh, optimizer.init(fresh))

    def loss_of(values: dict[str, Any], batch: Batch) -> tuple[Array, Array]:
        filled = jax.tree.map(lambda leaf: leaf, params)  # a copy: replace_by_pure_dict writes into its argument
        nnx.replace_by_pure_dict(filled, values)
        loss, aux = nnx.merge(graph, filled).loss(
            batch["tokens"], batch["targets"], segment_ids=batch["segment_ids"], loss_mask=batch["loss_mask"]
        )
        return loss, aux["tokens"]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        (loss, targets), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        measured = (loss, optax.tree.norm(grads), schedule(state.step), targets)
        metrics = StepMetrics(*(jnp.asarray(value, jnp.float32) for value in measured))
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    shardings = nnx.to_pure_dict(param_shardings(settings, mesh))
    return Functions(mesh, init, step, _abstract_state(init, optimizer, shardings, mesh), _abstract_batch(config, mesh))


def decoder_config(config: Config) -> DecoderConfig:
    """The decoder that `[model]`, `[mesh]` and `[ring]` describe."""
    model = dataclasses.asdict(config.model)
    if model["local_window_size"] is not None:
        model["local_window_size"] = (model["local_window_size"], 0)  # causal: nothing ahead
    return DecoderConfig(
        vocab_size=VOCAB_SIZE,
        **model,
        axis_name="sequence",
        batch_axis_name="data",
        head_axis_name="tensor",
        ring=config.ring.tuning,
        num_shards=config.mesh.sequence,
        layout=ringjax.Striped(stripe=config.ring.stripe) if config.ring.layout == "striped" else config.ring.layout,
    )


def make_optimizer(config: Optimizer) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) with clipping, and its schedule by number of steps done."""
    curve = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_fraction,
    )

    def schedule(done: Any) -> Any:
        return curve(jnp.asarray(done, jnp.float32) + 1)  # the first step of a warmup must not be lost to a rate of 0

    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=_decays
        ),
    )
    return optimizer, schedule


def _decays(params: Any) -> Any:
    """Weight decay is for matrices; the scales of the norms are left alone."""
    return jax.tree.map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path).lower(), params)


def _abstract_state(
    init: Callable[[], TrainState], optimizer: optax.GradientTransformation, params: Any, mesh: Mesh | AbstractMesh
) -> TrainState:
    """Shapes and shardings of the state: moments lie as their parameters do, scalars everywhere."""
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(init)
    moments = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
    )
    shardings = TrainState(everywhere, params, moments)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, shardings)


def _abstract_batch(config: Config, mesh: Mesh | AbstractMesh) -> Batch:
    sharding = NamedSharding(mesh, PartitionSpec("data", "sequence"))
    shape = (config.data.batch_size, config.data.sequence_length)
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "loss_mask": jnp.bool_}
    structs: Any = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}
    return structs
