"""The correctness gate: what a peer computes against the definition in float64.

Errors count in units of ε·‖u‖₂·‖k‖₂ of a channel, ε that of float32: what a direct sum would be allowed
(docs/algorithms.md, "Rounding").
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from .peers.base import Peer, Piece

BOUND = 4.0
CHANNELS, OUTPUTS = 4, 48


def direct(filters: Tensor, history: Tensor, outputs: range | list[int], inputs: range) -> Tensor:
    """`sum over i in inputs, i <= t, of y[i] · rho[t - i]` in float64, at each t of outputs: [C, len(outputs)]."""
    rows = []
    for t in outputs:
        stop = min(inputs.stop, t + 1)
        y = history[:, inputs.start : stop].double()
        rho = filters[:, t - stop + 1 : t - inputs.start + 1].double().flip(-1)
        rows.append((y * rho).sum(-1))
    return torch.stack(rows, -1)


def units(found: Tensor, expected: Tensor, filters: Tensor, history: Tensor) -> float:
    """The largest error of found [c, m], in units of ε·‖u‖₂·‖k‖₂; infinite where it is not finite."""
    scale = torch.finfo(torch.float32).eps * history.double().norm(dim=-1) * filters.double().norm(dim=-1)
    error = ((found.double() - expected).abs() / scale.unsqueeze(-1)).max()
    return float(error) if bool(torch.isfinite(found).all()) else float("inf")


def check_piece(piece: Piece, filters: Tensor, history: Tensor) -> float:
    """The error of one piece, run at its own size, in a few channels and outputs."""
    draw = random.Random(0)
    channels = sorted(draw.sample(range(filters.shape[0]), min(CHANNELS, filters.shape[0])))
    places = sorted(
        {0, len(piece.outputs) - 1, *(draw.randrange(len(piece.outputs)) for _ in range(OUTPUTS))}
    )
    if piece.adds_to is not None:
        before = piece.adds_to[channels][:, places].clone()
        piece.run()
        found = piece.adds_to[channels][:, places] - before
    else:
        result = piece.run()
        assert isinstance(result, Tensor)
        found = result[channels][:, places]
    outputs = [piece.outputs[p] for p in places]
    some, past = filters[channels], history[channels]
    return units(found, direct(some, past, outputs, piece.inputs), some, past)


def check_pieces(pieces: list[Piece], filters: Tensor, history: Tensor) -> float:
    """The largest error of all pieces; infinite where their pairs are not those of a whole sequence."""
    length = filters.shape[1]
    met, wanted = sum(p.count * p.pairs for p in pieces), length * (length + 1) / 2
    if abs(met - wanted) > 0.02 * wanted:
        return float("inf")
    return max(check_piece(p, filters, history) for p in pieces if p.pairs)


def check_push(peer: Peer, inputs: Tensor, channels: list[int] | None = None) -> float:
    """The error of the outputs of all positions of inputs [C, L], in some channels."""
    channels = list(range(inputs.shape[0])) if channels is None else channels
    index = torch.tensor(channels)
    found = torch.stack([peer.push(y).index_select(0, index) for y in inputs.T.contiguous()], -1)
    length = inputs.shape[1]
    draw = random.Random(1)
    ends = {e for p in range(length.bit_length()) for e in ((1 << p) - 1, 1 << p) if e < length}
    every = length <= 1024
    places = (
        list(range(length)) if every else sorted(ends | {length - 1, *draw.sample(range(length), OUTPUTS)})
    )
    some, past = peer.filters[channels], inputs[channels]
    return units(found[:, places], direct(some, past, places, range(length)), some, past)
