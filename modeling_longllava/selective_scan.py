"""The selective scan of Mamba-1 (arXiv 2312.00752, section 3.2 and algorithm 2), with a state that can be carried.

Glossary (symbol in the paper in brackets):

    x   input of the scan                                  (batch, length, channels)
    dt  time step before bias and softplus [Delta]         (batch, length, channels)
    A   diagonal of the state matrix, negative [A]         (channels, states)
    B   input projection [B]                               (batch, length, states)
    C   output projection [C]                              (batch, length, states)
    D   skip connection [D]                                (channels,)
    z   gate                                               (batch, length, channels)
    h   state [h]                                          (batch, channels, states), float32

    delta_t = softplus(dt_t + dt_bias)
    h_t     = exp(delta_t A) h_(t-1) + delta_t B_t x_t
    y_t     = (C_t . h_t + D x_t) silu(z_t)

Everything is channels last, so that the mixer around it transposes nothing. `selective_scan_ref` is the plain loop
that defines the result; `selective_scan` gives the same numbers from the fastest backend that is there, or from the
one that the environment variable LONGLLAVA_SCAN names:

    mamba_ssm   its CUDA kernel, first choice on a GPU
    triton      our kernels for a GPU, second choice; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1)
    torch       PyTorch operations, anywhere
    compile     torch.compile for a CPU, never chosen by itself, since compiling takes a while and a C++ compiler
"""

import importlib
import importlib.util
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Steps between two states that are kept for the backward pass, and values of one step that are worked on at a time.
# Together they bound every temporary tensor to CHUNK_LENGTH * BLOCK_VALUES float32 numbers (8 MB), near the caches.
CHUNK_LENGTH = 64
BLOCK_VALUES = 32768

LOG2_E = math.log2(math.e)

HAS_MAMBA_SSM = importlib.util.find_spec("mamba_ssm") is not None
HAS_TRITON = importlib.util.find_spec("triton") is not None


