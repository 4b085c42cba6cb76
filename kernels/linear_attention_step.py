"""One step of linear attention on a GPU, in one launch: the state's update and what the query reads of it.

The reference and the CPU form are in `linear_attention`. Served are contractions whose letters form three groups in
this order, as multi-head attention has them: heads g, in every factor and the result; d, in the query and the first
key; e, in the second key, if there is one, and the result. Coefficients are one number, or one a head. A state of
[D, E] for each head is read once and written once; the position stays on the device.
"""

# What kernels mean by types and loops is Triton's affair.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fi_compile.kernels.gpu import Variant, interpreted
from fi_compile.kernels.linear_attention import Contraction

# Values of a state's row that a program keeps, and the most rows of it that it adds at a time.
ROW = 64
ROWS = 64
WARPS = 4


def sizes(how: Contraction) -> tuple[int, int, int] | None:
    """Heads, D and E of a contraction that the kernel serves; None for others."""
    if len(how.queries) != 1 or len(how.keys) not in (1, 2) or not all(how.keys):
        return None
    query, key = how.queries[0], how.keys[0]
    heads = "".join(x for x in query if x in how.out)
    summed = query[len(heads) :]
    free = how.out[len(heads) :]
    values = how.keys[1] if len(how.keys) == 2 else heads
    fits = (
        query == key == heads + summed
        and how.out == heads + free
        and values == heads + free
        and not set(free) & set(query)
        and how.coefficients in ("", heads)
    )
    return (how.count(heads), how.count(summed), how.count(free)) if fits else None


