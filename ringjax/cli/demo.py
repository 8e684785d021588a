"""`ringjax demo`."""

from .errors import refusals
from .options import Devices, SeqLen


def demo(devices: Devices = 8, seq_len: SeqLen = 2048) -> None:
    """Shows on simulated devices what the ring does.

    Who holds which block, the difference from dense attention, memory per device, and what a device sends.
    """
    from .. import demo as command

    with refusals():
        command.show(num_devices=devices, length=seq_len)