def selective_scan_ref(
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
    """The definition of [`selective_scan`], one step after the other; same arguments, same result."""
    _check_shapes(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    dtype, A = x.dtype, A.float()
    x, dt, B, C = x.float(), dt.float(), B.float(), C.float()
    delta = F.softplus(dt if dt_bias is None else dt + dt_bias.float())
    state = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.float()
    outputs = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None]
        decay = torch.exp(delta[:, t, :, None] * A)  # (batch, channels, states)
        state = decay * state + (delta[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + x * D.float()
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(dtype), state


def selective_scan(
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
    """Run the selective scan over a sequence, from a given state, and return the outputs and the last state.

    States, exponentials and sums are float32 whatever the dtype of the inputs. Gradients flow to every floating point
    argument, through the outputs and through the final state (`mamba_ssm`'s kernel: through the outputs only); the
    backward pass computes the states again from one state per 64 steps instead of storing them all.

    Args:
        x (`Tensor` of shape `(batch, length, channels)`): input.
        dt (`Tensor` of shape `(batch, length, channels)`): time step before bias and softplus.
        A (`Tensor` of shape `(channels, states)`): diagonal of the state matrix, negative.
        B, C (`Tensor` of shape `(batch, length, states)`): input and output projections.
        D (`Tensor` of shape `(channels,)`, *optional*): skip connection.
        z (`Tensor` of shape `(batch, length, channels)`, *optional*): gate; the output is multiplied by its SiLU.
        dt_bias (`Tensor` of shape `(channels,)`, *optional*): added to `dt`.
        initial_state (`Tensor` of shape `(batch, channels, states)`, *optional*): state before the first step.
        seq_idx (`Tensor` of shape `(batch, length)`, *optional*): the state starts again from zero wherever this
            changes from one step to the next; `initial_state` belongs to the sequence of the first step.

    Returns:
        `y` of the shape and dtype of `x`, and the state after the last step, `(batch, channels, states)` in float32.

    Raises:
        ValueError: if two shapes do not agree; the message names the argument and both shapes.
    """
    _check_shapes(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    backend = selective_scan_backend(x.device)
    if backend == "mamba_ssm" and (seq_idx is not None or x.shape[1] == 1):
        # Its kernel neither resets inside a row nor pays off for one token.
        backend = "triton" if HAS_TRITON else "torch"
    arguments = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    if backend == "mamba_ssm":
        kernel = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
        return _scan_with_kernel(kernel, *arguments)
    if backend == "triton":
        from .scan_triton import selective_scan_triton

        return selective_scan_triton(*arguments, seq_idx)
    train = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in arguments)
    # One token is one round of small operations; inside a larger graph its own compiler sees to it.
    if backend == "compile" and not train and x.shape[1] > 1 and not torch.compiler.is_compiling():
        from .scan_compiled import selective_scan_compiled

        return selective_scan_compiled(*arguments, seq_idx)
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], *A.shape, dtype=torch.float32)
    arguments = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return _ChunkedScan.apply(*arguments, seq_idx) if train else _scan_forward(*arguments, seq_idx)[:2]


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> Tensor:
    """The scan of one token, without gradients: a few operations, or one kernel, that write the state in place.

    Args:
        state (`Tensor` of shape `(batch, channels, states)`, float32): before the token; after it when this returns.
        x, dt, z (`Tensor` of shape `(batch, channels)`), B, C (`(batch, states)`): as in [`selective_scan`], of one
            token.

    Returns:
        `y` of the shape and dtype of `x`.

    Raises:
        ValueError: if two shapes do not agree; the message names the argument and both shapes.
    """
    with_time = [None if tensor is None else tensor[:, None] for tensor in (x, dt, B, C, z)]
    _check_shapes(with_time[0], with_time[1], A, with_time[2], with_time[3], D, with_time[4], dt_bias, state, None)
    backend = selective_scan_backend(x.device)
    if HAS_TRITON and backend in ("triton", "mamba_ssm"):
        from .scan_triton import selective_state_update_triton

        return selective_state_update_triton(state, x, dt, A, B, C, D, z, dt_bias)[0]
    values = x.float()
    delta = F.softplus(dt.float() if dt_bias is None else dt.float() + dt_bias.float())
    state.mul_(torch.exp2(delta[..., None] * (A.float() * LOG2_E)))
    state.addcmul_((delta * values)[..., None], B.float()[:, None])
    y = torch.matmul(state, C.float()[..., None])[..., 0]
    if D is not None:
        y = torch.addcmul(y, values, D.float())
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(x.dtype)


def selective_scan_backend(device: torch.device | str | None = None) -> str:
    """Name what [`selective_scan`] runs for tensors on `device`: `mamba_ssm`, `triton`, `torch` or `compile`.

    Without a device it answers for the GPU if there is one, else for the CPU. The environment variable LONGLLAVA_SCAN
    is read at every call.

    Raises:
        ValueError: if LONGLLAVA_SCAN names something unknown, or what cannot run on that device or is not installed;
            the message names both and what can run.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device).type
    on_gpu = where == "cuda"
    possible = {
        "mamba_ssm": on_gpu and HAS_MAMBA_SSM,
        "triton": HAS_TRITON and (on_gpu or os.environ.get("TRITON_INTERPRET") == "1"),
        "torch": True,
        "compile": where == "cpu",
    }
    wanted = os.environ.get("LONGLLAVA_SCAN")
    if not wanted:
        return next(name for name, can_run in possible.items() if can_run) if on_gpu else "torch"
    if not possible.get(wanted, False):
        reason = "cannot run" if wanted in possible else "is unknown"
        names = ", ".join(name for name, can_run in possible.items() if can_run)
        installed = f"mamba_ssm {_is_installed(HAS_MAMBA_SSM)}, triton {_is_installed(HAS_TRITON)}"
        raise ValueError(f"LONGLLAVA_SCAN={wanted} {reason} on {where} ({installed}); possible here: {names}")
    return wanted


def _is_installed(there: bool) -> str:
    return "is installed" if there else "is not installed"


def _check_shapes(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx) -> None:
    if x.ndim != 3 or A.ndim != 2:
        raise ValueError(f"x must be (batch, length, channels) and A (channels, states), not {x.shape} and {A.shape}")
    batch, length, channels = x.shape
    states = A.shape[1]
    if length == 0:
        raise ValueError("x has length 0: there is nothing to scan")
    expected = {
        "dt": (dt, (batch, length, channels)),
        "A": (A, (channels, states)),
        "B": (B, (batch, length, states)),
        "C": (C, (batch, length, states)),
        "D": (D, (channels,)),
        "z": (z, (batch, length, channels)),
        "dt_bias": (dt_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, states)),
        "seq_idx": (seq_idx, (batch, length)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but x {tuple(x.shape)} needs {shape}")


# ----------------------------------------------------------------------------------------------------
# PyTorch: chunks of time, blocks of channels. Inside a chunk tensors are (time, batch, state, channel): a step is one
# in-place operation on contiguous memory, and sums over states or channels are matrix products.
# ----------------------------------------------------------------------------------------------------


def _blocks(x: Tensor, states: int) -> list[slice]:
    """Channels worked on together, so that one step has at most BLOCK_VALUES numbers (and at least 32 channels)."""
    batch, _, channels = x.shape
    width = max(32, BLOCK_VALUES // (batch * states))
    return [slice(start, min(start + width, channels)) for start in range(0, channels, width)]


def _chunks(length: int) -> list[slice]:
    return [slice(start, min(start + CHUNK_LENGTH, length)) for start in range(0, length, CHUNK_LENGTH)]


def _time_first(tensor: Tensor, chunk: slice, block: slice = slice(None)) -> Tensor:
    """(batch, length, channels) -> (time, batch, channels) of one chunk and block, float32."""
    return tensor[:, chunk, block].transpose(0, 1).float()


def _same_sequence(seq_idx: Tensor, chunk: slice) -> Tensor:
    """(time, batch, 1, 1): 1 where a step continues the sequence of the step before, 0 where it starts a new one."""
    same = torch.ones_like(seq_idx[:, chunk], dtype=torch.float32)
    first = 1 if chunk.start == 0 else 0
    same[:, first:] = (
        seq_idx[:, chunk.start + first : chunk.stop] == seq_idx[:, chunk.start + first - 1 : chunk.stop - 1]
    )
    return same.transpose(0, 1)[..., None, None]


def _chunk_states(x, delta, A_t, B, start_state, keep, decay, states, steps) -> None:
    """Fill `decay` and `states`, both (time, batch, state, channel), for one chunk that begins in `start_state`.

    `steps` holds the views of each step, (states[t], decay[t]): to make them anew for each chunk takes as long as the
    work on a few thousand numbers.
    """
    # Powers of two, since exp2 is several times faster than exp on a CPU, and twenty times where results underflow.
    torch.mul(delta[:, :, None], A_t * LOG2_E, out=decay)
    decay.exp2_()
    if keep is not None:
        decay.mul_(keep)
    torch.mul((delta * x)[:, :, None], B[..., None], out=states)
    previous = start_state
    for step, step_decay in steps[: len(states)]:
        step.addcmul_(step_decay, previous)
        previous = step


def _scan_forward(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, keep_chunk_states=False):
    """Outputs, final state, and if asked for the state before each chunk (chunks, batch, state, channel)."""
    batch, length, channels = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    A_t = A.float().t().contiguous()  # (state, channel)
    state = (
        initial_state.float().transpose(1, 2).clone(memory_format=torch.contiguous_format)
    )  # (batch, state, channel)
    chunks, kept = _chunks(length), None
    if keep_chunk_states:
        kept = x.new_empty(len(chunks), *state.shape, dtype=torch.float32)
    for block in _blocks(x, A.shape[1]):
        block_state = state[:, :, block].contiguous()
        buffers = x.new_empty(2, min(CHUNK_LENGTH, length), *block_state.shape, dtype=torch.float32)
        steps = list(zip(buffers[1].unbind(0), buffers[0].unbind(0), strict=True))
        for index, chunk in enumerate(chunks):
            if kept is not None:
                kept[index, :, :, block] = block_state
            x_c, dt_c = _time_first(x, chunk, block), _time_first(dt, chunk, block)
            delta = F.softplus(dt_c if dt_bias is None else dt_c + dt_bias[block].float())
            decay, states = buffers[:, : chunk.stop - chunk.start].unbind(0)
            keep = None if seq_idx is None else _same_sequence(seq_idx, chunk)
            B_c = _time_first(B, chunk)
            _chunk_states(x_c, delta, A_t[:, block], B_c, block_state, keep, decay, states, steps)
            block_state = states[-1].clone()
            y_c = torch.matmul(_time_first(C, chunk)[:, :, None], states)[:, :, 0]  # (time, batch, channel)
            if D is not None:
                y_c = torch.addcmul(y_c, x_c, D[block].float())
            if z is not None:
                y_c = y_c * F.silu(_time_first(z, chunk, block))
            y[:, chunk, block] = y_c.transpose(0, 1).to(y.dtype)
        state[:, :, block] = block_state
    return y, state.transpose(1, 2).contiguous(), kept


class _ChunkedScan(torch.autograd.Function):
    """The chunked scan with a backward pass that walks the chunks from the last to the first.

    With g_t the gradient of h_t:  g_t = C_t dy_t + exp(delta_(t+1) A) g_(t+1),  and all other gradients of a chunk are
    products of g, the states and the inputs of that chunk.
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx):
        y, final_state, chunk_states = _scan_forward(
            x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, keep_chunk_states=True
        )
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, chunk_states)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):
        x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, chunk_states = ctx.saved_tensors
        A_t = A.float().t().contiguous()
        length = x.shape[1]
        dx, ddt = torch.empty_like(x), torch.empty_like(dt)
        dz = None if z is None else torch.empty_like(z)
        dB, dC = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (B, C))
        dA_t, dD, dbias = torch.zeros_like(A_t), A_t.new_zeros(A.shape[0]), A_t.new_zeros(A.shape[0])
        grad_state = grad_state.float().transpose(1, 2).clone(memory_format=torch.contiguous_format)

        for block in _blocks(x, A.shape[1]):
            carry = grad_state[
                :, :, block
            ].contiguous()  # gradient that reaches the last state of the chunk from later
            buffers = x.new_empty(4, min(CHUNK_LENGTH, length), *carry.shape, dtype=torch.float32)
            decay_views, state_views, grad_views = (buffer.unbind(0) for buffer in buffers[:3])
            views = list(zip(state_views, decay_views, strict=True))
            for index, chunk in reversed(list(enumerate(_chunks(length)))):
                decay, states, grads, work = buffers[:, : chunk.stop - chunk.start].unbind(0)
                x_c, dt_c, B_c, C_c = (
                    _time_first(x, chunk, block),
                    _time_first(dt, chunk, block),
                    _time_first(B, chunk),
                    _time_first(C, chunk),
                )
                dt_c = dt_c if dt_bias is None else dt_c + dt_bias[block].float()
                delta, A_b = F.softplus(dt_c), A_t[:, block]
                start_state = chunk_states[index, :, :, block]
                keep = None if seq_idx is None else _same_sequence(seq_idx, chunk)
                _chunk_states(x_c, delta, A_b, B_c, start_state, keep, decay, states, views)

                dy = _time_first(grad_y, chunk, block)  # (time, batch, channel), from here on of the ungated output
                if z is not None:
                    z_c = _time_first(z, chunk, block)
                    gate = torch.sigmoid(z_c)
                    y_c = torch.matmul(C_c[:, :, None], states)[:, :, 0]
                    if D is not None:
                        y_c = torch.addcmul(y_c, x_c, D[block].float())
                    dz[:, chunk, block] = (dy * y_c * gate * (1 + z_c * (1 - gate))).transpose(0, 1).to(dz.dtype)
                    dy = dy * z_c * gate
                dC[:, chunk] += torch.matmul(states, dy[..., None])[..., 0].transpose(0, 1)

                torch.mul(C_c[..., None], dy[:, :, None], out=grads)
                steps, decays = grad_views[: len(grads)], decay_views[: len(grads)]
                steps[-1].add_(carry)
                for t in range(len(steps) - 2, -1, -1):
                    steps[t].addcmul_(decays[t + 1], steps[t + 1])
                carry = decays[0] * steps[0]

                dB[:, chunk] += torch.matmul(grads, (delta * x_c)[..., None])[..., 0].transpose(0, 1)
                d_input = torch.matmul(B_c[:, :, None], grads)[:, :, 0]  # of delta * x, (time, batch, channel)
                # Gradient of delta A: g_t h_(t-1) exp(delta A), which is zero where the state was reset.
                torch.mul(grads, decay, out=work)
                work[0].mul_(start_state)
                work[1:].mul_(states[:-1])
                d_delta = torch.mul(work, A_b, out=grads).sum(2).addcmul_(d_input, x_c)
                dA_t[:, block] += work.mul_(delta[:, :, None]).sum((0, 1))

                d_dt = d_delta * torch.sigmoid(dt_c)
                dbias[block] += d_dt.sum((0, 1))
                ddt[:, chunk, block] = d_dt.transpose(0, 1).to(ddt.dtype)
                dx_c = d_input * delta
                if D is not None:
                    dD[block] += (dy * x_c).sum((0, 1))
                    dx_c = torch.addcmul(dx_c, dy, D[block].float())
                dx[:, chunk, block] = dx_c.transpose(0, 1).to(dx.dtype)
            grad_state[:, :, block] = carry

        return (
            dx,
            ddt,
            dA_t.t().to(A.dtype),
            dB.to(B.dtype),
            dC.to(C.dtype),
            None if D is None else dD.to(D.dtype),
            dz,
            None if dt_bias is None else dbias.to(dt_bias.dtype),
            grad_state.transpose(1, 2).to(initial_state.dtype),
            None,
        )


