"""The program of a run: parameters, optimizer and one training step, on a real mesh or an abstract one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

import ringjax
from ringjax.nnx import Decoder, DecoderConfig, param_shardings

from .config import NUM_BYTES, Config, Optimizer
from .data import Batch
from .loading import ConfigError


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Int[Array, ""]  # steps done
    params: dict[str, Any]  # what is updated: float32 masters where the decoder's are of 16 bits
    opt_state: Any


class StepMetrics(NamedTuple):
    """What a step reports; all float32 scalars, the same on every device."""

    loss: Float[Array, ""]  # mean over the tokens that have a target, before the update
    grad_norm: Float[Array, ""]  # global norm before clipping
    learning_rate: Float[Array, ""]
    targets: Float[Array, ""]  # number of tokens that have a target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Functions:
    """Functions of a run and where their arrays lie."""

    mesh: Mesh | AbstractMesh
    config: DecoderConfig
    init: Callable[[], TrainState]  # to be jitted with out_shardings
    start: Callable[[dict[str, Any]], TrainState]  # the same with given parameters
    step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]  # to be jitted, first argument donated
    measure: Callable[[dict[str, Any], Batch], tuple[Array, Array]]  # sum of the cross entropies, number of targets
    decode: Callable[[dict[str, Any]], Decoder]  # a decoder with these parameters
    state: TrainState  # of jax.ShapeDtypeStruct with shardings
    batch: Batch  # of jax.ShapeDtypeStruct with shardings
    part: Batch  # the same, of what runs at a time

    @property
    def state_shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)

    @property
    def batch_sharding(self) -> NamedSharding:
        return self.batch["tokens"].sharding  # pyright: ignore[reportReturnType]

    @property
    def rows(self) -> int:
        """Sequences that run at a time, over all devices."""
        return self.part["tokens"].shape[0]

    def jit_init(self) -> Any:
        """Creates each parameter in place, sharded; none ever exists whole."""
        return jax.jit(self.init, out_shardings=self.state_shardings)

    def begin(self, params: dict[str, Any], *, donate: bool) -> TrainState:
        """The state before the first step, of given parameters; whether they may be used up."""

        def start(params: dict[str, Any]) -> TrainState:
            # A copy: jit may return an argument itself, and the step uses up its state.
            return self.start(params if donate else jax.tree.map(jnp.copy, params))

        run = jax.jit(start, out_shardings=self.state_shardings, donate_argnums=(0,) if donate else ())
        return run(params)

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
        return self.trace_step().lower().compile()

    def compile_measure(self) -> Any:
        """`measure`, compiled; takes `params` of the state and a `part`."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        parts = dict.fromkeys(self.part, self.batch_sharding)
        run = jax.jit(
            self.measure, in_shardings=(self.state_shardings.params, parts), out_shardings=(everywhere, everywhere)
        )
        return run.trace(self.state.params, self.part).lower().compile()


def build(
    config: Config,
    mesh: Mesh | AbstractMesh,
    decoder: DecoderConfig | None = None,
    *,
    shared_length: int | None = None,
) -> Functions:
    """The functions of a configuration.

    Args:
      config: the checked configuration.
      mesh: with the axes "data", "sequence" and "tensor"; of any size where it is abstract.
      decoder: what is trained; None: what `[model]` describes.
      shared_length: of batches of packed documents.
    """
    return assemble(
        decoder_config(config) if decoder is None else decoder,
        config.optimizer,
        mesh,
        batch_shape=(config.data.batch_size, config.data.sequence_length),
        seed=config.seed,
        shared_length=shared_length,
    )


