"""What the kernels share: activations, what is done to an operand as it is loaded (prologues),
and what is done to a result before it is stored (epilogues). Not here: any kernel.

Coefficients of a normalisation are one fp32 tensor [3, groups, C]: mean, scale, shift, meaning
z = scale * (y - mean) + shift. That form, and not scale * y + (shift - mean * scale), is used
everywhere: it does not cancel where |mean| is far above the standard deviation, and every kernel
that forms z forms the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def activate(z, slope, ACTIVATION: tl.constexpr):
    """act(z) in fp32; NaN stays NaN."""
    if ACTIVATION == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * slope)
    elif ACTIVATION == "tanh":
        # By exp of a negative number, which cannot overflow; odd, so the sign is put back.
        e = tl.exp(-2.0 * tl.abs(z))
        t = (1.0 - e) / (1.0 + e)
        z = tl.where(z < 0, -t, t)
    return z


@triton.jit
def activation_derivative(o, slope, ACTIVATION: tl.constexpr):
    """act'(z) from the output o = act(z). At 0 it is PyTorch's: 0 for relu, slope for leaky_relu.
    For leaky_relu the sign of o is that of z, so slope must not be negative."""
    if ACTIVATION == "relu":
        d = tl.where(o > 0, 1.0, 0.0)
    elif ACTIVATION == "leaky_relu":
        d = tl.where(o > 0, 1.0, slope)
    elif ACTIVATION == "tanh":
        d = 1.0 - o * o
    else:
        d = o * 0.0 + 1.0
    return d


@triton.jit
def coefficients(coef, plane, channels, mask):
    """mean, scale and shift of these channels; coef points at the group's row of the first plane,
    plane = groups * C elements from one plane to the next."""
    mean = tl.load(coef + channels, mask=mask, other=0.0)
    scale = tl.load(coef + plane + channels, mask=mask, other=0.0)
    shift = tl.load(coef + 2 * plane + channels, mask=mask, other=0.0)
    return mean, scale, shift


@triton.jit
def transform(
    value, aux, mean, scale, shift, slope, PROLOGUE: tl.constexpr, ACTIVATION: tl.constexpr
):
    """One loaded tile, in fp32, as its consumer wants it:

    activate   act(scale * (value - mean) + shift)   a producer's raw output, normalised here
    normgrad   value + scale * (aux - mean) + shift  gradient through batch statistics; aux = y
    actgrad    value * act'(aux)                     gradient of an activation; aux: its output
    """
    value = value.to(tl.float32)
    if PROLOGUE == "activate":
        value = activate(scale * (value - mean) + shift, slope, ACTIVATION)
    elif PROLOGUE == "normgrad":
        value = value + (scale * (aux.to(tl.float32) - mean) + shift)
    elif PROLOGUE == "actgrad":
        value = value * activation_derivative(aux.to(tl.float32), slope, ACTIVATION)
    return value


@triton.jit
def load_operand(
    value,  # pointer, elements in storage dtype
    aux,  # pointer, same shape as value; read by normgrad and actgrad
    coef,  # pointer at the group's row, [3, groups, C] fp32; read by activate and normgrad
    plane,  # groups * C
    offsets,  # [A, B] int64, the same for value and aux
    mask,  # [A, B]
    channels,  # [1, B] or [A, 1]: channel of each element
    channel_mask,  # like channels
    slope,
    PROLOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """A tile [A, B] through its prologue, in storage dtype; 0 outside the mask, also after it:
    padding is 0 and act(shift) is not."""
    tile = tl.load(value + offsets, mask=mask, other=0.0)
    if PROLOGUE != "none":
        second = tile
        if PROLOGUE != "activate":
            second = tl.load(aux + offsets, mask=mask, other=0.0)
        mean, scale, shift = 0.0, 0.0, 0.0
        if PROLOGUE != "actgrad":
            mean, scale, shift = coefficients(coef, plane, channels, channel_mask)
        changed = transform(tile, second, mean, scale, shift, slope, PROLOGUE, ACTIVATION)
        tile = tl.where(mask, changed, 0.0).to(tile.dtype)
    return tile


@triton.jit
def store_signs(
    signs,  # pointer, uint8: bit c % 8 of byte c // 8 of a pixel is channel c's; C divides by 8
    o,  # [BM, BN], an activation's output
    offsets,  # [BM, BN] int64, of o
    mask,  # [BM, BN]
    channels,  # [BN]
):
    """Where o is positive, a bit for each."""
    bits = (o > 0).to(tl.int32) << (channels % 8)[None, :]
    eight: tl.constexpr = (o.shape[0], o.shape[1] // 8, 8)
    byte = tl.sum(bits.reshape(eight), axis=2, keep_dims=True)
    byte = tl.broadcast_to(byte, eight).reshape(o.shape[0], o.shape[1])
    first = (channels % 8 == 0)[None, :]
    tl.store(signs + offsets // 8, byte.to(tl.uint8), mask=mask & first)


@triton.jit
def signs_derivative(signs, offsets, mask, channels, slope, ACTIVATION: tl.constexpr):
    """act'(z) [BM, BN] from what `store_signs` stored of act(z); relu and leaky_relu."""
    byte = tl.load(signs + offsets // 8, mask=mask, other=0).to(tl.int32)
    return activation_derivative((byte >> (channels % 8)[None, :]) & 1, slope, ACTIVATION)


@triton.jit
def store_gradient(
    result,  # [BM, BN] fp32: d act(z), z = scale * (y - mean) + shift
    out,
    offsets,
    mask,
    channels,
    channel_mask,
    y,  # pointer, like out
    coef,
    plane,
    slope,
    ACTIVATION: tl.constexpr,
):
    """Stores scale * dz with dz = result * act'(z); returns sum dz and sum dz * (y - mean) of each
    column."""
    mean, scale, shift = coefficients(coef, plane, channels, channel_mask)
    apart = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    o = activate(scale[None, :] * apart + shift[None, :], slope, ACTIVATION)
    dz = tl.where(mask, result * activation_derivative(o, slope, ACTIVATION), 0.0)
    tl.store(out + offsets, (scale[None, :] * dz).to(out.dtype.element_ty), mask=mask)
    return tl.sum(dz, axis=0), tl.sum(dz * apart, axis=0)


@triton.jit
def store_tile(
    result,  # [BM, BN] fp32
    out,  # pointer
    offsets,  # [BM, BN] int64, the same for out and aux
    row_mask,  # [BM]
    channels,  # [BN]: output channel of each column
    channel_mask,  # [BN]
    bias,  # pointer, [C]; read where HAS_BIAS
    aux,  # pointer, the raw y whose activation the result is a gradient of; EPILOGUE gradient. Or
    # signs of an activation's output, uint8, 8 channels a byte; EPILOGUE signs and signed
    coef,  # pointer at the group's row, [3, groups, C] fp32, of aux; EPILOGUE gradient
    plane,  # groups * C
    slope,
    partials,  # pointer, two planes of fp32; EPILOGUE statistics and gradient
    partial_offsets,  # [BN]: where in a plane this tile's row is
    partial_plane,  # elements from one plane to the next
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """One tile of a result to memory:

    store       act(result + bias)
    signs       the same, and where it is positive, into `aux`
    signed      result is d act(z), relu or leaky_relu: dz = result * act'(z), by the signs in `aux`
    statistics  y = result + bias; partials: per channel mean and M2 of y as rounded for storage
    gradient    result is d act(z), z = scale * (aux - mean) + shift: dz = result * act'(z);
                scale * dz; partials: sum dz and sum dz * (aux - mean)

    Every sum is over the rows of this tile alone; returns the number of rows, fp32.
    """
    mask = row_mask[:, None] & channel_mask[None, :]
    if HAS_BIAS:
        result += tl.load(bias + channels, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    count = tl.sum(row_mask.to(tl.float32), axis=0)
    if EPILOGUE == "store" or EPILOGUE == "signs":
        stored = activate(result, slope, ACTIVATION).to(out.dtype.element_ty)
        tl.store(out + offsets, stored, mask=mask)
        if EPILOGUE == "signs":
            store_signs(aux, stored, offsets, mask, channels)
    elif EPILOGUE == "signed":
        result *= signs_derivative(aux, offsets, mask, channels, slope, ACTIVATION)
        tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)
    elif EPILOGUE == "statistics":
        stored = result.to(out.dtype.element_ty)
        tl.store(out + offsets, stored, mask=mask)
        y = tl.where(row_mask[:, None], stored.to(tl.float32), 0.0)
        mean = tl.sum(y, axis=0) / tl.maximum(count, 1.0)
        apart = tl.where(row_mask[:, None], y - mean[None, :], 0.0)
        m2 = tl.sum(apart * apart, axis=0)
        tl.store(partials + partial_offsets, mean, mask=channel_mask)
        tl.store(partials + partial_plane + partial_offsets, m2, mask=channel_mask)
    elif EPILOGUE == "gradient":
        s1, s2 = store_gradient(
            result, out, offsets, mask, channels, channel_mask, aux, coef, plane, slope, ACTIVATION
        )
        tl.store(partials + partial_offsets, s1, mask=channel_mask)
        tl.store(partials + partial_plane + partial_offsets, s2, mask=channel_mask)
    return count
