"""The causal convolution: its definition, and what it hands to other kernels."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from longllava.modeling_longllava.causal_conv import causal_conv1d, causal_conv1d_ref

module = importlib.import_module("longllava.modeling_longllava.causal_conv")


def arguments(length: int = 9, channels: int = 6, width: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (2, length, channels), "weight": (channels, width), "bias": (channels,)}
    sizes["context"] = (2, width - 1, channels)
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


@pytest.mark.parametrize("length", [1, 2, 9])
def test_every_step_sees_the_last_inputs(length: int) -> None:
    """Against the sum of the formula, written out."""
    args = arguments(length)
    x = torch.cat([args["context"], args["x"]], 1)
    for t in range(length):
        expected = F.silu(args["bias"] + sum(args["weight"][:, k] * x[:, t + k] for k in range(4)))
        assert torch.allclose(causal_conv1d_ref(**args)[:, t], expected, atol=1e-6)
    assert torch.equal(causal_conv1d(**args), causal_conv1d_ref(**args))


def test_pieces_equal_the_whole() -> None:
    args = arguments()
    whole = causal_conv1d(**args)
    first = causal_conv1d(**args | {"x": args["x"][:, :5]})
    second = causal_conv1d(**args | {"x": args["x"][:, 5:], "context": args["x"][:, 2:5]})
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-6)


def test_triton_is_used_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernel's own tests run on the GPU")
    args = arguments()
    expected = causal_conv1d(**args)
    triton = importlib.import_module("longllava.modeling_longllava.scan_triton")
    called = []
    kernel = triton.causal_conv1d_triton
    monkeypatch.setattr(triton, "causal_conv1d_triton", lambda *given: called.append(1) or kernel(*given))
    monkeypatch.setenv("LONGLLAVA_SCAN", "triton")
    assert torch.allclose(causal_conv1d(**args), expected, atol=1e-6) and called


def test_the_package_gets_what_it_takes() -> None:
    """A stand-in with the signature of `causal_conv1d_fn`; it wants channels contiguous in memory."""

    def function(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
        assert x.stride(1) == initial_states.stride(1) == 1 and activation == "silu"
        joined = torch.cat([initial_states, x], -1)
        return F.silu(F.conv1d(joined, weight[:, None], bias, groups=x.shape[1]))

    args = arguments()
    y = module._with_package(function, *args.values())
    assert torch.allclose(y, causal_conv1d_ref(**args), atol=1e-6)
