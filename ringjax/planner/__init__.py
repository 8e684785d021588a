"""What a model's attention costs on given devices, for every strategy, and which one to take. Starts no JAX program."""

from .choice import Candidate as Candidate
from .choice import Plan as Plan
from .choice import choose_strategy as choose_strategy
from .choice import plan as plan
