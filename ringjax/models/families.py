"""config.json <-> DecoderConfig, for the families that the decoder can be. Every key is honoured or refused by name."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..layers.decoder_config import DecoderConfig, LayerKind
from ..layers.rope_scaling import RopeConfig
from .errors import ModelError
from .names import GEMMA, HUGGING_FACE, Scheme
from .rope import read_rope, write_rope

# What a configuration says that no logit depends on.
_SILENT = frozenset({
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "model_type",
    "pad_token_id", "pretraining_tp", "torch_dtype", "transformers_version", "transformers.js_config", "use_cache",
    "_attn_implementation_autoset", "cache_implementation", "is_llama_config", "output_attentions",
    "output_hidden_states", "return_dict", "tokenizer_class", "unsloth_fixed", "unsloth_version",
})  # fmt: skip
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_NOTHING: tuple[Any, ...] = (None, False, {}, [], 0, 0.0)  # a key with such a value asks for nothing


class Keys:
    """The keys of a configuration, each of which is taken once; what is left over is refused."""

    def __init__(self, given: Mapping[str, Any], file: str):
        self._given, self.file = dict(given), file
        self._taken: set[str] = set(_SILENT)

    def take(self, key: str, *default: Any) -> Any:
        """The value of a key; without a default it must be there. A default of None stands for null too."""
        self._taken.add(key)
        value = self._given.get(key)
        if value is None and default:
            return default[0]
        if value is None:
            raise ModelError(f"{self.file} must have the key {key!r}. Got none.")
        return value

    def require(self, key: str, default: Any, allowed: Iterable[Any], what: str) -> Any:
        """A key whose value must be one of few."""
        value = self.take(key, default)
        if value not in tuple(allowed):
            names = ", ".join(map(repr, allowed))
            raise ModelError(f"{self.file}: {key} must be one of {names}: {what}. Got {value!r}.")
        return value

    def finish(self, model: str) -> None:
        for key, value in self._given.items():
            if key not in self._taken and value not in _NOTHING:
                raise ModelError(
                    f"{self.file}: {key} must be absent for {model}: ringjax does not honour it. Got {value!r}."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of model.

    Attributes:
      model_type, architecture: as config.json names it.
      read: the family's own keys as fields of DecoderConfig. Given keys and the fields so far.
      write: the family's own keys of a decoder.
      fits: whether a decoder is of this family; the first family that fits is written.
    """

    model_type: str
    architecture: str
    read: Callable[[Keys, dict[str, Any]], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]]
    fits: Callable[[DecoderConfig], bool]
    tied: bool = False  # where the file does not say
    head_dim: int | None = None  # likewise; None: embed_dim / num_heads
    scheme: Scheme = HUGGING_FACE


def read_config(given: Mapping[str, Any], file: str = "config.json") -> tuple[Family, dict[str, Any]]:
    """The family of a configuration, and fields of a DecoderConfig.

    Raises:
      ModelError: for a family, a key or a value that is not supported.
    """
    named = given.get("architectures") or [None]
    found = [f for f in FAMILIES if f.architecture == named[0] or (named == [None] and _type(given) == f.model_type)]
    if len(named) != 1 or not found:
        known = ", ".join(sorted(f.architecture for f in FAMILIES))
        shown = named[0] if len(named) == 1 and named[0] else named if named != [None] else given.get("model_type")
        raise ModelError(f"{file}: architectures must be one of {known}. Got {shown!r}.{_why(str(shown))}")
    family, keys = found[0], Keys(given, file)
    heads, embed = keys.take("num_attention_heads"), keys.take("hidden_size")
    head_dim = keys.take("head_dim", family.head_dim)
    if head_dim is None and (not isinstance(heads, int) or not isinstance(embed, int) or heads < 1 or embed % heads):
        raise ModelError(f"{file}: head_dim must be given where num_attention_heads does not divide hidden_size.")
    fields: dict[str, Any] = {
        "vocab_size": keys.take("vocab_size"),
        "num_layers": keys.take("num_hidden_layers"),
        "embed_dim": embed,
        "num_heads": heads,
        "num_kv_heads": keys.take("num_key_value_heads", heads if family.model_type == "llama" else None),
        "head_dim": embed // heads if head_dim is None else head_dim,
        "mlp_dim": keys.take("intermediate_size"),
        "norm_eps": keys.take("rms_norm_eps", 1e-6),
        "tie_embeddings": keys.take("tie_word_embeddings", family.tied),
    }
    if fields["num_kv_heads"] is None:
        raise ModelError(f"{file} must have the key 'num_key_value_heads'. Got none.")
    keys.require("attention_dropout", 0.0, (0, 0.0), "there is no dropout")
    try:
        fields |= family.read(keys, fields)
    except ModelError:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as error:  # a word where a number belongs, or a 0
        raise ModelError(f"{file} must have values as {family.architecture} has them. Got: {error}.") from error
    keys.take("max_position_embeddings", None)  # of RoPE's scalings; else it says nothing
    keys.finish(family.architecture)
    return family, fields


