"""One update of all of a net's parameters in one launch: Adam, a moving average, 16-bit copies.

The tensors come as tuples of pointers, which are arguments of the launch: nothing is copied to the
device for it, and a captured launch keeps the addresses of its capture. Each program has a block of
one of them. Not here: which tensors a net has (adam.py)."""

from __future__ import annotations

import itertools
from typing import Any

import triton
import triton.language as tl

from ..choice.geometry import cdiv
from .launch import Launch

BLOCK = 1024


def update(**arguments: Any) -> None:
    """One launch of the kernel `adam` with its arguments, all but those of its blocks."""
    sizes = tuple(value.numel() for value in arguments["values"])
    first = (0, *itertools.accumulate(cdiv(size, BLOCK) for size in sizes))
    arguments |= {"FIRST": first, "SIZES": sizes, "BLOCK": BLOCK}
    Launch(adam, (first[-1],), arguments).run(arguments["rate"].device)


@triton.jit
def pick(each, block, FIRST: tl.constexpr, SKIP: tl.constexpr = 0):
    """What `each`, a tuple, has for the tensor that this block is of: pointers or numbers, of all
    tensors or of some in a row, the first of them after SKIP others. Of those that it has nothing
    for, the first or the last stands in."""
    found = each[0]
    for i in tl.static_range(1, len(each)):
        found = tl.where(block >= FIRST[SKIP + i], each[i], found)
    return found


@triton.jit
def one_minus_exp(x):
    """1 - e^x of x <= 0 to float32's last digits: where the difference cancels, by its series."""
    near, series = tl.maximum(x, -0.5), 1.0
    for k in tl.static_range(9, 1, -1):
        series = 1.0 + near * (1.0 / k) * series
    return tl.where(x > -0.5, -near * series, 1.0 - tl.exp(x))


@triton.jit
def adam(
    values,  # fp32 tensors: first the parameters that are copied, then the others; then buffers
    narrow,  # gradients in 16 bits, of the parameters that are copied; or none
    gradients,  # gradients in fp32, of the other parameters; all like their parameters in memory,
    # and left without their scale where SCALED
    first_moments, second_moments,  # fp32
    steps,  # [] fp32: updates that each parameter has had
    copies,  # 16 bits, of the first parameters
    averages,  # fp32, of all values; or none
    counts,  # [] int64: buffers that an average takes over as they are
    counted,  # [] int64: where to
    updates,  # [] fp32: how often the averages were moved; read and counted where there are some
    least,  # the share of a new value in its average is 9 / (10 + updates), but no less than this
    rate,  # [] fp32: learning rate
    share1, share2,  # 1 - beta: of the gradient in the first moment, of its square in the second
    log1, log2,  # log(beta1), log(beta2)
    eps,
    scale,  # [] fp32: of the gradients; read where SCALED
    found_inf,  # [] fp32: where it is not 0 the parameters stay as they are; read where SCALED
    tickets,  # [] int32: 0, before and after
    SCALED: tl.constexpr,
    INSIDE: tl.constexpr,  # eps is added before the bias correction
    LAST: tl.constexpr,  # of the launches of an update: it counts the update
    FIRST: tl.constexpr,  # block of each value's first element, and how many blocks there are
    SIZES: tl.constexpr, BLOCK: tl.constexpr,  # elements of each value, and of a block
):  # fmt: skip
    """m += (1 - beta1) (g - m); v += (1 - beta2) (g g - v);
    p -= rate / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps), or where it is INSIDE with
    eps / sqrt(1 - beta2^t). Grid: (blocks,)."""
    block = tl.program_id(0)
    at = (block - pick(FIRST, block, FIRST)) * BLOCK + tl.arange(0, BLOCK)
    mask = at < pick(SIZES, block, FIRST)
    to = pick(values, block, FIRST) + at
    value = tl.load(to, mask=mask, other=0.0)
    if len(averages) > 0:
        mean = pick(averages, block, FIRST) + at
        old = tl.load(mean, mask=mask, other=0.0)
    taken = block >= 0
    if SCALED:
        taken = tl.load(found_inf).to(tl.int32) == 0
    if block < FIRST[len(steps)]:
        to1 = pick(first_moments, block, FIRST) + at
        to2 = pick(second_moments, block, FIRST) + at
        old1 = tl.load(to1, mask=mask, other=0.0)
        old2 = tl.load(to2, mask=mask, other=0.0)
        g = tl.zeros((BLOCK,), dtype=tl.float32)
        unscale = 1.0
        if SCALED:
            unscale = 1.0 / tl.load(scale)
        if len(gradients) > 0:
            of = pick(gradients, block, FIRST, len(narrow)) + at
            those = mask & (block >= FIRST[len(narrow)])
            g += tl.load(of, mask=those, other=0.0) * unscale
            if SCALED:  # for who looks at them, as PyTorch's fused Adam does
                tl.store(of, g, mask=those & taken)
        if len(narrow) > 0:
            of = pick(narrow, block, FIRST) + at
            those = mask & (block < FIRST[len(narrow)])
            g += tl.load(of, mask=those, other=0.0).to(tl.float32) * unscale
            if SCALED:
                tl.store(of, g.to(narrow[0].dtype.element_ty), mask=those & taken)
        m = old1 + share1 * (g - old1)
        v = old2 + share2 * (g * g - old2)
        t = tl.load(pick(steps, block, FIRST)) + 1.0
        size = tl.load(rate) / one_minus_exp(t * log1)
        correction = tl.sqrt_rn(one_minus_exp(t * log2))
        added = eps
        if INSIDE:
            added = eps / correction
        moved = value - size * (m / (tl.sqrt_rn(v) / correction + added))
        if SCALED:
            m = tl.where(taken, m, old1)
            v = tl.where(taken, v, old2)
            moved = tl.where(taken, moved, value)
        value = moved
        tl.store(to1, m, mask=mask)
        tl.store(to2, v, mask=mask)
        tl.store(to, value, mask=mask)
    if len(copies) > 0:
        copy = pick(copies, block, FIRST) + at
        copied = mask & (block < FIRST[len(copies)])
        tl.store(copy, value.to(copies[0].dtype.element_ty), mask=copied)
    if len(averages) > 0:
        share = tl.maximum(9.0 / (10.0 + tl.load(updates)), least)
        tl.store(mean, old + share * (value - old), mask=mask)
    # All programs have read the counters before the last of them counts on.
    tl.debug_barrier()
    if tl.atomic_add(tickets, 1) == tl.num_programs(0) - 1:
        tl.store(tickets, 0)
        for i in tl.static_range(len(steps)):
            tl.store(steps[i], tl.load(steps[i]) + tl.where(taken, 1.0, 0.0))
        if len(averages) > 0 and LAST:
            tl.store(updates, tl.load(updates) + 1.0)
        for i in tl.static_range(len(counts)):
            tl.store(counted[i], tl.load(counts[i]))
