"""Triton kernels of the Mamba mixer: selective scan, one-token update and causal convolution.

Names and formulas are those of `selective_scan.py`, whose `selective_scan_ref` defines the results. Everything is
channels last. Sums, exponentials and states are float32 whatever the dtype of the inputs.

How the scan is laid out. A program owns `BLOCK` channels of one row of the batch and walks over time, `TILE` steps at
a time. A tile of decays or states has the shape (time, part, channel, lane), where state `lane * PARTS + part` lies at
(part, lane). Triton spreads the last axes of a tile over threads first, so that

- each thread holds four states of one channel and all steps of the tile in its registers: the exponentials of a tile
  are independent of each other, and the recurrence is a chain of multiply-adds without any exchange;
- four lanes share a channel of 16 states: B and C reach a thread as 16 bytes, and y is a sum over two shuffles.

The limit on a GPU is then the exponential, 16 per channel and step. With one thread per channel nothing would be
exchanged, but 8,192 channels would give half of the schedulers of an H100 (132 multiprocessors of 4) one warp each:
time would have to be cut into pieces that are scanned twice, which doubles the exponentials. With four lanes these
channels are 1,024 warps, almost 8 per multiprocessor, in one pass, and the next tile is loaded while one is computed.
Cutting time would only help rows of far fewer channels, whose scan is short anyway.

The backward pass goes over the tiles from the last to the first, from one state per tile that the forward pass kept
(16 states every 8 steps: two numbers for each of x), and computes the states inside again. dB and dC are sums over
channels, hence over programs, which add them up with atomics: their last bits change from run to run.

Sizes and layouts were chosen from the machine code that Triton 3.2, 3.6 and 3.7 make of these kernels for sm_90 (two
registers at most are spilled for 16 states; 3.7 reads B and C 16 bytes at a time), not from times on a GPU.
"""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .selective_scan import _check_shapes

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "scan_triton needs Triton, which comes with a CUDA build of PyTorch: pip install triton"
    ) from error

PARTS = 4  # states of a thread
# Steps of a tile and threads of a program. 64 threads are 16 channels of 16 states, whose row in bfloat16 is a sector
# of 32 bytes in memory. 32 are one warp, which sums dB and dC alone, and 8 steps are what its registers hold there.
FORWARD_TILE, FORWARD_THREADS = 16, 64
BACKWARD_TILE, BACKWARD_THREADS = 8, 32
CONV_TILE, CONV_BLOCK = 32, 64  # steps and channels of a program of the convolution

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0)


# ----------------------------------------------------------------------------------------------------
# Of all functions
# ----------------------------------------------------------------------------------------------------


def _count(length: int, tile: int) -> int:
    """Tiles that cover a length. Not Triton's own functions: torch.compile does not look into them."""
    return -(-length // tile)


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _row_strides(z: Tensor | None) -> tuple[int, int]:
    return (0, 0) if z is None else (z.stride(0), z.stride(1))


def _device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the one of a model that is spread over several."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


# ----------------------------------------------------------------------------------------------------
# Selective scan: kernels
# ----------------------------------------------------------------------------------------------------


@triton.jit
def _softplus(v):
    """log(1 + exp(v)), exact to the last digits for a small result too, where log(1 + e) alone would lose them."""
    e = tl.exp(-tl.abs(v))
    series = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e / 5))))
    return tl.maximum(v, 0.0) + tl.where(e < 0.05, series, tl.log(1 + e))


