"""What `import ringjax` shows: every public name, the layers too, without loading Flax before it is asked for."""

import subprocess
import sys

import pytest

import ringjax

FLAX = "any(name.split('.')[0] == 'flax' for name in sys.modules)"
PROGRAMS = {
    "as attributes": f"""
import ringjax
assert {{"nnx", "linen", "ring_attention"}} <= set(dir(ringjax))
assert not {FLAX}
assert ringjax.nnx.Decoder.__name__ == "Decoder"
assert {FLAX}
assert "ringjax.linen" not in sys.modules
assert ringjax.linen.RingAttention is not ringjax.nnx.RingAttention
""",
    "by import": f"""
from ringjax import ring_attention
assert not {FLAX}
from ringjax import linen, nnx
assert {FLAX}
""",
}


@pytest.mark.parametrize("how", PROGRAMS)
def test_layers_come_when_asked_for(how: str):
    code = f"import sys\n{PROGRAMS[how]}"  # in a fresh interpreter, where nothing has imported Flax
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_other_names_are_unknown():
    with pytest.raises(AttributeError, match="module 'ringjax' has no attribute 'ring_atention'"):
        _ = ringjax.ring_atention  # type: ignore[attr-defined]
    assert not hasattr(ringjax, "checks")
