"""flashinf: exact quasi-linear autoregressive inference through torch.compile."""

from .decoder import Decoder, decoder
from .errors import (
    CapacityError,
    DecoderBroken,
    FlashinfError,
    FlashinfWarning,
    InputError,
    Refusal,
    Unsupported,
    WeightsChanged,
)
from .explain import explain
from .generate import generate
from .mixers.registered import register_mixer
from .options import Options
from .report import Report, last_report

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
    "register_mixer",
]