def _type(given: Mapping[str, Any]) -> Any:
    return given.get("model_type")


def _why(name: str) -> str:
    if any(word in name.lower() for word in ("moe", "gptoss", "gpt_oss", "mixtral")):
        return " Mixtures of experts are not supported."
    if "conditionalgeneration" in name.lower():
        return " Of models that see or hear, none is supported."
    return ""


def write_config(config: DecoderConfig) -> tuple[Family, dict[str, Any]]:
    """The family that a decoder belongs to, and its config.json.

    Raises:
      ModelError: no family has these options.
    """
    for family in FAMILIES:
        if not config.use_sinks and config.rotary_dim is None and family.fits(config):
            break
    else:
        raise ModelError(f"the decoder must be one of {', '.join(f.model_type for f in FAMILIES)}. Got {config}.")
    given = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "torch_dtype": config.param_dtype,
    }
    return family, given | family.write(config)


# ------------------------------------------------------------------------------------------------------- windows


def _window(keys: Keys, key: str, default: int | None = None) -> tuple[int, int] | None:
    """Files count the token itself: of W tokens, W - 1 lie before it."""
    size = keys.take(key, default)
    if size is None:
        return None
    if not isinstance(size, int) or size < 1:
        raise ModelError(f"{keys.file}: {key} must be a positive integer. Got {size!r}.")
    return size - 1, 0


def _window_size(config: DecoderConfig) -> int | None:
    """W of a decoder, where its layers have one window or none; -1 where they have several."""
    sizes = {w if isinstance(w, int) else w[0] for w, _ in config.period if w is not None}
    sizes -= {None}
    return None if not sizes else 1 + sizes.pop() if len(sizes) == 1 else -1  # type: ignore[operator]


def _sliding(config: DecoderConfig) -> list[bool]:
    kinds = [window not in (None, (None, 0), (None, None)) for window, _ in config.period]
    return [kinds[layer % len(kinds)] for layer in range(config.num_layers)]


def _layer_types(config: DecoderConfig) -> list[str]:
    return ["sliding_attention" if sliding else "full_attention" for sliding in _sliding(config)]


def _pattern(keys: Keys, types: list[str], num_layers: int, kinds: Mapping[str, LayerKind]) -> dict[str, Any]:
    """Fields for a list of layers' types: the shortest pattern that gives it."""
    if not isinstance(types, list) or len(types) != num_layers or not set(types) <= set(kinds):
        raise ModelError(
            f"{keys.file}: layer_types must name {num_layers} layers, each {' or '.join(kinds)}. Got {types}."
        )
    period = next(n for n in range(1, num_layers + 1) if all(types[i] == types[i % n] for i in range(num_layers)))
    if period == 1 and kinds[types[0]].rope is None:
        return {"local_window_size": kinds[types[0]].local_window_size}
    return {"layer_pattern": tuple(kinds[name] for name in types[:period])}


def _one_rope(config: DecoderConfig) -> bool:
    return len({rope for _, rope in config.period}) == 1


def _rope_fields(rope: RopeConfig) -> dict[str, Any]:
    return {"rope_theta": rope.theta, "rope_scaling": rope.scaling}


# ------------------------------------------------------------------------------------------------------ families


