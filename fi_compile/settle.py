"""settle: the mixer a unit is, recognised by what it computes, and settled by proof and by trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from .mixers.chunked_attention import recognise_linear
from .mixers.convolution import LONGEST_WINDOW, Convolution, FilterGrew, classify, recognise, verify
from .mixers.folds import Fold, recognise_fold
from .mixers.linear_attention import LinearAttention
from .mixers.products import Product, recognise_product
from .mixers.recurrence import as_recurrence
from .mixers.registered import Registered, disagreement, recognise_registered
from .mixers.sliding_attention import SlidingAttention, recognise_sliding
from .mixers.whole_numbers import WholeNumbers, recognise_whole_numbers
from .passes.bound_lags import bound_lags
from .passes.propose_consistency import Consistency
from .proof import Proof
from .units import Unit


def is_affine(proof: Proof, unit: Unit, x: fx.Node) -> bool:
    """Whether every operator between ``x`` and the unit's exit is certified affine in what comes from x."""
    reached = {x}
    for node in unit.nodes:
        used = reached.intersection(node.all_input_nodes)
        if used and not proof.affine_in(node, used):
            return False
        if used:
            reached.add(node)
    return unit.exit in reached


class Settled:
    """The mixers of one program: what asks for them, and what is known of those that were found.

    ``values``: the program's inputs in double precision. ``verdicts``: by the name of a mixer, how it was settled;
    ``declined``: by the name of a unit's exit, why one of a known kind runs as a region; ``filters``: by name and
    capacity.
    """

    def __init__(self, proof: Proof, values: Mapping[str, Tensor], capacity: int, dtype: torch.dtype) -> None:
        self.proof, self.values, self.capacity, self.dtype = proof, values, capacity, dtype
        self.verdicts: dict[str, str] = {}
        self.declined: dict[str, str] = {}
        self.filters: dict[tuple[str, int], Any] = {}

    def convolution(
        self, analysis: Consistency, unit: Unit, inputs: Sequence[fx.Node]
    ) -> Convolution | Product | WholeNumbers | None:
        """The convolution a unit of one input is, or the product one of two is."""
        if len(inputs) == 2:
            return self._product(analysis, unit, inputs)
        (x,) = inputs
        if not x.meta["val"].dtype.is_floating_point and not x.meta["val"].dtype.is_complex:
            return self._whole_numbers(analysis, unit, x)
        found = recognise(analysis, unit, x, self.capacity)
        if found is None:
            return None
        try:
            return self._increment(analysis, found)
        except FilterGrew:
            self.declined[unit.exit.name] = (
                f"{len(found.source)} filters of {self.capacity} lags mix its channels: too many to keep"
            )
            return None

    def operator(self, analysis: Consistency, unit: Unit) -> Fold | Registered | None:
        """The running sum a unit of one operator is, or what was registered for it."""
        found = recognise_fold(analysis, unit) or recognise_registered(analysis, unit)
        if isinstance(found, Registered) and not found.holds(self.proof, self.values, self.capacity):
            raise disagreement(found)
        if found is not None:
            self.verdicts[found.name] = found.verdict
        return found

    def group(self, analysis: Consistency, unit: Unit) -> LinearAttention | SlidingAttention | None:
        """The attention with a state that does not grow that a unit of many inputs is."""
        found: LinearAttention | SlidingAttention | None
        found = recognise_linear(analysis, unit, self.proof, self._is_affine)
        if found is None or not self._holds(analysis, found):
            found = recognise_sliding(analysis, unit, self.proof, self.values, self.capacity)
        if found is None or not self._holds(analysis, found):
            return None
        self.verdicts[found.name] = found.verdict
        return found

    def _product(self, analysis: Consistency, unit: Unit, inputs: Sequence[fx.Node]) -> Product | None:
        found = recognise_product(analysis, unit, inputs, self._is_affine)
        if found is None or not self._holds(analysis, found):
            return None
        self.verdicts[found.name] = (
            "proved causal and bilinear; equals the convolution on random input over the whole capacity"
        )
        return found

    def _whole_numbers(self, analysis: Consistency, unit: Unit, x: fx.Node) -> WholeNumbers | None:
        found = recognise_whole_numbers(analysis, unit, x, self._is_affine, self.capacity)
        if found is None or not self._holds(analysis, found):
            return None
        self.verdicts[found.name] = found.verdict
        return found

    def _holds(
        self, analysis: Consistency, mixer: LinearAttention | SlidingAttention | Product | WholeNumbers
    ) -> bool:
        """Whether a mixer holds for the present weights and for moved ones."""
        both = (analysis.parameters, self.values)
        return all(mixer.holds(self.proof, values, self.capacity) for values in both)

    def _is_affine(self, unit: Unit, x: fx.Node) -> bool:
        return is_affine(self.proof, unit, x)

    def _increment(self, analysis: Consistency, found: Convolution) -> Convolution | None:
        """The increment of a convolution, or None where the proof and the unit itself do not bear it out."""
        unit, x = found.unit, found.x
        if self.proof.shift_invariant(unit.exit, {x}):
            found = replace(
                found,
                invariant=True,
                homogeneous=self.proof.homogeneous(unit.exit, {x}),
                bound=bound_lags(self.proof, unit, x, LONGEST_WINDOW),
            )
            how = "proved a causal convolution at every length"
            true = verify(found, analysis.parameters, analysis.longest)
        elif self._is_affine(unit, x):
            how = "proved causal and linear; equals its filter on random input over the whole capacity"
            true = verify(found, analysis.parameters, self.capacity)
        else:
            return None
        if not true:
            return None
        derived = found.derive(self.values, self.capacity)
        # Which channels meet was read off a few lags; a filter may be zero there.
        if not verify(found, self.values, self.capacity, derived):
            return None
        chosen = classify(found, derived.kernel, self.dtype)
        try:  # weights that happen to be zero must not decide the kind: moved ones are asked too
            chosen.derive(analysis.parameters, analysis.longest if chosen.at is None else self.capacity)
        except FilterGrew:
            chosen = classify(found, found.derive(analysis.parameters, self.capacity).kernel, self.dtype)
        if chosen.lags is not None and chosen.kind == "long_conv" and derived.kernel.shape[1] < self.capacity:
            raise FilterGrew(found.name)
        chosen, derived = as_recurrence(chosen, chosen.cut(derived), self.dtype)
        self.filters[found.name, self.capacity] = derived.rounded(self.dtype)
        self.verdicts[found.name] = how
        return chosen