def assemble(
    settings: DecoderConfig,
    optimizer: Optimizer,
    mesh: Mesh | AbstractMesh,
    *,
    batch_shape: tuple[int, int],
    seed: int,
    shared_length: int | None = None,
) -> Functions:
    """Makes the functions of a run. Allocates nothing, so an abstract mesh of any size will do.

    Args:
      settings: of the decoder.
      optimizer: its settings.
      mesh: has the axes that `settings` names.
      batch_shape: (B, T), B a multiple of optimizer.accumulate times the devices on the batch axes.
      seed: of fresh parameters.
      shared_length: of batches of packed documents, which have positions; None: batches have none.
    """
    packed = shared_length is not None
    held = dataclasses.replace(settings, param_dtype=_held_dtype(settings, optimizer))
    update, schedule = make_optimizer(optimizer)
    abstract = nnx.eval_shape(lambda: Decoder(settings, mesh=mesh, rngs=nnx.Rngs(seed)))
    graph, params = nnx.split(abstract)  # the decoder has no state but parameters
    batch = _abstract_batch(settings, mesh, batch_shape, packed=packed)

    def start(given: dict[str, Any]) -> TrainState:
        wide = _cast(given, held.param_dtype)
        return TrainState(jnp.zeros((), jnp.int32), wide, update.init(wide))

    def init() -> TrainState:
        decoder = Decoder(held, mesh=mesh, rngs=nnx.Rngs(seed))
        return start(nnx.to_pure_dict(nnx.state(decoder, nnx.Param)))

    def decode(values: dict[str, Any]) -> Decoder:
        filled = jax.tree.map(lambda leaf: leaf, params)  # a copy: replace_by_pure_dict writes into its argument
        nnx.replace_by_pure_dict(filled, _cast(values, settings.param_dtype))
        return nnx.merge(graph, filled)

    def loss_of(values: dict[str, Any], batch: Batch, shared_length: int | None = shared_length) -> tuple[Array, Array]:
        loss, aux = decode(values).loss(
            batch["tokens"],
            batch["targets"],
            segment_ids=batch["segment_ids"],
            shared_length=shared_length,
            positions=batch.get("positions"),
            loss_mask=batch["loss_mask"],
        )
        return loss, aux["tokens"]

    def measure(values: dict[str, Any], batch: Batch) -> tuple[Array, Array]:
        loss, targets = loss_of(values, batch, None)  # other documents, which promise something else
        return loss * targets, targets

    shardings = nnx.to_pure_dict(param_shardings(settings, mesh))
    state = _abstract_state(init, update, shardings, mesh)
    of_batch = jax.value_and_grad(loss_of, has_aux=True)
    if optimizer.accumulate > 1:
        of_batch = _in_parts(of_batch, optimizer.accumulate, shardings, batch["tokens"].sharding)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        (loss, targets), grads = of_batch(_cast(state.params, settings.param_dtype), batch)
        grads = _cast(grads, held.param_dtype)
        updates, opt_state = update.update(grads, state.opt_state, state.params)
        measured = (loss, optax.tree.norm(grads), schedule(state.step), targets)
        metrics = StepMetrics(*(jnp.asarray(value, jnp.float32) for value in measured))
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    return Functions(
        mesh=mesh,
        config=settings,
        init=init,
        start=start,
        step=step,
        measure=measure,
        decode=decode,
        state=state,
        batch=batch,
        part=_abstract_batch(settings, mesh, (batch_shape[0] // optimizer.accumulate, batch_shape[1]), packed=packed),
    )


def _held_dtype(settings: DecoderConfig, optimizer: Optimizer) -> str:
    """Of the parameters in the state: an update of less than half a unit in the last place is lost to 16 bits."""
    narrow = settings.param_dtype in ("bfloat16", "float16")
    return "float32" if narrow and optimizer.float32_masters else settings.param_dtype


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def _in_parts(of_batch: Any, count: int, shardings: Any, sharding: Any) -> Any:
    """As `of_batch`, ((loss, targets), gradients) of a mean over targets, for `count` parts of a batch in turn.

        mean = sum_i n_i mean_i / sum_i n_i,    n_i targets in part i, sums in float32

    so that the parts weigh what they have in the whole batch's mean, and a part without targets nothing.
    """
    groups = math.prod(sharding.mesh.shape[axis] for axis in axes_of(sharding.spec[0]))
    placed = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))

    def split(x: Array) -> Array:
        """[B, T] -> [count, B / count, T]; each device's rows stay where they are."""
        rows, length = x.shape
        x = x.reshape(groups, count, rows // (groups * count), length).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x.reshape(count, rows // count, length), placed)

    def run(params: dict[str, Any], batch: Batch) -> Any:
        def add(total: Any, part: Batch) -> tuple[Any, Array]:
            (loss, targets), grads = of_batch(params, part)
            weighted = jax.tree.map(lambda x: targets * x.astype(jnp.float32), (loss, grads))
            return jax.tree.map(jnp.add, total, weighted), targets

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        start = (jnp.zeros((), jnp.float32), jax.lax.with_sharding_constraint(zeros, shardings))
        total, targets = jax.lax.scan(add, start, jax.tree.map(split, batch))
        count = jnp.sum(targets)
        loss, grads = jax.tree.map(lambda x: x / jnp.where(count > 0, count, 1), total)
        return (loss, count), grads

    return run


def axes_of(entry: Any) -> tuple[str, ...]:
    """Mesh axes that an entry of a PartitionSpec, or a field of a DecoderConfig, names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def size_of(mesh: Mesh | AbstractMesh, axes: Any) -> int:
    """Devices along these axes."""
    return math.prod(mesh.shape[axis] for axis in axes_of(axes))


def decoder_config(config: Config, vocab_size: int = NUM_BYTES) -> DecoderConfig:
    """The decoder that `[model]`, `[mesh]` and `[ring]` describe, where it is no pretrained one.

    Args:
      config: the checked configuration.
      vocab_size: where `[model]` does not say.
    """
    model = dataclasses.asdict(config.model)
    del model["init_from"]
    if model["vocab_size"] is None:
        model["vocab_size"] = vocab_size
    if model["local_window_size"] is not None:
        model["local_window_size"] = (model["local_window_size"], 0)  # causal: nothing ahead
    return DecoderConfig(**model, **placing(config))


def placing(config: Config) -> dict[str, Any]:
    """Fields of a DecoderConfig that say where and how it runs."""
    return {
        "axis_name": "sequence",
        "batch_axis_name": "data",
        "head_axis_name": "tensor",
        "ring": config.ring.tuning,
        "num_shards": config.mesh.sequence,
        "layout": ringjax.Striped(stripe=config.ring.stripe) if config.ring.layout == "striped" else config.ring.layout,
    }


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
    """Weight decay is for matrices; scales of norms and biases are left alone."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


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


def _abstract_batch(config: DecoderConfig, mesh: Mesh | AbstractMesh, shape: tuple[int, int], *, packed: bool) -> Batch:
    sharding = NamedSharding(mesh, PartitionSpec(config.batch_axis_name, config.axis_name))
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "loss_mask": jnp.bool_}
    dtypes |= {"positions": jnp.int32} if packed else {}
    structs: Any = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}
    return structs
