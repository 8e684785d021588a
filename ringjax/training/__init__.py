"""Training of decoders: `ringjax train`, and the same from Python. Uses ringjax's public surface only.

What stands here is imported when it is first asked for: a command must say on which devices before JAX starts.
"""

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Batches": "data",
    "CheckpointError": "checkpoints",
    "DataError": "sources",
    "Optimizer": "config",
    "OutputError": "output",
    "TrainingError": "output",
    "fit": "fitting",
}

if TYPE_CHECKING:
    from .checkpoints import CheckpointError as CheckpointError
    from .config import Optimizer as Optimizer
    from .data import Batches as Batches
    from .fitting import fit as fit
    from .output import OutputError as OutputError
    from .output import TrainingError as TrainingError
    from .sources import DataError as DataError
else:

    def __getattr__(name: str) -> Any:
        if name in _WHERE:
            return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_WHERE})
