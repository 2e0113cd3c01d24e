"""The short causal convolution in front of the selective scan (arXiv 2312.00752, section 3.4), channels last.

    y_t = SiLU(bias + sum_k weight_k x_(t - K + 1 + k)),  k = 0 .. K - 1,  for every channel by itself

`causal_conv1d_ref` defines the result; `causal_conv1d` takes it, on a GPU, from the package of that name or from our
Triton kernel.
"""

import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from .selective_scan import HAS_TRITON, selective_scan_backend

HAS_CAUSAL_CONV1D = importlib.util.find_spec("causal_conv1d") is not None


def causal_conv1d_ref(x: Tensor, weight: Tensor, bias: Tensor | None, context: Tensor) -> Tensor:
    """The definition of [`causal_conv1d`] with PyTorch's convolution; same arguments, same result."""
    x = torch.cat([context, x], dim=1).transpose(1, 2)  # (B, C, K - 1 + L)
    # As a picture of height 1 the input keeps channels last in memory: 1.5 times as fast on a CPU.
    y = F.conv2d(x.unsqueeze(2), weight[:, None, None], bias, groups=weight.shape[0])
    return F.silu(y.squeeze(2).transpose(1, 2))


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, context: Tensor) -> Tensor:
    """Depthwise causal convolution after a given left context, then SiLU.

    What runs goes with the scan, see [`selective_scan_backend`].

    Args:
        x (`Tensor` of shape `(B, L, C)`): input.
        weight (`Tensor` of shape `(C, K)`): the last column belongs to the step itself.
        bias (`Tensor` of shape `(C,)` or None).
        context (`Tensor` of shape `(B, K - 1, C)`): the inputs before the first step.

    Returns:
        `Tensor` of shape `(B, L, C)`.
    """
    backend = selective_scan_backend(x.device)
    if backend == "mamba_ssm" and HAS_CAUSAL_CONV1D:
        return _with_package(importlib.import_module("causal_conv1d").causal_conv1d_fn, x, weight, bias, context)
    if backend == "triton" or (backend == "mamba_ssm" and HAS_TRITON):
        from .scan_triton import causal_conv1d_triton

        return causal_conv1d_triton(x, weight, bias, context)
    return causal_conv1d_ref(x, weight, bias, context)


def _with_package(function, x: Tensor, weight: Tensor, bias: Tensor | None, context: Tensor) -> Tensor:
    """Call `causal_conv1d_fn`, which has channels before time but takes them last in memory."""
    before = context.contiguous().transpose(1, 2)
    y = function(x.transpose(1, 2), weight.contiguous(), bias, initial_states=before, activation="silu")
    return y.transpose(1, 2)
