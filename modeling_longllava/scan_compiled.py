"""The selective scan on a CPU through torch.compile; names and formulas are those of `selective_scan.py`.

The scan in PyTorch operations writes decays, inputs and states of 64 steps to memory and reads each of them again.
Here the compiler gets `STEPS` steps at once and makes one loop of them, over the states of 8 or 16 channels: the
state stays in a register, and of every step only y reaches memory. What else there is, softplus, D and the gate, is
small and stays outside.

Compilation takes some ten seconds, once for every number of channels and of states, whatever the length. PyTorch keeps
the result in its cache on disk for the next process, and in one process up to eight of them.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

LOG2_E = math.log2(math.e)
STEPS = 8  # With 16 the loop's values exceed the registers, with 4 the calls take as long as the work.
CHUNK_LENGTH = 64  # Steps of what stays outside, whose tensors then remain in the caches.

# 2^-f = 1 + c_1 f + ... + c_6 f^6 for f from 0 to 1, within 2.1e-9 of the result (least squares, reweighted until the
# largest relative error was smallest); scaled by 2^-30, see `_power`.
COEFFICIENTS = [
    c * 2.0**-30
    for c in (
        1,
        -0.6931470643239,
        0.2402243677815,
        -0.05549075692628,
        0.009579179405912,
        -0.001274748075089,
        0.0001090231596724,
    )
]

# Inductor, which writes the loop, would store what is used several times. The first three leave it all in one
# expression, the fourth keeps the loops in the order written, so that outputs (sums over the states) and the last
# state share one, and the last allows a multiplication and an addition in one instruction.
OPTIONS: dict[str, Any] = {
    "realize_reads_threshold": 10**6,
    "realize_opcount_threshold": 10**6,
    "realize_acc_reads_threshold": 10**6,
    "pick_loop_orders": False,
    "cpp.enable_floating_point_contract_flag": "fast",
}


def _power(v: Tensor) -> Tensor:
    """2^-v for v >= 0, and 0 from 31 on. `exp2` would be a call for every 16 numbers, which empties all registers."""
    v = v.clamp(max=32)
    whole = v.to(torch.int32)
    fraction = v - whole
    power = COEFFICIENTS[-1] * fraction
    for c in COEFFICIENTS[-2:0:-1]:
        power = (power + c) * fraction
    return (power + COEFFICIENTS[0]) * (2**30 >> whole)


def _steps(delta: Tensor, u: Tensor, rate: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`STEPS` steps of one row, unrolled.

    delta, u = delta x: (time, channel); rate = -A log2(e), state: (channel, state) with channels contiguous in
    memory; B, C: (time, state) -> y (time, channel) before D and gate, and the state, laid out as it came.
    """
    outputs = []
    for t in range(STEPS):
        state = _power(delta[t, :, None] * rate) * state + u[t, :, None] * B[t]
        outputs.append((state * C[t]).sum(1))
    return torch.stack(outputs), state


_compiled_steps = torch.compile(_steps, fullgraph=True, dynamic=False, options=OPTIONS)


@torch.no_grad()
def selective_scan_compiled(
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
    """[`selective_scan`] on a CPU without gradients; same arguments, whose shapes it takes as checked.

    Raises:
        RuntimeError: if torch.compile fails, as it does without a C++ compiler.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final_state = x.new_empty(x.shape[0], *A.shape, dtype=torch.float32)
    rate = (-LOG2_E * A.float().t()).contiguous().t()
    if seq_idx is not None:
        resets = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    for row in range(x.shape[0]):
        state = torch.zeros_like(rate)
        if initial_state is not None:
            state.copy_(initial_state[row])
        for start in range(0, x.shape[1], CHUNK_LENGTH):
            chunk = (row, slice(start, start + CHUNK_LENGTH))
            x_c, dt_c = x[chunk].float(), dt[chunk].float()
            delta = F.softplus(dt_c if dt_bias is None else dt_c + dt_bias.float())
            u = delta * x_c
            if seq_idx is not None:
                # Nothing is left of a state after an endless step.
                delta = delta.masked_fill(resets[chunk][:, None], torch.finfo(delta.dtype).max)
            inputs = [delta, u, B[chunk].float(), C[chunk].float()]
            rest = -len(delta) % STEPS
            if rest:  # a step of length zero changes nothing
                inputs = [F.pad(tensor, (0, 0, 0, rest)) for tensor in inputs]
            outputs = []
            for delta, u, B_t, C_t in zip(*(tensor.split(STEPS) for tensor in inputs), strict=True):
                try:
                    y_t, state = _compiled_steps(delta, u, rate, B_t, C_t, state)
                except TorchDynamoException as error:
                    raise RuntimeError(
                        f"LONGLLAVA_SCAN=compile cannot run: torch.compile failed for {A.shape[0]} channels and "
                        f"{A.shape[1]} states. It needs a C++ compiler, g++ or the one that CXX names; "
                        "LONGLLAVA_SCAN=torch needs none"
                    ) from error
                outputs.append(y_t)
            y_c = torch.cat(outputs)[: len(x_c)]
            if D is not None:
                y_c = torch.addcmul(y_c, x_c, D.float())
            if z is not None:
                y_c = y_c * F.silu(z[chunk].float())
            y[chunk] = y_c
        final_state[row] = state
    return y, final_state