@triton.jit
def linear_attention_step_kernel(
    p_out,
    p_ring,
    p_q,
    p_k,
    p_v,
    p_now,
    p_past,
    p_decay,
    p_position,
    rows,
    heads,
    d,
    e,
    s_row,
    s_coefficient,
    HAS_V: tl.constexpr,
    DOUBLE: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """A program serves BE columns of one head's state, in one row of the batch."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    o_e = tl.program_id(0) * BE + tl.arange(0, BE)
    i_h = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    i_bh = i_b * heads + i_h
    m_e = o_e < e
    position = tl.load(p_position)
    before = (position + rows - 1) % rows
    now = tl.load(p_now + i_h * s_coefficient).to(ACC)
    past = tl.load(p_past + i_h * s_coefficient).to(ACC)
    decay = tl.load(p_decay + i_h * s_coefficient)
    v = tl.full([BE], 1.0, ACC)
    if HAS_V:
        v = tl.load(p_v + i_bh * e + o_e, mask=m_e, other=0.0).to(ACC)
    acc = tl.zeros([BE], ACC)
    for start in range(0, d, BD):
        o_d = start + tl.arange(0, BD)
        m = (o_d < d)[:, None] & m_e[None, :]
        o_s = i_bh * (d * e) + o_d[:, None] * e + o_e[None, :]
        state = tl.load(p_ring + before * s_row + o_s, mask=m, other=0.0).to(ACC)
        q = tl.load(p_q + i_bh * d + o_d, mask=o_d < d, other=0.0).to(ACC)
        k = tl.load(p_k + i_bh * d + o_d, mask=o_d < d, other=0.0).to(ACC)
        outer = k[:, None] * v[None, :]
        acc += tl.sum(q[:, None] * (past * state + now * outer), axis=0)
        # In float64: a rounding of the decay would count once a position.
        state = decay * state.to(tl.float64) + outer.to(tl.float64)
        tl.store(p_ring + position % rows * s_row + o_s, state.to(p_ring.dtype.element_ty), mask=m)
    tl.store(p_out + i_bh * e + o_e, acc.to(p_out.dtype.element_ty), mask=m_e)


def linear_attention_step_gpu(
    ring: Tensor,
    position: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    now: Tensor,
    past: Tensor,
    decay: Tensor,
) -> Tensor:
    """The output [B, H, E]; writes the new state into the ring.

    ring [R, B, …] contiguous, R >= 2, H·D·E values a row, the state after position p in row `p mod R`; query and key
    [B, H, D], value [B, H, E] or None for ones (E = 1), now and past [1] or [H], of one dtype, float32 or float64;
    decay as those, float64; position: int64 of one element. Raises ValueError where they do not fit together.
    """
    rows = ring.shape[0]
    batch, heads, d = query.shape
    e = 1 if value is None else value.shape[-1]
    if rows < 2 or not ring.is_contiguous() or ring[0].numel() != batch * heads * d * e:
        raise ValueError(
            f"a ring is contiguous, of two rows at least with {batch * heads * d * e} values each; found"
            f" {list(ring.shape)}"
        )
    count = now.numel()
    if (
        count not in (1, heads)
        or past.numel() != count
        or decay.numel() != count
        or decay.dtype != torch.float64
    ):
        raise ValueError(f"coefficients are one number or {heads}, the decay float64")
    out = query.new_empty(batch, heads, e)
    if not out.numel():
        return out
    width = min(ROW, triton.next_power_of_2(e))
    linear_attention_step_kernel[triton.cdiv(e, width), heads, batch](
        out,
        ring,
        query.contiguous(),
        key.contiguous(),
        (query if value is None else value).contiguous(),
        now,
        past,
        decay,
        position,
        rows,
        heads,
        d,
        e,
        batch * heads * d * e,
        0 if count == 1 else 1,
        HAS_V=value is not None,
        DOUBLE=out.dtype == torch.float64,
        BD=min(ROWS, triton.next_power_of_2(d)),
        BE=width,
        num_warps=WARPS,
    )
    return out


# Steps are traced: there the launch is one operator.
_library = torch.library.Library("flashinf", "FRAGMENT")
_library.define(
    "linear_attention_step(Tensor(a!) ring, Tensor position, Tensor query, Tensor key, Tensor? value, Tensor now,"
    " Tensor past, Tensor decay) -> Tensor"
)


def linear_attention_step_torch(
    ring: Tensor,
    position: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    now: Tensor,
    past: Tensor,
    decay: Tensor,
) -> Tensor:
    """The same by torch."""
    rows = ring.shape[0]
    state = ring.index_select(0, (position - 1) % rows).view(*query.shape, -1)
    outer = key.unsqueeze(-1) if value is None else key.unsqueeze(-1) * value.unsqueeze(-2)
    now, past, decay = (x.reshape(-1, 1, 1) for x in (now, past, decay))
    out = (query.unsqueeze(-1) * (past * state + now * outer)).sum(-2)
    ring.index_copy_(0, position % rows, (decay * state + outer).to(ring.dtype).view(1, *ring.shape[1:]))
    return out


def _on_cpu(ring: Tensor, position: Tensor, *rest: Tensor) -> Tensor:
    form = linear_attention_step_gpu if interpreted() else linear_attention_step_torch
    return form(ring, position, *rest)


_library.impl("linear_attention_step", _on_cpu, "CPU")
_library.impl("linear_attention_step", linear_attention_step_gpu, "CUDA")


@torch.library.register_fake("flashinf::linear_attention_step", lib=_library)
def _shape(
    ring: Tensor, position: Tensor, query: Tensor, key: Tensor, value: Tensor | None, *rest: Tensor
) -> Tensor:
    return query.new_empty(*query.shape[:2], 1 if value is None else value.shape[-1])


def linear_attention_step(
    ring: Tensor,
    position: Tensor,
    queries: tuple[Tensor, ...] | list[Tensor],
    keys: tuple[Tensor, ...] | list[Tensor],
    now: Tensor,
    past: Tensor,
    decay: Tensor,
    how: Contraction,
) -> Tensor:
    """One step of a contraction that `sizes` knows, as an operator that can be traced: [B, …out].

    ring [R, B, …state]; queries and keys [B, …letters]; coefficients as in `linear_attention.attention_step`.
    """
    found = sizes(how)
    assert found is not None, how
    heads, d, e = found
    batch = ring.shape[1]
    value = keys[1].reshape(batch, heads, e) if len(keys) == 2 else None
    out = torch.ops.flashinf.linear_attention_step(
        ring,
        position,
        queries[0].reshape(batch, heads, d),
        keys[0].reshape(batch, heads, d),
        value,
        now.reshape(-1),
        past.reshape(-1),
        decay.reshape(-1),
    )
    return out.reshape(batch, *how.shape(how.out))


def linear_attention_step_traffic(d: int, e: int, size: int = 4) -> dict[str, float]:
    """What one head of one row costs: bytes read and written, floating-point operations."""
    return {
        "reads": size * (d * e + 2.0 * d + e),
        "writes": size * (d * e + 1.0 * e),
        "flops": 7.0 * d * e,
    }


def variants() -> Iterator[Variant]:
    """What is offered: twelve heads of 64 × 64, and the sum that divides them."""
    heads, d = 12, 64
    for e in (64, 1):
        names = linear_attention_step_kernel.arg_names
        cost = linear_attention_step_traffic(d, e)
        yield Variant(
            name=f"linear_attention_step {d}×{e}",
            kernel=linear_attention_step_kernel,
            types={
                **{n: "*fp32" for n in names if n.startswith("p_")},
                "p_decay": "*fp64",
                "p_position": "*i64",
                **dict.fromkeys(("rows", "heads", "d", "e", "s_row", "s_coefficient"), "i32"),
            },
            constants={
                "HAS_V": e > 1,
                "DOUBLE": False,
                "BD": ROWS,
                "BE": min(ROW, e),
                **({"e": 1} if e == 1 else {}),
            },
            aligned=("d", "s_row", *(("e",) if e > 1 else ())),
            warps=WARPS,
            work=f"{heads} heads",
            reads=heads * cost["reads"],
            writes=heads * cost["writes"],
            flops=heads * cost["flops"],
            # All loads of the state are; queries and keys come a number to a thread, a single column has no neighbours.
            wide=0.3 if e > 1 else 0.0,
        )
