"""The products of `monarch` as parts of kernels: what tiles and convolutions of whole sequences share.

All products are tall, and factors stand on their right. A value's two parts, real and imaginary, go together.
"""

# What kernels mean by types and loops is Triton's affair.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_pair(p_pairs, o_c, m_c, i_p, HAS_FAN: tl.constexpr):
    """The i_p-th pair of each channel o_c, and where there is one: the channel itself where no channels meet."""
    if HAS_FAN:
        o_p = tl.load(p_pairs + o_c, mask=m_c, other=0) + i_p
        m_p = o_p < tl.load(p_pairs + o_c + 1, mask=m_c, other=0)
    else:
        o_p, m_p = o_c, m_c
    return o_p, m_p


@triton.jit
def load_pair(p, o, gap):
    """The real parts at offsets o, and the imaginary parts `gap` further on."""
    return tl.load(p + o), tl.load(p + o + gap)


@triton.jit
def times(ar, ai, br, bi):
    """The complex product (ar + i·ai) · (br + i·bi)."""
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def in_tf32(a):
    """Finite float32 rounded to the nearest of the 19 bits that matrix units read in TF32, away from zero.

    They would cut off the others, and everything would come out smaller: errors that add up.
    """
    return ((a.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def in_bfloat16(a):
    """Finite float32 rounded to the nearest of 16 bits, to even."""
    a = a.to(tl.int32, bitcast=True)
    return ((a + 0x7FFF + ((a >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, PRECISION: tl.constexpr, acc=None):
    """The matrix product a @ b of float32, plus acc, in one of `gpu.PRECISIONS` as `gpu.dot_precision` names it."""
    if PRECISION == "bf16":
        y = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc=acc)
    elif PRECISION == "bfloat16 modelled":
        y = tl.dot(in_bfloat16(a), in_bfloat16(b), acc=acc, input_precision="ieee")
    elif PRECISION == "tf32":
        y = tl.dot(in_tf32(a), in_tf32(b), acc=acc, input_precision="tf32")
    elif PRECISION == "tf32 modelled":
        y = tl.dot(in_tf32(a), in_tf32(b), acc=acc, input_precision="ieee")
    else:
        y = tl.dot(a, b, acc=acc, input_precision=PRECISION)
    return y


@triton.jit
def dot_pair(ar, ai, br, bi, PRECISION: tl.constexpr):
    """The complex matrix product (ar + i·ai) @ (br + i·bi)."""
    re = product(ar, br, PRECISION)
    re = product(-ai, bi, PRECISION, re)
    im = product(ar, bi, PRECISION)
    return re, product(ai, br, PRECISION, im)


@triton.jit
def enter(
    x,
    p_first,
    p_twiddle,
    o_t,
    gap,
    H: tl.constexpr,
    N: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Real values x [H, N, BC] by the first product and the twiddles at o_t [H, N]: the two parts, [BC·H, N]."""
    o_h = tl.arange(0, H)
    x = tl.reshape(tl.permute(x, (2, 1, 0)), (BC * N, H))
    fr, fi = load_pair(p_first, o_h[:, None] * H + o_h[None, :], H * H)
    ar = tl.permute(tl.reshape(product(x, tl.trans(fr), PRECISION), (BC, N, H)), (0, 2, 1))
    ai = tl.permute(tl.reshape(product(x, tl.trans(fi), PRECISION), (BC, N, H)), (0, 2, 1))
    tr, ti = load_pair(p_twiddle, o_t[None, :, :], gap)
    ar, ai = times(ar, ai, tr, ti)
    return tl.reshape(ar, (BC * H, N)), tl.reshape(ai, (BC * H, N))


@triton.jit
def leave(
    ar,
    ai,
    p_first,
    p_twiddle,
    o_t,
    gap,
    H: tl.constexpr,
    N: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The mirror image of `enter`: the two parts, [BC·H, N], as real values [H, N, BC]."""
    o_h = tl.arange(0, H)
    tr, ti = load_pair(p_twiddle, o_t[None, :, :], gap)
    ar, ai = times(tl.reshape(ar, (BC, H, N)), tl.reshape(ai, (BC, H, N)), tr, -ti)
    ar = tl.reshape(tl.permute(ar, (0, 2, 1)), (BC * N, H))
    ai = tl.reshape(tl.permute(ai, (0, 2, 1)), (BC * N, H))
    fr, fi = load_pair(p_first, o_h[:, None] * H + o_h[None, :], H * H)
    y = product(ar, fr, PRECISION)
    y = product(ai, fi, PRECISION, y)
    return tl.permute(tl.reshape(y, (BC, N, H)), (2, 1, 0))


@triton.jit
def add_to_rows(p_out, y, o_t, o_c, m_c, length, s_t):
    """Add y [H, N, BC] to outputs o_t [H, N] < length of channels o_c, which are contiguous."""
    p = p_out + o_t.to(tl.int64)[:, :, None] * s_t + o_c[None, None, :]
    m = (o_t < length)[:, :, None] & m_c[None, None, :]
    before = tl.load(p, mask=m, other=0.0)
    tl.store(p, (before.to(tl.float32) + y).to(before.dtype), mask=m)


@triton.jit
def load_rows(p_in, o_k, o_c, m_c, s_t):
    """Inputs o_k [H, N] of channels o_c, float32 [H, N, BC]; zero where o_k is negative or a channel masked."""
    p = p_in + o_k.to(tl.int64)[:, :, None] * s_t + o_c[None, None, :]
    return tl.load(p, mask=(o_k >= 0)[:, :, None] & m_c[None, None, :], other=0.0).to(tl.float32)
