"""Flax NNX layers on ring attention: the attention layer and a Llama-architecture decoder built of it. Needs flax."""

from ._nnx_layer import RingAttention as RingAttention
from ._nnx_layer import partition_shardings as partition_shardings
from ._nnx_layer import partition_specs as partition_specs
from .decoder import Decoder as Decoder
from .decoder import DecoderConfig as DecoderConfig
from .decoder import param_shardings as param_shardings
from .decoder import param_specs as param_specs
