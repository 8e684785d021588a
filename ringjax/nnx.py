"""Flax NNX layers on ring attention: the attention layer and a decoder built of it. Needs flax."""

from .layers.decoder import Decoder as Decoder
from .layers.decoder import param_shardings as param_shardings
from .layers.decoder import param_specs as param_specs
from .layers.decoder_config import DecoderConfig as DecoderConfig
from .layers.decoder_config import LayerKind as LayerKind
from .layers.decoding import DecoderCache as DecoderCache
from .layers.nnx_attention import RingAttention as RingAttention
from .layers.nnx_attention import partition_shardings as partition_shardings
from .layers.nnx_attention import partition_specs as partition_specs
from .layers.rope_scaling import DynamicScaling as DynamicScaling
from .layers.rope_scaling import FrequencyDivisors as FrequencyDivisors
from .layers.rope_scaling import LinearScaling as LinearScaling
from .layers.rope_scaling import Llama3Scaling as Llama3Scaling
from .layers.rope_scaling import RopeConfig as RopeConfig
from .layers.rope_scaling import YarnScaling as YarnScaling
