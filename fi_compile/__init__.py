"""flashinf: exact quasi-linear autoregressive inference through torch.compile."""

from .decoder import Decoder, decoder
from .errors import (
    CapacityError,
    DecoderBroken,
    FlashinfError,
    InputError,
    Refusal,
    Unsupported,
    WeightsChanged,
)
from .generate import generate
from .options import Options
from .report import Report

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "Decoder",
    "DecoderBroken",
    "FlashinfError",
    "InputError",
    "Options",
    "Refusal",
    "Report",
    "Unsupported",
    "WeightsChanged",
    "decoder",
    "generate",
]
