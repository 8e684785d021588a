"""Flax NNX layers on ring attention: the attention layer and a Llama-architecture decoder built of it. Needs flax."""

from .layers.decoder import Decoder as Decoder
from .layers.decoder import DecoderConfig as DecoderConfig
from .layers.decoder import param_shardings as param_shardings
from .layers.decoder import param_specs as param_specs
from .layers.nnx_attention import RingAttention as RingAttention
from .layers.nnx_attention import partition_shardings as partition_shardings
from .layers.nnx_attention import partition_specs as partition_specs
