"""What tests that compile for a TPU share: they need libtpu, no TPU."""

import importlib.util
import os

import pytest

# In CI a missing compiler is a failure, not a skip.
_MISSING = importlib.util.find_spec("libtpu") is None and os.environ.get("CI", "").lower() not in ("1", "true")
needs_libtpu = pytest.mark.skipif(_MISSING, reason="libtpu is not installed")
