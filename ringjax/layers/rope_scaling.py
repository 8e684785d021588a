"""Scalings of RoPE's frequencies, with which a model reads further than it was trained for, in float64.

Letters: R features that turn, s factor, L0 the length that the model was trained for before scaling.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from . import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """f / s: positions are interpolated (arXiv:2306.15595).

    Attributes:
      factor: s, at least 1.
    """

    factor: float

    def __post_init__(self) -> None:
        _settle(self, factor=_at_least_one("factor", self.factor))

    @property
    def amplitude(self) -> float:
        """The factor on cosine and sine."""
        return 1.0

    def frequencies(self, frequency: np.ndarray, theta: float, length: int | None) -> np.ndarray:
        """The scaled frequencies [R / 2] for a base and a length of the sequence."""
        del theta, length  # Unused.
        return frequency / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """A base that grows with the sequence: theta (s T / L0 - (s - 1))^(R / (R - 2)) from T = L0 on ("dynamic NTK").

    T is the length of the call: a sequence that is padded to a longer one is rotated as the longer one.

    Attributes:
      factor, original_length: s and L0.
    """

    factor: float
    original_length: int

    def __post_init__(self) -> None:
        _settle(
            self,
            factor=_at_least_one("factor", self.factor),
            original_length=checks.positive_integer("original_length", self.original_length),
        )

    @property
    def amplitude(self) -> float:
        return 1.0

    def frequencies(self, frequency: np.ndarray, theta: float, length: int | None) -> np.ndarray:
        if length is None:
            raise NotImplementedError(
                "DynamicScaling needs the length of the sequence, which positions= does not say. Got length=None."
            )
        if frequency.size < 2:
            raise ValueError(f"DynamicScaling needs at least 4 features that turn. Got {2 * frequency.size}.")
        turning = 2 * frequency.size
        grown = self.factor * max(length, self.original_length) / self.original_length - (self.factor - 1)
        base = theta * grown ** (turning / (turning - 2))
        return base ** (-np.arange(0, turning, 2, dtype=np.float64) / turning)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's: f / s for waves longer than L0 / low, f for waves shorter than L0 / high, a mix between the two.

    Attributes:
      factor, original_length: s and L0.
      low_freq_factor, high_freq_factor: low and high; high is the larger.

    Reference: The Llama 3 Herd of Models, arXiv:2407.21783.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def __post_init__(self) -> None:
        _settle(
            self,
            factor=_at_least_one("factor", self.factor),
            low_freq_factor=checks.positive_number("low_freq_factor", self.low_freq_factor),
            high_freq_factor=checks.positive_number("high_freq_factor", self.high_freq_factor),
            original_length=checks.positive_integer("original_length", self.original_length),
        )
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must be larger than low_freq_factor, {self.low_freq_factor}. "
                f"Got {self.high_freq_factor}."
            )

    @property
    def amplitude(self) -> float:
        return 1.0

    def frequencies(self, frequency: np.ndarray, theta: float, length: int | None) -> np.ndarray:
        del theta, length  # Unused.
        turns = self.original_length * frequency / (2 * math.pi)  # within the original length
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): f / s for slow frequencies, f for fast ones, and a ramp between, over their index.

    Attributes:
      factor, original_length: s and L0.
      beta_fast, beta_slow: turns within L0 from which on a frequency is kept, and up to which it is divided.
      attention_factor: on cosine and sine, so that logits grow by its square; None is 0.1 ln(s) + 1.
      truncate: the ends of the ramp are rounded outwards to whole indices.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        given = self.attention_factor
        _settle(
            self,
            factor=_at_least_one("factor", self.factor),
            original_length=checks.positive_integer("original_length", self.original_length),
            beta_fast=checks.positive_number("beta_fast", self.beta_fast),
            beta_slow=checks.positive_number("beta_slow", self.beta_slow),
            attention_factor=None if given is None else checks.positive_number("attention_factor", given, " or None"),
            truncate=checks.flag("truncate", self.truncate),
        )
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast must be at least beta_slow, {self.beta_slow}. Got {self.beta_fast}.")

    @property
    def amplitude(self) -> float:
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def frequencies(self, frequency: np.ndarray, theta: float, length: int | None) -> np.ndarray:
        del length  # Unused.
        if theta <= 1:
            raise ValueError(f"YarnScaling needs a base of the frequencies above 1. Got {theta}.")
        turning = 2 * frequency.size

        def index(turns: float) -> float:
            """Of the frequency that makes so many turns within the original length."""
            return turning * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, turning - 1)
        if low == high:
            high += 0.001  # a step, not a division by zero
        divided = np.clip((np.arange(frequency.size) - low) / (high - low), 0, 1)
        return frequency * (1 - divided + divided / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencyDivisors:
    """f_i / d_i with divisors given one by one, as GGUF files store Llama 3's scaling.

    Attributes:
      divisors: d, R / 2 positive numbers.
    """

    divisors: tuple[float, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.divisors, (tuple, list)) or not self.divisors:
            raise ValueError(f"divisors must be a tuple of positive numbers. Got {self.divisors!r}.")
        _settle(self, divisors=tuple(checks.positive_number("divisors", d) for d in self.divisors))

    @property
    def amplitude(self) -> float:
        return 1.0

    def frequencies(self, frequency: np.ndarray, theta: float, length: int | None) -> np.ndarray:
        del theta, length  # Unused.
        if len(self.divisors) != frequency.size:
            raise ValueError(f"divisors must be {frequency.size}, one for every frequency. Got {len(self.divisors)}.")
        return frequency / np.asarray(self.divisors, np.float64)


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | FrequencyDivisors


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """One rotary embedding.

    Attributes:
      theta: base of the frequencies.
      rotary_dim: R, even: the first R features of a head turn; None is all of them.
      scaling: of the frequencies.
    """

    theta: float = 10000.0
    rotary_dim: int | None = None
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        _settle(
            self,
            theta=checks.positive_number("theta", self.theta),
            rotary_dim=checks.rotary_dim("rotary_dim", self.rotary_dim),
            scaling=rope_scaling("scaling", self.scaling),
        )


def rope_scaling(name: str, value: Any) -> RopeScaling | None:
    """A scaling or None."""
    if value is None or isinstance(value, RopeScaling):
        return value
    raise ValueError(
        f"{name} must be a LinearScaling, DynamicScaling, Llama3Scaling, YarnScaling or FrequencyDivisors, or None. "
        f"Got {value!r}."
    )


def _at_least_one(name: str, value: Any) -> float:
    number = checks.positive_number(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1. Got {value!r}.")
    return number


def _settle(record: Any, **values: Any) -> None:
    """Fields of a frozen record, in their checked form."""
    for name, value in values.items():
        object.__setattr__(record, name, value)
