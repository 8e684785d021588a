"""Packs documents into sequences, and deals them so that every device works equally. NumPy only, on the host."""

from .arrangement import Arrangement as Arrangement
from .documents import Packing as Packing
from .documents import Shared as Shared
from .documents import pack as pack