@triton.jit
def _step_of(tile, steps, step):
    """(1, ...): one step of a tile (time, ...). As a sum of integers, all but one 0, it costs no instruction."""
    bits = tl.where(steps == step, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def _decays(delta, A, seq_ptr, times, length, RESETS: tl.constexpr):
    """exp(delta A), or 0 where a step belongs to another sequence than the one before: (time, part, channel, lane)."""
    decay = tl.exp2(delta[:, None, :, None] * (A * LOG2_E))
    if RESETS:
        here = tl.load(seq_ptr + times, mask=times < length, other=0)
        before = tl.load(seq_ptr + tl.maximum(times - 1, 0), mask=times < length, other=0)
        decay = tl.where((here != before)[:, None, None, None], 0.0, decay)
    return decay


@triton.jit(do_not_specialize=["length"])
def _scan_forward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, initial_ptr, seq_ptr,
    y_ptr, final_ptr, kept_ptr,
    z_batch, z_time, length, channels, states,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    RESETS: tl.constexpr, KEEP: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    has_channel = channel < channels
    state = tl.arange(0, LANES)[None, :] * PARTS + tl.arange(0, PARTS)[:, None]  # (part, lane)
    # Of a matrix (channels, states): (1, part, channel, lane), like one step of a tile.
    cell = channel[None, None, :, None] * states + state[None, :, None, :]
    has_cell = has_channel[None, None, :, None] & (state < states)[None, :, None, :]
    steps = tl.arange(0, TILE)[:, None, None, None]

    A = _load(A_ptr + cell, has_cell).to(tl.float32)
    if HAS_INITIAL:
        h = _load(initial_ptr + batch * channels * states + cell, has_cell).to(tl.float32)
    else:
        h = tl.zeros([1, PARTS, BLOCK, LANES], tl.float32)
    if HAS_BIAS:
        bias = _load(bias_ptr + channel, has_channel).to(tl.float32)
    if HAS_D:
        D = _load(D_ptr + channel, has_channel).to(tl.float32)

    # Pointers to the rows of the tile at hand; they move on with it, since offsets may not fit into 32 bits.
    times = tl.arange(0, TILE)
    row = batch * length + times
    x_ptrs = x_ptr + row[:, None] * channels + channel[None, :]
    dt_ptrs = dt_ptr + row[:, None] * channels + channel[None, :]
    y_ptrs = y_ptr + row[:, None] * channels + channel[None, :]
    B_ptrs = B_ptr + row[:, None, None] * states + state[None, :, :]
    C_ptrs = C_ptr + row[:, None, None] * states + state[None, :, :]
    if HAS_Z:
        z_ptrs = z_ptr + batch * z_batch + times[:, None].to(tl.int64) * z_time + channel[None, :]
    if KEEP:
        kept_ptrs = kept_ptr + batch * tl.cdiv(length, TILE) * channels * states + cell
    if RESETS:
        seq_ptr += batch * length

    inside = (times < length)[:, None] & has_channel[None, :]
    inside_n = (times < length)[:, None, None] & (state < states)[None, :, :]
    next_x, next_dt = _load(x_ptrs, inside), _load(dt_ptrs, inside)
    # In float32, or Triton would spread 16-bit numbers over the threads and have each of them converted 16 times.
    next_B, next_C = _load(B_ptrs, inside_n).to(tl.float32), _load(C_ptrs, inside_n).to(tl.float32)
    if HAS_Z:
        next_z = _load(z_ptrs, inside)

    for start in range(0, length, TILE):
        x, dt, B, C = next_x.to(tl.float32), next_dt.to(tl.float32), next_B, next_C
        if HAS_Z:
            z = next_z.to(tl.float32)
        # The loads of the next tile go out before this one is worked on.
        times = start + tl.arange(0, TILE)
        ahead = (times + TILE < length)[:, None] & has_channel[None, :]
        ahead_n = (times + TILE < length)[:, None, None] & (state < states)[None, :, :]
        x_ptrs += TILE * channels
        dt_ptrs += TILE * channels
        B_ptrs += TILE * states
        C_ptrs += TILE * states
        next_x, next_dt = _load(x_ptrs, ahead), _load(dt_ptrs, ahead)
        next_B, next_C = _load(B_ptrs, ahead_n).to(tl.float32), _load(C_ptrs, ahead_n).to(tl.float32)
        if HAS_Z:
            z_ptrs += TILE * z_time
            next_z = _load(z_ptrs, ahead)

        if KEEP:
            tl.store(kept_ptrs, h, mask=has_cell)
            kept_ptrs += channels * states
        if HAS_BIAS:
            dt += bias[None, :]
        # After the last step the state stays as it is: decay 1, input 0.
        delta = tl.where((times < length)[:, None], _softplus(dt), 0.0)
        decay = _decays(delta, A, seq_ptr, times, length, RESETS)
        value = (delta * x)[:, None, :, None] * B[:, :, None, :]
        h_tile = tl.zeros([TILE, PARTS, BLOCK, LANES], tl.float32)
        for step in tl.static_range(TILE):
            h = _step_of(decay, steps, step) * h + _step_of(value, steps, step)
            h_tile = tl.where(steps == step, h, h_tile)
        y = tl.sum(tl.sum(h_tile * C[:, :, None, :], 1), 2)  # (time, channel)
        if HAS_D:
            y += D[None, :] * x
        if HAS_Z:
            y *= z * tl.sigmoid(z)
        tl.store(y_ptrs, y, mask=(times < length)[:, None] & has_channel[None, :])
        y_ptrs += TILE * channels

    tl.store(final_ptr + batch * channels * states + cell, h, mask=has_cell)


@triton.jit(do_not_specialize=["length"])
def _scan_backward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, seq_ptr, kept_ptr, dy_ptr, dstate_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr,
    z_batch, z_time, length, channels, states,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, RESETS: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """With g_t the gradient of h_t:  g_t = C_t dy_t + decay_(t+1) g_(t+1)."""
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    has_channel = channel < channels
    state = tl.arange(0, LANES)[None, :] * PARTS + tl.arange(0, PARTS)[:, None]  # (part, lane)
    cell = channel[None, None, :, None] * states + state[None, :, None, :]  # (1, part, channel, lane)
    has_cell = has_channel[None, None, :, None] & (state < states)[None, :, None, :]
    steps = tl.arange(0, TILE)[:, None, None, None]

    A = _load(A_ptr + cell, has_cell).to(tl.float32)
    if HAS_BIAS:
        bias = _load(bias_ptr + channel, has_channel).to(tl.float32)
    if HAS_D:
        D = _load(D_ptr + channel, has_channel).to(tl.float32)
    # Gradient that reaches the last state of the tile from later; at the end that of the initial state.
    dstate_ptrs = dstate_ptr + batch * channels * states + cell
    carry = _load(dstate_ptrs, has_cell)
    dA = tl.zeros([1, PARTS, BLOCK, LANES], tl.float32)
    dD = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)

    # Offsets of the rows of a tile move back with it, and its loads go out one tile ahead, as in the forward pass.
    tiles = tl.cdiv(length, TILE)
    times = (tiles - 1) * TILE + tl.arange(0, TILE)
    row = batch * length + times
    at = row[:, None] * channels + channel[None, :]  # (time, channel)
    at_n = row[:, None, None] * states + state[None, :, :]  # (time, part, lane)
    at_kept = (batch * tiles + tiles - 1) * channels * states + cell
    inside = (times < length)[:, None] & has_channel[None, :]
    inside_n = (times < length)[:, None, None] & (state < states)[None, :, :]
    next_x, next_dt, next_dy = _load(x_ptr + at, inside), _load(dt_ptr + at, inside), _load(dy_ptr + at, inside)
    next_B, next_C = _load(B_ptr + at_n, inside_n).to(tl.float32), _load(C_ptr + at_n, inside_n).to(tl.float32)
    next_h = _load(kept_ptr + at_kept, has_cell)
    if HAS_Z:
        at_z = batch * z_batch + times[:, None].to(tl.int64) * z_time + channel[None, :]
        next_z = _load(z_ptr + at_z, inside)
    if RESETS:
        seq_ptr += batch * length

    for index in range(0, tiles):
        x, dt, dy, B, C = next_x.to(tl.float32), next_dt.to(tl.float32), next_dy.to(tl.float32), next_B, next_C
        h = next_h
        times = (tiles - 1 - index) * TILE + tl.arange(0, TILE)
        inside = (times < length)[:, None] & has_channel[None, :]
        inside_n = (times < length)[:, None, None] & (state < states)[None, :, :]
        ahead = (times >= TILE)[:, None] & has_channel[None, :]
        ahead_n = (times >= TILE)[:, None, None] & (state < states)[None, :, :]
        next_at, next_at_n = at - TILE * channels, at_n - TILE * states
        at_kept -= channels * states
        next_x, next_dt = _load(x_ptr + next_at, ahead), _load(dt_ptr + next_at, ahead)
        next_dy = _load(dy_ptr + next_at, ahead)
        next_B = _load(B_ptr + next_at_n, ahead_n).to(tl.float32)
        next_C = _load(C_ptr + next_at_n, ahead_n).to(tl.float32)
        next_h = _load(kept_ptr + at_kept, has_cell & (index < tiles - 1))
        if HAS_Z:
            z = next_z.to(tl.float32)
            at_z -= TILE * z_time
            next_z = _load(z_ptr + at_z, ahead)

        if HAS_BIAS:
            dt += bias[None, :]
        delta = tl.where((times < length)[:, None], _softplus(dt), 0.0)
        decay = _decays(delta, A, seq_ptr, times, length, RESETS)
        value = (delta * x)[:, None, :, None] * B[:, :, None, :]
        before = tl.zeros([TILE, PARTS, BLOCK, LANES], tl.float32)  # state before each step
        for step in tl.static_range(TILE):
            before = tl.where(steps == step, h, before)
            h = _step_of(decay, steps, step) * h + _step_of(value, steps, step)
        h_tile = decay * before + value

        if HAS_Z:
            gate = tl.sigmoid(z)
            y = tl.sum(tl.sum(h_tile * C[:, :, None, :], 1), 2)
            if HAS_D:
                y += D[None, :] * x
            tl.store(dz_ptr + at, dy * y * gate * (1 + z * (1 - gate)), mask=inside)
            dy *= z * gate  # from here on of the output before the gate
        tl.atomic_add(dC_ptr + at_n, tl.sum(h_tile * dy[:, None, :, None], 2), mask=inside_n, sem="relaxed")

        g = C[:, :, None, :] * dy[:, None, :, None]
        for step in tl.static_range(TILE - 1, -1, -1):
            g_step = _step_of(g, steps, step) + carry
            g = tl.where(steps == step, g_step, g)
            carry = _step_of(decay, steps, step) * g_step
        tl.atomic_add(dB_ptr + at_n, tl.sum(g * (delta * x)[:, None, :, None], 2), mask=inside_n, sem="relaxed")

        d_value = tl.sum(tl.sum(g * B[:, :, None, :], 1), 2)  # of delta x: (time, channel)
        d_decay = g * decay * before  # of delta A
        d_delta = tl.sum(tl.sum(d_decay * A, 1), 2) + d_value * x
        dA += tl.sum(d_decay * delta[:, None, :, None], 0, keep_dims=True)
        d_dt = tl.where(inside, d_delta * tl.sigmoid(dt), 0.0)
        tl.store(ddt_ptr + at, d_dt, mask=inside)
        dbias += tl.sum(d_dt, 0)
        dx = d_value * delta
        if HAS_D:
            dx += D[None, :] * dy
            dD += tl.sum(dy * x, 0)
        tl.store(dx_ptr + at, dx, mask=inside)
        at, at_n = next_at, next_at_n

    tl.store(dstate_ptrs, carry, mask=has_cell)
    tl.store(dA_ptr + batch * channels * states + cell, dA, mask=has_cell)
    if HAS_D:
        tl.store(dD_ptr + batch * channels + channel, dD, mask=has_channel)
    if HAS_BIAS:
        tl.store(dbias_ptr + batch * channels + channel, dbias, mask=has_channel)