# ----------------------------------------------------------------------------------------------------
# The CUDA kernel of mamba_ssm
# ----------------------------------------------------------------------------------------------------


def _scan_with_kernel(kernel, x, dt, A, B, C, D, z, dt_bias, initial_state) -> tuple[Tensor, Tensor]:
    """Run `kernel`, which has the signature of `mamba_ssm`'s `selective_scan_fn`, from any initial state.

    The kernel always begins at zero. A state is therefore written by leading pseudo-steps, one per state: step n has
    B = (0, .., 1, .., 0) and an x that leaves h[n] exactly as wanted after the decay of the pseudo-steps that follow.
    """
    batch, _, channels = x.shape
    # The kernel wants one dtype for all. The widest, since a time step or a state must not be rounded to that of x.
    dtype = torch.promote_types(x.dtype, dt.dtype) if initial_state is None else torch.float32
    sequences = [None if t is None else t.to(dtype) for t in (x, dt, B, C, z)]
    A = A.float()
    lead = 0
    if initial_state is not None:
        lead = A.shape[1]
        step = 2.0**-10  # small, so that the decay of the pseudo-steps, and what makes up for it, stays near one
        following = torch.arange(lead - 1, -1, -1, device=x.device)  # pseudo-steps after step n
        written = initial_state.float() * torch.exp(-A * step * following) / step  # (batch, channels, states)
        raw = torch.full((channels,), step, device=x.device).expm1().log()  # softplus of this is `step`
        if dt_bias is not None:
            raw = raw - dt_bias.float()
        zeros = A.new_zeros(batch, lead, channels)
        leads = (
            written.transpose(1, 2),
            raw.expand(batch, lead, channels),
            torch.eye(lead, device=x.device).expand(batch, -1, -1),
            zeros[..., :1].expand(-1, -1, lead),
            zeros,
        )
        sequences = [
            None if t is None else torch.cat([front, t], 1) for front, t in zip(leads, sequences, strict=True)
        ]
    u, delta, B, C, z = (None if t is None else t.transpose(1, 2) for t in sequences)
    y, final_state = kernel(
        u,
        delta,
        A,
        B,
        C,
        D=None if D is None else D.float(),
        z=z,
        delta_bias=None if dt_bias is None else dt_bias.float(),
        delta_softplus=True,
        return_last_state=True,
    )
    return y.transpose(1, 2)[:, lead:].to(x.dtype), final_state.float()
