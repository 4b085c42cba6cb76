"""The models that the compiler is tested on, in pure torch: what it must accept, and what it must refuse."""

from .detours import DETOURS
from .false_alarms import FALSE_ALARMS, LAST_ONLY, MAY_REFUSE
from .models import FeatureModel, LanguageModel, Output, logits_of
from .others import OTHERS
from .random_models import Architecture, Flaw, architectures
from .spellings import SPELLINGS, UNTRACEABLE
from .traps import DEPENDS, SEES, TRAPS
from .weights import break_filters, scale_weights

__all__ = [
    "DEPENDS",
    "DETOURS",
    "FALSE_ALARMS",
    "LAST_ONLY",
    "MAY_REFUSE",
    "OTHERS",
    "SEES",
    "SPELLINGS",
    "TRAPS",
    "UNTRACEABLE",
    "Architecture",
    "FeatureModel",
    "Flaw",
    "LanguageModel",
    "Output",
    "architectures",
    "break_filters",
    "logits_of",
    "scale_weights",
]