# ----------------------------------------------------------------------------------------------------
# Selective scan: functions
# ----------------------------------------------------------------------------------------------------


def selective_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` by Triton kernels: same arguments, shapes, dtypes, result and errors.

    Gradients flow to every floating point argument, through the outputs and through the final state.
    """
    _check_shapes(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    arguments = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in arguments):
        return _Scan.apply(*arguments, seq_idx)
    return _forward(*_contiguous(*arguments, seq_idx), keep=False)[:2]


def selective_state_update_triton(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan of one token in one launch, without gradients.

    Args:
        state (`Tensor` of shape `(batch, channels, states)`): state before the token; contiguous. Updated in place.
        x, dt, z (`Tensor` of shape `(batch, channels)`): as in `selective_scan`, without the axis of time.
        B, C (`Tensor` of shape `(batch, states)`): likewise.
        A, D, dt_bias: as in `selective_scan`.

    Returns:
        `y` of the shape and dtype of `x`, and `state`.

    Raises:
        ValueError: if two shapes do not agree, or `state` is not contiguous.
    """
    x, dt, B, C = x[:, None], dt[:, None], B[:, None], C[:, None]
    z = None if z is None else z[:, None]
    _check_shapes(x, dt, A, B, C, D, z, dt_bias, state, None)
    if not state.is_contiguous():
        raise ValueError(f"state must be contiguous to be updated in place, but its strides are {state.stride()}")
    y, _, _ = _forward(*_contiguous(x, dt, A, B, C, D, z, dt_bias, state, None), keep=False, final_state=state)
    return y[:, 0], state


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        arguments = _contiguous(*arguments)
        y, final_state, kept = _forward(*arguments, keep=True)
        ctx.save_for_backward(*arguments, kept)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):
        x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, kept = ctx.saved_tensors
        batch, length, channels = x.shape
        # The kernel begins with the gradient of the last state and leaves that of the first one there.
        dstate = grad_state.float().clone(memory_format=torch.contiguous_format)
        dx, ddt = torch.empty_like(x), torch.empty_like(dt)
        dz = None if z is None else x.new_empty(x.shape, dtype=z.dtype)
        dB, dC = (torch.zeros_like(t, dtype=torch.float32) for t in (B, C))
        # One part per row of the batch, added up below.
        dA = A.new_empty(batch, *A.shape, dtype=torch.float32)
        dD, dbias = (A.new_empty(batch, channels, dtype=torch.float32) for _ in range(2))
        blocks, sizes = _sizes(x, A, BACKWARD_TILE, BACKWARD_THREADS)
        with _device(x):
            _scan_backward[blocks, batch](
                x, dt, A, B, C, D, z, dt_bias, seq_idx, kept, grad_y.contiguous(), dstate,
                dx, ddt, dA, dB, dC, dD, dz, dbias,
                *_row_strides(z), length, channels, A.shape[1],
                HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=dt_bias is not None, RESETS=seq_idx is not None,
                **sizes,
            )  # fmt: skip
        return (
            dx,
            ddt,
            dA.sum(0).to(A.dtype),
            dB.to(B.dtype),
            dC.to(C.dtype),
            None if D is None else dD.sum(0).to(D.dtype),
            dz,
            None if dt_bias is None else dbias.sum(0).to(dt_bias.dtype),
            None if initial_state is None else dstate.to(initial_state.dtype),
            None,
        )


def _forward(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, *, keep, final_state=None):
    """Outputs, final state, and if asked for the state before each tile (batch, tiles, channels, states)."""
    batch, length, channels = x.shape
    states = A.shape[1]
    y = torch.empty_like(x)
    if final_state is None:
        final_state = x.new_empty(batch, channels, states, dtype=torch.float32)
    tile = BACKWARD_TILE if keep else 1 if length == 1 else FORWARD_TILE
    blocks, sizes = _sizes(x, A, tile, FORWARD_THREADS)
    kept = x.new_empty(batch, _count(length, tile), channels, states, dtype=torch.float32) if keep else None
    with _device(x):
        _scan_forward[blocks, batch](
            x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx,
            y, final_state, kept,
            *_row_strides(z), length, channels, states,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=dt_bias is not None,
            HAS_INITIAL=initial_state is not None, RESETS=seq_idx is not None, KEEP=keep, **sizes,
        )  # fmt: skip
    return y, final_state, kept


def _contiguous(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx):
    """The arguments as the kernels address them. z, half of a projection's output, only needs contiguous channels."""
    if z is not None and z.stride(2) != 1:
        z = z.contiguous()
    rest = (None if t is None else t.contiguous() for t in (x, dt, A, B, C, D, dt_bias, initial_state, seq_idx))
    x, dt, A, B, C, D, dt_bias, initial_state, seq_idx = rest
    return x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx


def _sizes(x: Tensor, A: Tensor, tile: int, threads: int) -> tuple[int, dict[str, int]]:
    """How many programs share the channels, and their constants. Any number of channels and states is allowed."""
    channels, states = x.shape[2], _power_of_2(A.shape[1])
    parts = min(PARTS, states)
    lanes = states // parts
    block = min(max(1, threads // lanes), _power_of_2(channels))
    sizes = {"TILE": tile, "BLOCK": block, "PARTS": parts, "LANES": lanes, "num_warps": max(1, block * lanes // 32)}
    return _count(channels, block), sizes


# ----------------------------------------------------------------------------------------------------
# Causal convolution
# ----------------------------------------------------------------------------------------------------


@triton.jit
def _unbroken(seq_ptr, times, length, BACK: tl.constexpr):
    """(time,): whether the last BACK steps are of the same sequence; the context is of that of the first step."""
    same = times == times
    for back in tl.static_range(BACK):
        here = tl.load(seq_ptr + tl.maximum(times - back, 0), mask=times < length, other=0)
        before = tl.load(seq_ptr + tl.maximum(times - back - 1, 0), mask=times < length, other=0)
        same &= here == before
    return same


@triton.jit
def _conv_input(
    x_ptr, context_ptr, seq_ptr,
    x_time, times, length, channel, channels,
    RESETS: tl.constexpr, BACK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(time, channel): the input BACK steps before `times`, from x or the context, 0 if of another sequence."""
    source = (times - BACK)[:, None]
    row, column = source.to(tl.int64), channel[None, :]
    ptrs = tl.where(source < 0, context_ptr + (row + WIDTH - 1) * channels, x_ptr + row * x_time) + column
    x = _load(ptrs, (source > -WIDTH) & (source < length) & (column < channels)).to(tl.float32)
    if RESETS:
        x = tl.where(_unbroken(seq_ptr, times, length, BACK)[:, None], x, 0.0)
    return x


@triton.jit
def _conv_sum(
    x_ptr, context_ptr, weight_ptr, bias_ptr, seq_ptr,
    x_time, times, length, channel, channels,
    HAS_BIAS: tl.constexpr, RESETS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(time, channel): the convolution before its activation."""
    total = tl.zeros([TILE, BLOCK], tl.float32)
    if HAS_BIAS:
        total += _load(bias_ptr + channel, channel < channels).to(tl.float32)[None, :]
    for back in tl.static_range(WIDTH):
        weight = _load(weight_ptr + channel * WIDTH + WIDTH - 1 - back, channel < channels).to(tl.float32)
        x = _conv_input(x_ptr, context_ptr, seq_ptr, x_time, times, length, channel, channels, RESETS, back, WIDTH)
        total += weight[None, :] * x
    return total


@triton.jit(do_not_specialize=["length"])
def _conv_forward(
    x_ptr, context_ptr, weight_ptr, bias_ptr, seq_ptr,
    y_ptr,
    x_batch, x_time, length, channels,
    HAS_BIAS: tl.constexpr, RESETS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    times = tl.program_id(0) * TILE + tl.arange(0, TILE)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(2).to(tl.int64)
    x_ptr += batch * x_batch
    context_ptr += batch * (WIDTH - 1) * channels
    if RESETS:
        seq_ptr += batch * length
    total = _conv_sum(
        x_ptr, context_ptr, weight_ptr, bias_ptr, seq_ptr,
        x_time, times, length, channel, channels,
        HAS_BIAS, RESETS, WIDTH, TILE, BLOCK,
    )  # fmt: skip
    y_ptrs = y_ptr + (batch * length + times)[:, None] * channels + channel[None, :]
    tl.store(y_ptrs, total * tl.sigmoid(total), mask=(times < length)[:, None] & (channel < channels)[None, :])


@triton.jit(do_not_specialize=["length"])
def _conv_backward(
    x_ptr, context_ptr, weight_ptr, bias_ptr, seq_ptr, dy_ptr,
    dx_ptr, dcontext_ptr, dweight_ptr, dbias_ptr,
    x_batch, x_time, length, channels,
    HAS_BIAS: tl.constexpr, RESETS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of `TILE` steps of the input; the first WIDTH - 1 of them all are the context, at negative times.

    A step of the input reaches WIDTH outputs, whose sums are computed again: cheaper than to store them.
    """
    times = tl.program_id(0) * TILE + tl.arange(0, TILE) - (WIDTH - 1)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    has_channel = channel < channels
    batch = tl.program_id(2).to(tl.int64)
    x_ptr += batch * x_batch
    context_ptr += batch * (WIDTH - 1) * channels
    dy_ptr += batch * length * channels
    if RESETS:
        seq_ptr += batch * length
    dx = tl.zeros([TILE, BLOCK], tl.float32)
    for later in tl.static_range(WIDTH):
        outputs = times + later
        total = _conv_sum(
            x_ptr, context_ptr, weight_ptr, bias_ptr, seq_ptr,
            x_time, outputs, length, channel, channels,
            HAS_BIAS, RESETS, WIDTH, TILE, BLOCK,
        )  # fmt: skip
        mask = ((outputs >= 0) & (outputs < length))[:, None] & has_channel[None, :]
        dy = _load(dy_ptr + outputs[:, None].to(tl.int64) * channels + channel[None, :], mask).to(tl.float32)
        gate = tl.sigmoid(total)
        dtotal = dy * gate * (1 + total * (1 - gate))
        if later == 0:
            # One part per tile and row, added up outside.
            part = (batch * tl.num_programs(0) + tl.program_id(0)) * channels + channel
            if HAS_BIAS:
                tl.store(dbias_ptr + part, tl.sum(dtotal, 0), mask=has_channel)
            for back in tl.static_range(WIDTH):
                x = _conv_input(
                    x_ptr, context_ptr, seq_ptr, x_time, outputs, length, channel, channels, RESETS, back, WIDTH
                )
                tl.store(dweight_ptr + part * WIDTH + WIDTH - 1 - back, tl.sum(dtotal * x, 0), mask=has_channel)
        weight = _load(weight_ptr + channel * WIDTH + WIDTH - 1 - later, has_channel).to(tl.float32)
        if RESETS:
            dtotal = tl.where(_unbroken(seq_ptr, outputs, length, later)[:, None], dtotal, 0.0)
        dx += weight[None, :] * dtotal
    inside = ((times >= 0) & (times < length))[:, None] & has_channel[None, :]
    tl.store(dx_ptr + (batch * length + times)[:, None] * channels + channel[None, :], dx, mask=inside)
    context_row = batch * (WIDTH - 1) + times + WIDTH - 1
    in_context = (times < 0)[:, None] & has_channel[None, :]
    tl.store(dcontext_ptr + context_row[:, None] * channels + channel[None, :], dx, mask=in_context)


def causal_conv1d_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, context: Tensor, seq_idx: Tensor | None = None
) -> Tensor:
    """Depthwise causal convolution after a left context, then SiLU; sums in float32.

    `F.silu(F.conv1d(cat([context, x], 1).transpose(1, 2), weight[:, None], bias, groups=channels)).transpose(1, 2)`

    Args:
        x (`Tensor` of shape `(batch, length, channels)`): input; it may be a part of wider rows.
        weight (`Tensor` of shape `(channels, width)`): the last column belongs to the step itself.
        bias (`Tensor` of shape `(channels,)` or `None`).
        context (`Tensor` of shape `(batch, width - 1, channels)`): the inputs before the first step.
        seq_idx (`Tensor` of shape `(batch, length)`, *optional*): nothing is seen across a step where this changes;
            `context` belongs to the sequence of the first step.

    Returns:
        Tensor of the shape and dtype of `x`. Gradients flow to `x`, `weight`, `bias` and `context`.

    Raises:
        ValueError: if two shapes do not agree; the message names the argument and both shapes.
    """
    if x.ndim != 3 or weight.ndim != 2:
        raise ValueError(
            f"x must be (batch, length, channels) and weight (channels, width), not {x.shape} and {weight.shape}"
        )
    batch, length, channels = x.shape
    width = weight.shape[1]
    expected = {
        "weight": (weight, (channels, width)),
        "bias": (bias, (channels,)),
        "context": (context, (batch, width - 1, channels)),
        "seq_idx": (seq_idx, (batch, length)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but x {tuple(x.shape)} needs {shape}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, context)):
        return _Conv.apply(x, weight, bias, context, seq_idx)
    return _convolve(*_conv_contiguous(x, weight, bias, context, seq_idx))


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, context, seq_idx):
        ctx.context_dtype = context.dtype
        arguments = _conv_contiguous(x, weight, bias, context, seq_idx)
        ctx.save_for_backward(*arguments)
        return _convolve(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight, bias, context, seq_idx = ctx.saved_tensors
        batch, length, channels = x.shape
        width = weight.shape[1]
        tiles = _count(length + width - 1, CONV_TILE)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dcontext = torch.empty_like(context, dtype=ctx.context_dtype)
        dweight = x.new_empty(batch * tiles, channels, width, dtype=torch.float32)
        dbias = x.new_empty(batch * tiles, channels, dtype=torch.float32)
        with _device(x):
            _conv_backward[tiles, _count(channels, CONV_BLOCK), batch](
                x, context, weight, bias, seq_idx, grad_y.contiguous(),
                dx, dcontext, dweight, dbias,
                *_row_strides(x), length, channels,
                HAS_BIAS=bias is not None, RESETS=seq_idx is not None,
                WIDTH=width, TILE=CONV_TILE, BLOCK=CONV_BLOCK,
            )  # fmt: skip
        dbias = None if bias is None else dbias.sum(0).to(bias.dtype)
        return dx, dweight.sum(0).to(weight.dtype), dbias, dcontext, None


def _convolve(x, weight, bias, context, seq_idx) -> Tensor:
    batch, length, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with _device(x):
        _conv_forward[_count(length, CONV_TILE), _count(channels, CONV_BLOCK), batch](
            x, context, weight, bias, seq_idx,
            y,
            *_row_strides(x), length, channels,
            HAS_BIAS=bias is not None, RESETS=seq_idx is not None,
            WIDTH=weight.shape[1], TILE=CONV_TILE, BLOCK=CONV_BLOCK,
        )  # fmt: skip
    return y


def _conv_contiguous(x, weight, bias, context, seq_idx):
    """The arguments as the kernels address them; context and x of one dtype, so that one load reads from either."""
    if x.stride(2) != 1:
        x = x.contiguous()
    weight, bias, context, seq_idx = (
        None if t is None else t.contiguous() for t in (weight, bias, context.to(x.dtype), seq_idx)
    )
    return x, weight, bias, context, seq_idx
