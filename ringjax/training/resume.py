"""From which checkpoint does a run continue, and may it with this configuration?"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

from ringjax.nnx import DecoderConfig

from .checkpoints import CheckpointError, Checkpoints, DamagedError
from .config import Config
from .loading import flatten, to_table

Resume = Literal["auto", "intact", "force", "never"]
# Keys that may differ between a checkpoint and the run that continues it: they change when, where and how fast a step
# is computed, not what (a new mesh or ring only rounds differently; more steps stretch the rest of the schedule).
_FREE = (
    "output", "optimizer.steps", "optimizer.accumulate", "checkpoint.", "logging.", "export.", "devices.",
    "distributed.", "mesh.", "ring.",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """What the user gave, as messages call it."""

    output: str  # where the checkpoints are
    resume: str  # with {} for the value

    def way(self, value: Resume) -> str:
        return self.resume.format(value)


COMMAND = Words(output="output", resume="--resume {}")


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins."""

    done: int  # steps that were done before
    state: Any  # after that step; None: nothing was done yet
    notes: list[str]  # what there is to tell


def find_start(
    checkpoints: Checkpoints, target: Any, about: dict[str, Any], resume: Resume, words: Words = COMMAND
) -> Start:
    """Reads the newest checkpoint.

    Args:
      checkpoints: of the output.
      target: the state, as `Checkpoints.restore` takes it.
      about: {"config": the configuration as a table, "text": the fingerprint of the text}.
      resume: "intact" sets damaged checkpoints aside and takes the newest that is intact; the others refuse a damaged
        one. "force" continues with another configuration, "never" refuses every checkpoint.
      words: for messages.

    Raises:
      CheckpointError: the newest checkpoint must not be continued from.
    """
    steps, notes = checkpoints.steps(), []
    if steps and resume == "never":
        raise CheckpointError(
            f"{words.way('never')}: {words.output} must hold no checkpoint. "
            f"Got {checkpoints.directory / str(steps[0])}; give another {words.output}, or move it away."
        )
    damage: dict[int, DamagedError] = {}
    for step in steps:
        try:
            found = check_resume(checkpoints, step, about, resume, words)
            state = checkpoints.restore(step, target)
        except DamagedError as error:
            damage[step] = error
            continue
        except CheckpointError as error:  # it is intact, but not of this configuration
            if not damage:
                raise
            raise CheckpointError(f"{_damaged(checkpoints, damage)}.\n{error}") from error
        if damage and resume != "intact":
            raise _refusal(checkpoints, damage, intact=step, words=words)
        for broken, error in damage.items():
            moved = checkpoints.set_aside(broken)
            notes.append(f"WARNING: the checkpoint of step {broken} is damaged ({error}); it is now {moved}")
        return Start(step, state, notes + found)
    if damage:
        raise _refusal(checkpoints, damage, intact=None, words=words)
    return Start(0, None, notes)


def check_resume(
    checkpoints: Checkpoints, done: int, about: dict[str, Any], resume: Resume, words: Words = COMMAND
) -> list[str]:
    """Raises CheckpointError if the checkpoint must not be continued; otherwise returns what there is to tell."""
    where = checkpoints.directory / str(done)
    then = checkpoints.about(done)
    if not isinstance(then, dict) or not {"config", "text"} <= then.keys():
        raise DamagedError("its about lacks the configuration or the fingerprint of the text")
    # A key that an older checkpoint lacks is new since then, and had its default.
    old, new = flatten(then["config"]), flatten(about["config"])
    old |= {key: value for key, value in _defaults().items() if key in new and key not in old}
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    lines = [f"{key} = {json.dumps(new.get(key))} (was {json.dumps(old.get(key))})" for key in differing]
    # Packed documents are dealt for so many devices, and to sequences with that in mind.
    dealt = ("mesh.sequence",) if new.get("data.packing") == "balanced" else ()
    refused = [line for key, line in zip(differing, lines, strict=True) if key in dealt or not key.startswith(_FREE)]
    if then["text"] != about["text"]:
        refused.append(f"the text itself, fingerprint {about['text']} (was {then['text']})")
    if refused and resume != "force":
        raise CheckpointError(
            f"{words.output}: the configuration must agree with the checkpoint {where}. Got {'; '.join(refused)}. "
            f"Give another {words.output}, or {words.way('force')} to continue with the new values."
        )
    notes = [f"resuming after step {done} from {where}"]
    changed = [line for line in lines if not line.startswith("output =")]
    return notes + ([f"changed since then: {'; '.join(changed)}"] if changed else [])


def _defaults() -> dict[str, Any]:
    """Of the keys of a run's configuration, and of the decoder that `fit` was given."""
    fields = {f.name: f.default for f in dataclasses.fields(DecoderConfig) if f.default is not dataclasses.MISSING}
    return flatten(to_table(Config())) | flatten({"decoder": json.loads(json.dumps(fields, default=repr))})


def _refusal(
    checkpoints: Checkpoints, damage: dict[int, DamagedError], *, intact: int | None, words: Words
) -> CheckpointError:
    """What is damaged, and what to type."""
    if intact is None:
        start = f"Give another {words.output}, or move {checkpoints.directory} away to start again."
        way = f"No checkpoint is intact. {start}"
    else:
        way = (
            f"The checkpoint of step {intact} is intact: the same with {words.way('intact')} goes on from there, and "
            "keeps what is damaged aside."
        )
    return CheckpointError(f"{_damaged(checkpoints, damage)}. {way}")


def _damaged(checkpoints: Checkpoints, damage: dict[int, DamagedError]) -> str:
    broken = "; ".join(f"{checkpoints.directory / str(step)} is damaged, {error}" for step, error in damage.items())
    return f"checkpoint {broken}"
