"""A file of somebody else's model -> a Decoder on a mesh."""

import os
from pathlib import Path
from typing import Any

import jax

from ..config import RingConfig
from ..layers import checks
from ..layers.decoder import Decoder
from ..layers.decoder_config import DecoderConfig
from ..layers.placement import AxisNames
from ..layout import Layout
from .errors import ModelError
from .families import read_config
from .fill import Source, fill
from .gguf import open_gguf
from .huggingface import CONFIG, SafetensorsSource, read_json
from .names import GGUF, Scheme, tensors


def load(
    path: str | os.PathLike[str],
    *,
    mesh: jax.sharding.Mesh | None = None,
    layout: str | Layout = "zigzag",
    num_shards: int | None = None,
    dtype: str = "float32",
    param_dtype: str = "float32",
    axis_name: str = "sp",
    batch_axis_name: AxisNames = None,
    head_axis_name: str | None = None,
    loss_chunk: int = 512,
    remat: bool = True,
    scan_layers: bool = True,
    ring: RingConfig | None = None,
) -> Decoder:
    """A pretrained decoder, read tensor by tensor straight to where its shards belong.

    Its logits are those of the library that wrote the file, in the order of the tokens: ring order of the layout for
    num_shards. Peak memory of the host is about one tensor; a GGUF's tensors are dequantised.

    Args:
      path: a Hugging Face directory (config.json, model.safetensors or several files and their index), or a GGUF file.
      mesh: where the parameters go; None is the mesh of the context, or one device if there is none.
      layout, num_shards, dtype, param_dtype, axis_name, batch_axis_name, head_axis_name, loss_chunk, remat, ring: as in
        :class:`ringjax.nnx.DecoderConfig`.
      scan_layers: likewise. To write tokens on GPUs, False.

    Raises:
      ModelError: a file that is damaged or misses something, tensors that are not those of the configuration, and
        whatever the configuration asks for that is not supported. One sentence that names it.
      ValueError: an option that is not what it must be.
    """
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh of devices, or None. Got {mesh!r}.")
    config, scheme, source = _open(
        Path(path),
        layout=layout,
        num_shards=num_shards,
        dtype=dtype,
        param_dtype=param_dtype,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        head_axis_name=head_axis_name,
        loss_chunk=loss_chunk,
        remat=remat,
        scan_layers=scan_layers,
        ring=RingConfig() if ring is None else ring,
    )
    return fill(config, mesh, tensors(config, scheme), source)


def config_of(path: str | os.PathLike[str], **options: Any) -> DecoderConfig:
    """The configuration of the decoder that :func:`load` makes of the same arguments; no weights are read.

    Args:
      path: as of load.
      options: those of load that are fields of :class:`ringjax.nnx.DecoderConfig`.

    Raises:
      ModelError, ValueError: as load, but for what only the weights can tell.
    """
    return _open(Path(path), **options)[0]


def _open(where: Path, **options: Any) -> tuple[DecoderConfig, Scheme, Source]:
    """The configuration in a file, how its tensors are named, and where they are read."""
    DecoderConfig(8, 1, 8, 1, 1, 8, 8, **options)  # the caller's mistakes first, by their names
    for name in ("dtype", "param_dtype"):
        checks.floating(name, options.get(name, "float32"))
    if where.is_dir():
        family, fields = read_config(read_json(where / CONFIG), str(where / CONFIG))
        scheme, source = family.scheme, SafetensorsSource(where)
        if fields["tie_embeddings"] is True:
            source.drop_copy(f"{scheme.output}.weight", f"{scheme.embedding}.weight")
    elif where.is_file():
        fields, source = open_gguf(where)
        scheme = GGUF
    else:
        raise ModelError(f"path must be a directory or a GGUF file. Got {where}, where there is none.")
    try:
        return DecoderConfig(**fields, **options), scheme, source
    except ValueError as error:
        raise ModelError(f"{where}: {error}") from error