def _activation(keys: Keys, *names: str) -> dict[str, Any]:
    named = [keys.take(name, None) for name in names]  # the first that is there counts
    given = next((name for name in named if name is not None), "silu")
    if given not in _ACTIVATIONS:
        raise ModelError(f"{keys.file}: {names[0]} must be one of {', '.join(map(repr, _ACTIVATIONS))}. Got {given!r}.")
    return {"activation": _ACTIVATIONS[given]}


def _plain(config: DecoderConfig) -> bool:
    """Without anything that only Gemma has."""
    return (
        not config.post_norms
        and config.activation == "silu"
        and config.embedding_scale == 1
        and config.logits_soft_cap is config.output_soft_cap is None
        and config.attention_scale in (None, config.head_dim**-0.5)
        and _one_rope(config)
        and _window_size(config) != -1
    )


def _read_llama(keys: Keys, fields: dict[str, Any]) -> dict[str, Any]:
    own = {"attention_bias": keys.take("attention_bias", False), "mlp_bias": keys.take("mlp_bias", False)}
    return own | _activation(keys, "hidden_act") | _rope_fields(read_rope(keys))


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    bias = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias, "hidden_act": "silu"}
    return bias | write_rope(config.period[0][1])


def _read_mistral(keys: Keys, fields: dict[str, Any]) -> dict[str, Any]:
    window = {"local_window_size": _window(keys, "sliding_window")}
    return window | _activation(keys, "hidden_act") | _rope_fields(read_rope(keys))


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
    return {"sliding_window": _window_size(config), "hidden_act": "silu"} | write_rope(config.period[0][1])


def _read_qwen(keys: Keys, fields: dict[str, Any]) -> dict[str, Any]:
    layers, used = fields["num_layers"], keys.take("use_sliding_window", False)
    window, first = _window(keys, "sliding_window"), keys.take("max_window_layers", 28)
    own = _activation(keys, "hidden_act") | _rope_fields(read_rope(keys))
    sliding = bool(used) and window is not None
    default = ["sliding_attention" if sliding and i >= first else "full_attention" for i in range(layers)]
    types = keys.take("layer_types", default)
    kinds = {"full_attention": LayerKind()}
    if sliding:
        kinds["sliding_attention"] = LayerKind(local_window_size=window)
    return own | _pattern(keys, types, layers, kinds)


def _read_qwen2(keys: Keys, fields: dict[str, Any]) -> dict[str, Any]:
    return _read_qwen(keys, fields) | {"attention_bias": "qkv"}


def _read_qwen3(keys: Keys, fields: dict[str, Any]) -> dict[str, Any]:
    return _read_qwen(keys, fields) | {"qk_norm": True, "attention_bias": keys.take("attention_bias", False)}


def _write_qwen(config: DecoderConfig) -> dict[str, Any]:
    size, sliding = _window_size(config), _sliding(config)
    # Versions of transformers that know no layer_types go by the first layer of a window.
    first = sliding.index(True) if any(sliding) else config.num_layers
    given = {"hidden_act": "silu", "layer_types": _layer_types(config), "max_window_layers": first}
    given |= {"use_sliding_window": size is not None, "sliding_window": size}
    if config.qk_norm:
        given["attention_bias"] = config.attention_bias
    return given | write_rope(config.period[0][1])


def _read_gemma(keys: Keys, fields: dict[str, Any]) -> dict[str, Any]:
    keys.require("use_bidirectional_attention", False, (False,), "attention is causal")
    return _activation(keys, "hidden_activation", "hidden_act") | {
        "attention_bias": keys.take("attention_bias", False),
        "attention_scale": float(keys.take("query_pre_attn_scalar", 256)) ** -0.5,
        "embedding_scale": math.sqrt(fields["embed_dim"]),
        "post_norms": True,
    }


def _read_gemma2(keys: Keys, fields: dict[str, Any]) -> dict[str, Any]:
    window, layers = _window(keys, "sliding_window", 4096), fields["num_layers"]
    default = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    kinds = {"sliding_attention": LayerKind(local_window_size=window), "full_attention": LayerKind()}
    caps = {
        "logits_soft_cap": keys.take("attn_logit_softcapping", None),
        "output_soft_cap": keys.take("final_logit_softcapping", None),
    }
    own = _read_gemma(keys, fields) | caps | _rope_fields(read_rope(keys))
    return own | _pattern(keys, keys.take("layer_types", default), layers, kinds)


