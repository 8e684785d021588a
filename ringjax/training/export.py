"""The trained decoder as a Hugging Face directory: checked before the run, written whole at its end."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import jax

from ringjax import models
from ringjax.nnx import Decoder, DecoderConfig

from .config import Config
from .loading import ConfigError
from .output import OutputError, TrainingError, reason_of

MARK = "ringjax_export.json"  # says of which run a directory is the export
_WRITTEN = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", MARK)


def check(config: Config, decoder: DecoderConfig, tokenizer: models.Tokenizer | None) -> None:
    """Does nothing where there is no `export.path`.

    Raises:
      ConfigError: the decoder has no family that transformers knows, or there are several processes.
      OutputError: the path is taken, or cannot be written to.
    """
    if config.export.path is None:
        return
    if jax.process_count() > 1:
        raise ConfigError(
            f"export.path: must be absent in a run of several processes. Got {jax.process_count()}; once all steps are "
            "done, the same command on one process exports."
        )
    try:
        models.check_savable(decoder, tokenizer=tokenizer)
    except models.ModelError as error:
        raise ConfigError(f"export.path: {error}") from error
    target = Path(config.export.path)
    _check_free(target, config.output)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent) as probe:
            probe.write(bytes(2**16))
    except OSError as error:
        raise OutputError(
            f"export.path: must lie in a directory that can be written to, on a disk with room. Got {target}: "
            f"{reason_of(error)}."
        ) from error


def write(config: Config, decoder: Decoder, tokenizer: models.Tokenizer | None, *, step: int) -> Path:
    """Writes the directory beside its place and renames it; an earlier export of this run goes once it is there.

    Raises:
      OutputError: the path has been taken since the run began.
      TrainingError: it cannot be written. What was there before is still there.
    """
    target = Path(str(config.export.path))
    _check_free(target, config.output)
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        whole = scratch / "whole"
        models.save(decoder, whole, tokenizer=tokenizer)
        (whole / MARK).write_text(json.dumps({"output": config.output, "step": step}) + "\n", encoding="utf-8")
        if target.exists():
            os.rename(target, scratch / "before")
        try:
            os.rename(whole, target)
        except BaseException:
            if (scratch / "before").exists():
                os.rename(scratch / "before", target)
            raise
    except OSError as error:
        raise TrainingError(f"export.path: could not be written to {target}: {reason_of(error)}.") from error
    finally:
        if scratch is not None and (target.exists() or not (scratch / "before").exists()):
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _check_free(target: Path, output: str) -> None:
    try:
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return
        if target.is_dir() and _is_earlier(target, output):
            return
    except OSError as error:
        raise OutputError(f"export.path: must be readable. Got {target}: {reason_of(error)}.") from error
    raise OutputError(
        f"export.path: must be an empty directory or none, or hold an earlier export of output = {output!r}. "
        f"Got {target}, which holds something."
    )


def _is_earlier(target: Path, output: str) -> bool:
    """Whether all that a directory holds was written by an earlier export of this run."""
    names = {path.name for path in target.iterdir()}
    weights = {name for name in names if name.startswith("model") and ".safetensors" in name}
    if MARK not in names or not names <= weights | {*_WRITTEN}:
        return False
    try:
        mark = json.loads((target / MARK).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(mark, dict) and mark.get("output") == output
