"""flashinf: exact quasi-linear autoregressive inference through torch.compile."""

from .decoder import Decoder, decoder
from .doors import FlashinfWarning, last_report
from .errors import (
    CapacityError,
    DecoderBroken,
    FlashinfError,
    InputError,
    Refusal,
    Unsupported,
    WeightsChanged,
)
from .explain import explain
from .generate import generate
from .options import Options
from .report import Report

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "Decoder",
    "DecoderBroken",
    "FlashinfError",
    "FlashinfWarning",
    "InputError",
    "Options",
    "Refusal",
    "Report",
    "Unsupported",
    "WeightsChanged",
    "decoder",
    "explain",
    "generate",
    "last_report",
]
