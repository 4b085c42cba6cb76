"""Functions of fixed shapes through TorchInductor, called with as little around them as the decoder's own step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fi_compile.chain import bind_linked
from fi_compile.layers import whole
from fi_compile.native import compile_native

OPTIONS = {
    "realize_opcount_threshold": 0,  # else a norm is recomputed for every row of the product that follows
    "cpp.enable_floating_point_contract_flag": "fast",
    "size_asserts": False,
}


def compiled(function: Callable[..., Tensor], *example: Tensor) -> Callable[..., Tensor]:
    """`function` for tensors like the example, all distinct, which it may change in place."""
    assert len({id(tensor) for tensor in example}) == len(
        example
    )  # one tensor twice would be traced as one input
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    with torch.no_grad(), config.patch(OPTIONS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own insides
        run: Any = compile_fx(
            make_fx(lambda *a: (function(*a),), tracing_mode="fake")(*example), list(example)
        )
    return lambda *tensors: run(*tensors)[0]


def bound(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], Tensor]:
    """`function` of tensors that stay, which it may change in place, as a decoder's step is: one native call."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own insides
        layers = whole(make_fx(lambda *given: (function(*given),), tracing_mode="fake")(*tensors).graph)
        run = bind_linked(layers, [compile_native(layers.parts[0], tensors)], tensors)
    return lambda: run()[0]
