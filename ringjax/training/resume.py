"""May this checkpoint be continued with that configuration?"""

from __future__ import annotations

import json
from typing import Any, Literal

from .checkpoints import CheckpointError, Checkpoints
from .loading import flatten

Resume = Literal["auto", "never", "force"]
# Keys that may differ between a checkpoint and the run that continues it: they change when, where and how fast a step
# is computed, not what (a new mesh or ring only rounds differently; more steps stretch the rest of the schedule).
_FREE = ("output", "optimizer.steps", "checkpoint.", "logging.", "devices.", "distributed.", "mesh.", "ring.")


def check_resume(checkpoints: Checkpoints, done: int, about: dict[str, Any], resume: Resume) -> list[str]:
    """Raises CheckpointError if the checkpoint must not be continued; else what there is to tell."""
    where = checkpoints.directory / str(done)
    if resume == "never":
        raise CheckpointError(
            f"--resume never: output must hold no checkpoint. Got {where}; give another output, or move it away."
        )
    then = checkpoints.about(done)
    old, new = flatten(then["config"]), flatten(about["config"])
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    lines = [f"{key} = {json.dumps(new.get(key))} (was {json.dumps(old.get(key))})" for key in differing]
    refused = [line for key, line in zip(differing, lines, strict=True) if not key.startswith(_FREE)]
    if then["text"] != about["text"]:
        refused.append(f"the text itself, fingerprint {about['text']} (was {then['text']})")
    if refused and resume != "force":
        raise CheckpointError(
            f"output: the configuration must agree with the checkpoint {where}. Got " + "; ".join(refused) + ". "
            "Give another output, or --resume force to continue with the new values."
        )
    notes = [f"resuming after step {done} from {where}"]
    changed = [line for line in lines if not line.startswith("output =")]
    return notes + ([f"changed since then: {'; '.join(changed)}"] if changed else [])
