"""Pretrained models: weights and tokenizers of Hugging Face directories and GGUF files. Needs ringjax[models]."""

from .errors import ModelError as ModelError
from .evaluation import Range as Range
from .evaluation import perplexity as perplexity
from .generation import Sampling as Sampling
from .generation import Stats as Stats
from .generation import generate as generate
from .loading import config_of as config_of
from .loading import load as load
from .saving import check_savable as check_savable
from .saving import save as save
from .tokens import Tokenizer as Tokenizer
from .tokens import tokenizer as tokenizer