def _read_gemma3(keys: Keys, fields: dict[str, Any]) -> dict[str, Any]:
    window, layers = _window(keys, "sliding_window", 4096), fields["num_layers"]
    every = keys.take("sliding_window_pattern", keys.take("_sliding_window_pattern", 6))
    default = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    near = read_rope(keys, "sliding_attention", theta_key="rope_local_base_freq", theta=1e4)
    far = read_rope(keys, "full_attention", theta=1e6)
    kinds = {
        "sliding_attention": LayerKind(local_window_size=window, rope=near),
        "full_attention": LayerKind(rope=far),
    }
    caps = {
        "logits_soft_cap": keys.take("attn_logit_softcapping", None),
        "output_soft_cap": keys.take("final_logit_softcapping", None),
    }
    own = _read_gemma(keys, fields) | caps | _rope_fields(far) | {"qk_norm": True}
    return own | _pattern(keys, keys.take("layer_types", default), layers, kinds)


def _is_gemma(config: DecoderConfig) -> bool:
    scaled = math.isclose(config.embedding_scale, math.sqrt(config.embed_dim), rel_tol=1e-6)
    positive = config.attention_scale is None or config.attention_scale > 0
    return config.post_norms and scaled and positive and not config.mlp_bias and config.attention_bias != "qkv"


def _write_gemma(config: DecoderConfig) -> dict[str, Any]:
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    pre = scale**-2
    window = _window_size(config)
    return {
        "hidden_activation": {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[config.activation],
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": round(pre) if math.isclose(pre, round(pre), rel_tol=1e-9) else pre,
        "attn_logit_softcapping": config.logits_soft_cap,
        "final_logit_softcapping": config.output_soft_cap,
        "layer_types": _layer_types(config),
        "sliding_window": 4096 if window is None else window,
    }


def _write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    return _write_gemma(config) | write_rope(config.period[0][1])


def _gemma3_ropes(config: DecoderConfig) -> dict[bool, set[RopeConfig]]:
    """The rotary embeddings of the layers without a window, and of those with one."""
    found: dict[bool, set[RopeConfig]] = {False: set(), True: set()}
    for sliding, (_, rope) in zip(_sliding(config), config.period, strict=False):
        found[sliding].add(rope)
    return found


def _fits_gemma3(config: DecoderConfig) -> bool:
    ropes = _gemma3_ropes(config)
    plain = all(rope.scaling is None for rope in ropes[True])
    return _is_gemma(config) and config.qk_norm and plain and all(len(r) <= 1 for r in ropes.values())


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    ropes = _gemma3_ropes(config)
    far = next(iter(ropes[False] or ropes[True]))
    near = next(iter(ropes[True] or ropes[False]))
    return _write_gemma(config) | write_rope(far) | {"rope_local_base_freq": near.theta}


FAMILIES = (
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        read=_read_llama,
        write=_write_llama,
        fits=lambda c: _plain(c) and not c.qk_norm and c.attention_bias != "qkv" and _window_size(c) is None,
    ),
    Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        read=_read_mistral,
        write=_write_mistral,
        fits=lambda c: _plain(c) and not (c.qk_norm or c.attention_bias or c.mlp_bias) and all(_sliding(c)),
    ),
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        read=_read_qwen2,
        write=_write_qwen,
        fits=lambda c: _plain(c) and not c.qk_norm and c.attention_bias == "qkv" and not c.mlp_bias,
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        read=_read_qwen3,
        write=_write_qwen,
        fits=lambda c: _plain(c) and c.qk_norm and c.attention_bias != "qkv" and not c.mlp_bias,
        head_dim=128,
    ),
    Family(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        read=_read_gemma2,
        write=_write_gemma2,
        fits=lambda c: _is_gemma(c) and not c.qk_norm and _one_rope(c) and _window_size(c) != -1,
        tied=True,
        head_dim=256,
        scheme=GEMMA,
    ),
    Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        read=_read_gemma3,
        write=_write_gemma3,
        fits=lambda c: _fits_gemma3(c) and _window_size(c) != -1,
        tied=True,
        head_dim=256,
        scheme=GEMMA,
    ),
)
