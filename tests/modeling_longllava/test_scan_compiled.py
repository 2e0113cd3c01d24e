"""The scan through torch.compile, against the plain loop that defines it. All tests share one compilation."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from longllava.modeling_longllava import scan_compiled, selective_scan, selective_scan_ref

CHANNELS, STATES = 20, 5  # one vector of 16 channels and a rest


def arguments(length: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(length)

    def random(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "x": random(batch, length, CHANNELS, dtype=dtype),
        "dt": random(batch, length, CHANNELS, dtype=dtype),
        "A": -4 * torch.rand(CHANNELS, STATES, generator=generator),
        "B": random(batch, length, STATES, dtype=dtype),
        "C": random(batch, length, STATES, dtype=dtype),
        "D": random(CHANNELS),
        "z": random(batch, length, CHANNELS, dtype=dtype),
        "dt_bias": random(CHANNELS),
        "initial_state": random(batch, CHANNELS, STATES),
    }


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    for name, a, b in zip(("y", "state"), actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()
        error = (a.float() - b.float()).abs().max() / b.float().abs().max()
        assert error < (1e-5 if name == "state" else tolerance), f"{name}: relative error {error:.2e}"


@pytest.fixture(autouse=True)
def force_compile(monkeypatch):
    monkeypatch.setenv("LONGLLAVA_SCAN", "compile")


def test_equals_the_loop_at_any_length_with_one_compilation():
    torch._dynamo.reset()
    counters.clear()
    for length in (2, 8, 9, 64, 65, 140):
        args = arguments(length, batch=1 + length % 2)
        assert_same(selective_scan(**args), selective_scan_ref(**args))
    assert counters["stats"]["unique_graphs"] == 1


def test_resets():
    args, steps = arguments(140), torch.arange(140)
    # At other steps in each row, in the second one right after its first step too, and at the edges of chunks.
    seq_idx = torch.stack([steps // 8, (steps + 6) // 7])
    assert_same(selective_scan(**args, seq_idx=seq_idx), selective_scan_ref(**args, seq_idx=seq_idx))


@pytest.mark.parametrize("missing", ["D", "z", "dt_bias", "initial_state"])
def test_optional_arguments(missing):
    args = arguments(19) | {missing: None}
    assert_same(selective_scan(**args), selective_scan_ref(**args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_float32_under_half_precision_inputs(dtype):
    args = arguments(70, dtype=dtype)
    assert_same(selective_scan(**args), selective_scan_ref(**args), torch.finfo(dtype).eps)


def test_views_of_wider_rows_and_parameters_are_taken():
    """As the mixer has them: z is half of a projection, B and C parts of another, D a parameter."""
    args = arguments(30)
    args["z"] = torch.cat([args["x"], args["z"]], -1)[..., CHANNELS:]
    args["C"] = torch.cat([args["B"], args["C"]], -1)[..., STATES:]
    args["D"] = torch.nn.Parameter(args["D"])
    with torch.no_grad():
        assert_same(selective_scan(**args), selective_scan_ref(**args))


def test_pieces_with_a_carried_state_equal_the_whole():
    args = arguments(100)
    before = args["initial_state"].clone()
    whole, final = selective_scan(**args)
    state, outputs = args["initial_state"], []
    for start in range(0, 100, 37):
        steps = slice(start, start + 37)
        part = {name: args[name][:, steps] for name in ("x", "dt", "B", "C", "z")}
        y, state = selective_scan(**args | part | {"initial_state": state})
        outputs.append(y)
    assert_same((torch.cat(outputs, 1), state), (whole, final))
    assert torch.equal(args["initial_state"], before)


def test_gradients_flow():
    """Through the PyTorch operations: the compiled steps are for the forward pass alone."""
    args = arguments(20)
    args["dt"].requires_grad_()
    grads = [
        torch.autograd.grad(scan(**args)[0].sum(), args["dt"])[0] for scan in (selective_scan, selective_scan_ref)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_powers_of_two():
    v = torch.linspace(0, 30, 100_001)
    error = scan_compiled._power(v).double() / torch.exp2(-v.double()) - 1
    assert error.abs().max() < 3e-7
    # Near 0, where a state forgets least and errors add up over most steps, the exponent itself is that exact.
    small = torch.logspace(-6, -1, 1000)
    decay = -torch.expm1(-small.double() * torch.log(torch.tensor(2.0, dtype=torch.double)))
    assert ((1 - scan_compiled._power(small).double() - decay).abs() < 6e-8 + 3e-7 * decay).all()
    assert scan_compiled._power(torch.tensor([0.0])).item() == 1
    assert scan_compiled._power(torch.tensor([31.0, 32.0, 1e9, torch.inf])).tolist() == [0, 0, 0, 0]


def test_without_a_compiler(tmp_path):
    code = "import torch; from longllava.modeling_longllava import selective_scan as scan; o = torch.ones; "
    code += "scan(o(1, 9, 4), o(1, 9, 4), -o(4, 2), o(1, 9, 2), o(1, 9, 2))"
    nothing = {"PATH": os.environ["PATH"], "CXX": str(tmp_path / "c++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=nothing | {"LONGLLAVA_SCAN": "compile"}, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "RuntimeError: LONGLLAVA_SCAN=compile cannot run" in run.stderr and "C++ compiler" in run.stderr
