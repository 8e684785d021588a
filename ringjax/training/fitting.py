"""Training from Python: what `ringjax train` does with a configuration, with a decoder and batches at hand."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType

import ringjax
from ringjax.nnx import Decoder, DecoderConfig, partition_shardings

from . import metrics, processes, program
from .checkpoints import Checkpoints
from .config import Optimizer
from .data import Batches
from .resume import Resume, Words, find_start
from .steps import Record, Steps

_PLACING = ("axis_name", "batch_axis_name", "head_axis_name", "ring", "num_shards", "layout")


def fit(
    model: Decoder | DecoderConfig,
    batches: Batches,
    *,
    steps: int | None = None,
    optimizer: Optimizer | None = None,
    held_out: Batches | None = None,
    mesh: jax.sharding.Mesh | None = None,
    seed: int = 0,
    callback: Callable[[Record], None] | None = None,
    directory: str | os.PathLike[str] | None = None,
    every: int = 50,
    keep: int = 2,
    resume: Resume = "auto",
) -> tuple[Decoder, list[Record]]:
    """Trains a decoder: AdamW with warmup, cosine decay and clipping, on batches that depend on their number alone.

    Args:
      model: a decoder, which stays as it is, or the configuration of a fresh one.
      batches: of :meth:`Batches.from_tokens`, in the decoder's layout and for the devices on its ring.
      steps: how many; takes the place of optimizer.steps. None: optimizer.steps.
      optimizer: the other settings. None: the defaults, with a warmup shorter than the steps.
      held_out: batches of documents to measure on; each of their tokens is measured once.
      mesh: of a fresh decoder; None: that of the context, or one device. A decoder has its own.
      seed: of a fresh decoder's parameters.
      callback: is called with the record of each step: "step", "loss" (nats per token), "grad_norm", "learning_rate",
        "tokens", "targets", "tokens_per_second", "step_seconds", and where it was measured "eval_loss" and
        "eval_perplexity". What it raises ends the training.
      directory: gets metrics.jsonl and checkpoints/; the same call goes on from the newest checkpoint, on any mesh.
        None: neither is written.
      every: steps from one checkpoint, and measurement of `held_out`, to the next; the last step has both.
      keep: how many of the newest checkpoints stay.
      resume: "auto", "intact", "force" or "never", as in `ringjax train --resume`.

    Returns:
      (decoder, history): with parameters of the decoder's param_dtype, and the records of all steps, those before a
      resume included.

    Raises:
      ValueError: an argument is not what it must be. It names the argument, what is required and what was given.
      OutputError, CheckpointError: the directory cannot be written to, or holds what must not be continued.
      TrainingError: the loss is not finite, or a checkpoint cannot be written.
    """
    settings = model.config if isinstance(model, Decoder) else model
    if not isinstance(settings, DecoderConfig):
        raise ValueError(f"model must be a Decoder or a DecoderConfig. Got {type(model).__name__}.")
    for name, value in (("batches", batches), ("held_out", held_out)):
        if not isinstance(value, Batches) and not (name == "held_out" and value is None):
            raise ValueError(f"{name} must be of Batches.from_tokens. Got {type(value).__name__}.")
    for name, number in (("every", every), ("keep", keep)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{name} must be an integer of at least 1. Got {number!r}.")
    if resume not in ("auto", "intact", "force", "never"):
        raise ValueError(f"resume must be 'auto', 'intact', 'force' or 'never'. Got {resume!r}.")
    if isinstance(model, Decoder) and mesh is not None:
        raise ValueError(f"mesh must be None for a Decoder, which has its own. Got {mesh!r}.")
    chosen = _optimizer(steps, optimizer)
    given = _mesh(settings, model.mesh if isinstance(model, Decoder) else mesh)
    where = jax.sharding.Mesh(given.devices, given.axis_names)  # with Auto axes: XLA places the optimizer's arrays
    for name, value in (("batches", batches), ("held_out", held_out)):
        if value is not None:
            _check_batches(name, value, settings, where, chosen)
    if held_out is not None and held_out.names != batches.names:
        raise ValueError(
            f"held_out must have the packing of batches, {batches.config.packing!r}. Got {held_out.config.packing!r}."
        )

    shape = (batches.config.batch_size, batches.config.sequence_length)
    made = program.assemble(settings, chosen, where, batch_shape=shape, seed=seed, shared_length=batches.shared_length)
    about = _about(settings, batches, held_out, chosen, seed if isinstance(model, DecoderConfig) else None)
    output = None if directory is None else Path(directory)
    with contextlib.ExitStack() as stack:
        if not jax.sharding.get_mesh().empty:
            stack.enter_context(jax.set_mesh(where))
        checkpoints, done, state, history = None, 0, None, []
        if output is not None:
            processes.prepare_output(output, name="directory")
            checkpoints = stack.enter_context(Checkpoints(output / "checkpoints", keep=keep))
            start = find_start(checkpoints, made.state, about, resume, Words(output="directory", resume="resume='{}'"))
            done, state = start.done, start.state
            history = [record for record in metrics.read(output / "metrics.jsonl") if record["step"] <= done]
        run = Steps(
            functions=made,
            batches=batches,
            held_out=held_out,
            total=chosen.steps,
            every=every,
            checkpoints=checkpoints,
            about=about,
        )
        if state is None:
            state = made.begin(_params(model, made), donate=False) if isinstance(model, Decoder) else made.jit_init()()
        if done < chosen.steps:
            compiled = run.compile()
            file = None
            if output is not None and jax.process_index() == 0:
                file = stack.enter_context(metrics.MetricsFile(output / "metrics.jsonl", done=done))

            def report(record: Record) -> None:
                if file is not None:
                    file.write(record)
                history.append(record)
                if callback is not None:
                    callback(record)

            state, _, _ = run.run(compiled, state, done, report=report, stopping=lambda: None)
        if checkpoints is not None:
            checkpoints.wait()
        trained = nnx.state(made.decode(state.params))
    return _placed(model, mesh, given, trained), history


def _optimizer(steps: int | None, given: Optimizer | None) -> Optimizer:
    if given is not None and not isinstance(given, Optimizer):
        raise ValueError(f"optimizer must be an Optimizer or None. Got {type(given).__name__}.")
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ValueError(f"steps must be an integer of at least 1, or None. Got {steps!r}.")
    if given is None:
        default = Optimizer() if steps is None else Optimizer(steps=steps)
        return dataclasses.replace(default, warmup_steps=min(default.warmup_steps, default.steps - 1))
    chosen = given if steps is None else dataclasses.replace(given, steps=steps)
    if chosen.warmup_steps >= chosen.steps:
        raise ValueError(
            f"optimizer.warmup_steps must be less than the number of steps, {chosen.steps}. Got {chosen.warmup_steps}."
        )
    return chosen


def _mesh(settings: DecoderConfig, mesh: Any) -> jax.sharding.Mesh:
    """The given one, that of the context, or one device with all axes that the decoder names."""
    if mesh is None:
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            names = _named(settings)
            shape = (1,) * len(names)
            return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=jax.devices()[:1])
    if not isinstance(mesh, jax.sharding.Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh of devices, or None. Got {mesh!r}.")
    absent = [axis for axis in _named(settings) if axis not in mesh.shape]
    if absent:
        raise ValueError(f"mesh must have the axes that the decoder names, {_named(settings)}. Got {mesh}.")
    return mesh


def _named(settings: DecoderConfig) -> tuple[str, ...]:
    axes = (settings.batch_axis_name, settings.axis_name, settings.head_axis_name)
    return tuple(name for entry in axes for name in program.axes_of(entry))


def _check_batches(
    name: str, batches: Batches, settings: DecoderConfig, mesh: jax.sharding.Mesh, optimizer: Optimizer
) -> None:
    ring = program.size_of(mesh, settings.axis_name)
    shards = ring if settings.num_shards is None else settings.num_shards
    if ring not in (1, shards):
        raise ValueError(f"model.config.num_shards must be the {ring} devices on the ring. Got {shards}.")
    if batches.num_shards != shards:
        raise ValueError(f"{name} must be dealt for num_shards = {shards}, as the decoder. Got {batches.num_shards}.")
    length = batches.config.sequence_length
    orders = [ringjax.ring_positions(length, layout=x, num_shards=shards) for x in (settings.layout, batches.layout)]
    if not np.array_equal(orders[0], orders[1]):
        raise ValueError(f"{name} must have the decoder's layout, {settings.layout!r}. Got {batches.layout!r}.")
    largest = int(batches.corpus.text.max())
    if largest >= settings.vocab_size:
        raise ValueError(f"{name} must hold ids below the decoder's vocab_size, {settings.vocab_size}. Got {largest}.")
    rows = optimizer.accumulate * program.size_of(mesh, settings.batch_axis_name)
    if name == "batches" and batches.config.batch_size % rows:
        raise ValueError(
            f"batches must have a batch_size that is a multiple of optimizer.accumulate times the devices on the batch "
            f"axes, {rows}. Got {batches.config.batch_size}."
        )
    if batches.config.sequence_length % ring:
        raise ValueError(
            f"{name} must have a sequence_length that is a multiple of the {ring} devices on the ring. "
            f"Got {batches.config.sequence_length}."
        )


def _about(
    settings: DecoderConfig, batches: Batches, held_out: Batches | None, optimizer: Optimizer, seed: int | None
) -> dict[str, Any]:
    """What a checkpoint must agree with, in the form of a run's configuration."""
    decoder = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name not in _PLACING}
    data = {name: getattr(batches.config, name) for name in ("sequence_length", "batch_size", "seed", "packing")}
    if batches.shared_length is not None:  # dealt with the number of devices in mind
        data["num_shards"] = batches.num_shards
    held = None if held_out is None else held_out.corpus.fingerprint
    table = {
        "decoder": decoder,
        "data": data,
        "optimizer": dataclasses.asdict(optimizer),
        "held_out": held,
        "seed": seed,
    }
    return {"config": json.loads(json.dumps(table, default=repr)), "text": batches.corpus.fingerprint}


def _params(model: Decoder, made: program.Functions) -> dict[str, Any]:
    return jax.device_put(nnx.to_pure_dict(nnx.state(model)), made.state_shardings.params)


def _placed(
    model: Decoder | DecoderConfig, mesh: jax.sharding.Mesh | None, given: jax.sharding.Mesh, trained: nnx.State
) -> Decoder:
    """The trained parameters where the given decoder has its own, or on the mesh of a fresh one."""
    if isinstance(model, Decoder):
        graph, state = nnx.split(model)
        return nnx.merge(graph, jax.device_put(trained, jax.tree.map(lambda leaf: leaf.sharding, state)))
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(model, mesh=mesh, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, jax.device_put(trained, partition_shardings(state, given)))
