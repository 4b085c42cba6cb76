"""A model of everything: each block another family's mixer."""

from torch import nn

from .backbone import LanguageModel
from .hyena import HyenaOperator, MultiHeadHyena
from .linear_attention import BaseConv, BasedLinearAttention, HedgehogAttention, MultiScaleRetention
from .ssm import H3, RTF, DiagonalSSM
from .striped_hyena import HyenaCascade
from .stu import STUT
from .tnn import Gtu
from .transformers import AlibiAttention, CausalSelfAttention, MixtureOfExperts


def everything(d_model: int = 12) -> nn.Module:
    mixers = (
        HyenaOperator(d_model, 256, order=3),
        CausalSelfAttention(d_model, 2),
        H3(d_model),
        BaseConv(d_model),
        HyenaCascade(d_model, "medium"),
        HyenaCascade(d_model, "modal"),
        MultiHeadHyena(d_model, 4, 256),
        DiagonalSSM(d_model),
        AlibiAttention(d_model),
        STUT(d_model),
        MixtureOfExperts(d_model),
        Gtu(d_model),
        BasedLinearAttention(d_model),
        HedgehogAttention(d_model),
        RTF(d_model, fixed=1024),
        MultiScaleRetention(d_model),
    )
    return LanguageModel(mixers, d_model)
