"""The generation loop: prompt in, tokens out, over anything that can `prefill` and `step`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SupportsDecoding", "candidates", "generate", "sample"]


@runtime_checkable
class SupportsDecoding(Protocol):
    """What `generate` needs of a decoder: outputs at the newest position, [B, V] logits."""

    def prefill(self, prompt: Tensor, /) -> Any:
        """Read a prompt [B, P] from an empty state."""
        ...

    def step(self, token: Tensor, /) -> Any:
        """Read one more token a row, [B]."""
        ...


def candidates(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens a draw may choose from, and their probabilities.

    Temperature comes first, then `top_k`, then `top_p` of what is left: the smallest set of most
    probable tokens with mass >= top_p (Holtzman et al. 2020, arXiv 1904.09751, section 3.1). Ties
    are broken so that exactly `top_k` tokens stay.

    Args:
        logits: [B, V], any floating dtype; -inf forbids a token.
        temperature: > 0.
        top_k: >= 1, or None for all; more than V means all.
        top_p: in (0, 1], or None for all.

    Returns:
        Probabilities [B, n] in float64, zero outside the set and summing to 1 over it, and the
        token ids [B, n] they belong to, int64.

    Raises:
        ValueError: a parameter out of its range, or a row with NaN or +inf, or only -inf.

    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        raise ValueError("temperature 0 is greedy: there is no distribution to truncate")
    if top_k is not None:
        values, ids = logits.double().topk(min(top_k, logits.shape[-1]), dim=-1)
    elif top_p is not None:
        values, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    else:
        values = logits.double()
        ids = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)
    # Relative to the maximum before the division: a tiny temperature then cannot overflow to NaN.
    probs = torch.softmax((values - values.amax(-1, keepdim=True)) / temperature, dim=-1)
    if not torch.isfinite(probs).all():
        raise ValueError("cannot sample: a row of the logits has NaN or +inf, or only -inf")
    if top_p is not None and top_p < 1:
        mass_before = F.pad(probs.cumsum(-1)[..., :-1], (1, 0))
        probs = probs.masked_fill(mass_before >= top_p, 0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs, ids


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose one token a row: the most probable one at temperature 0, else a random one.

    Args:
        logits: [B, V], any floating dtype.
        temperature: >= 0; 0 is greedy and ignores `top_k`, `top_p` and `generator`.
        top_k: draw from the k most probable tokens only; see `candidates`.
        top_p: draw from the smallest set with this mass only; see `candidates`.
        generator: the source of randomness, on the logits' device; None is torch's global one.

    Returns:
        Token ids [B], int64.

    Raises:
        ValueError: a parameter out of its range, or logits that are NaN.

    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        best, token = logits.max(dim=-1)
        if torch.isnan(best).any():  # max propagates NaN
            raise ValueError("cannot choose a token: the logits have NaN")
        return token
    probs, ids = candidates(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = torch.multinomial(probs, 1, generator=generator)
    return ids.gather(-1, drawn).squeeze(-1)


@torch.no_grad()
def generate(
    model_or_decoder: torch.nn.Module | SupportsDecoding,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Iterable[int] = (),
    seed: int | None = None,
    on_token: Callable[[Tensor], object] | None = None,
    progress: bool = False,
) -> Tensor:
    """Continue a batch of prompts.

    The last token is returned without being read by the decoder, so `P + max_new_tokens - 1`
    positions of capacity are enough. An exception, also KeyboardInterrupt or one from `on_token`,
    propagates and leaves a decoder at the last token it has read, ready for the next `prefill`.

    Args:
        model_or_decoder: a decoder (anything with `prefill` and `step`), or a model from which
            `fi_compile.decoder` derives one.
        prompt: token ids [B, P], int64, P >= 1.
        max_new_tokens: >= 0; fewer are produced when every row meets a stop id.
        temperature: 0 is greedy; see `sample`.
        top_k: see `candidates`.
        top_p: see `candidates`.
        stop_ids: a row that produced one of these is finished and repeats it from there on.
        seed: of this call's own random generator; None draws one from the system. The global
            random state is neither read nor changed.
        on_token: called with each new column of tokens [B] as soon as it is known.
        progress: show a progress bar on stderr.

    Returns:
        Prompt and continuation [B, P + n], int64, n <= max_new_tokens.

    Raises:
        TypeError: neither a module nor a decoder was given.
        ValueError: an argument out of its range, a decoder with too little capacity, or a decoder
            whose output is not [B, V] logits.
        Unsupported: a model was given and no decoder can be derived from it.

    """
    _check_sampling(temperature, top_k, top_p)
    _check_prompt(prompt)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
    stop = torch.tensor([int(i) for i in stop_ids], dtype=torch.int64)
    if max_new_tokens == 0:
        return prompt.clone()

    batch, start = prompt.shape
    decoder = _as_decoder(model_or_decoder, prompt, positions=start + max_new_tokens - 1)
    logits = _logits(decoder.prefill(prompt), batch)
    generator = torch.Generator(device=logits.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    ids = torch.cat([prompt, prompt.new_zeros(batch, max_new_tokens)], dim=1)
    stop = stop.to(logits.device)
    finished = torch.zeros(batch, dtype=torch.bool, device=logits.device)
    last = torch.zeros(batch, dtype=torch.int64, device=logits.device)
    with _progress_bar(max_new_tokens, shown=progress) as advance:
        for end in range(start + 1, start + max_new_tokens + 1):
            token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            last = torch.where(finished, last, token)
            ids[:, end - 1] = last
            advance()
            if on_token is not None:
                on_token(last.clone())  # the caller's to keep and to change
            if stop.numel():
                finished = torch.isin(last, stop)  # a finished row repeats its stop id
                if finished.all():
                    return ids[:, :end].clone()
            if end < ids.shape[1]:
                logits = _logits(decoder.step(last), batch)
    return ids


def _as_decoder(
    model_or_decoder: torch.nn.Module | SupportsDecoding,
    prompt: Tensor,
    positions: int,
) -> SupportsDecoding:
    """The decoder itself, or one derived from the model for `positions` positions."""
    if not isinstance(model_or_decoder, SupportsDecoding):
        if not isinstance(model_or_decoder, torch.nn.Module):
            kind = type(model_or_decoder).__name__
            raise TypeError(f"expected an nn.Module, or a decoder with prefill and step, got {kind}")
        from fi_compile.decoder import decoder

        return decoder(model_or_decoder, prompt, max_length=positions)
    capacity = getattr(model_or_decoder, "capacity", None)
    if isinstance(capacity, int) and positions > capacity:
        raise ValueError(
            f"the decoder holds {capacity} positions, prompt and continuation need {positions}: "
            f"build it with max_length={positions} or ask for fewer tokens"
        )
    return model_or_decoder


def _logits(output: Any, batch: int) -> Tensor:
    """The [B, V] logits in a decoder's output, whatever structure the model returns."""
    found = _find_logits(output)
    if found is None or found.ndim != 2 or found.shape[0] != batch or found.shape[1] == 0:
        got = f"shape {list(found.shape)}" if found is not None else type(output).__name__
        raise ValueError(
            f"expected logits of shape [{batch}, V] from the decoder, got {got}; a model that "
            "returns several things needs them under the name 'logits', or as the first tensor of "
            "two dimensions of a tuple. Wrap the model in a module that returns the logits alone"
        )
    if not found.is_floating_point():
        raise ValueError(f"expected floating-point logits from the decoder, got {found.dtype}")
    return found


def _find_logits(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        named, values = output.get("logits"), list(output.values())
    elif isinstance(output, tuple | list):
        named, values = getattr(output, "logits", None), list(output)
    elif is_dataclass(output):
        named = getattr(output, "logits", None)
        values = [getattr(output, f.name) for f in fields(output)]
    else:
        named, values = getattr(output, "logits", None), []
    if isinstance(named, Tensor):
        return named
    return next((v for v in values if isinstance(v, Tensor) and v.ndim == 2), None)


def _check_prompt(prompt: Tensor) -> None:
    if prompt.ndim != 2:
        raise ValueError(f"prompt must be [B, P], got shape {list(prompt.shape)}")
    if prompt.dtype != torch.int64:
        raise ValueError(f"prompt must hold int64 token ids, got {prompt.dtype}")
    if prompt.numel() == 0:
        raise ValueError(f"prompt must not be empty, got shape {list(prompt.shape)}")


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    # Written so that NaN fails too.
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1 or None, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1] or None, got {top_p}")


@contextmanager
def _progress_bar(total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar on stderr for `total` tokens; yields the function that advances it by one."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    columns = SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TextColumn("tokens")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokens", total=total)
        yield lambda: bar.advance(task)
