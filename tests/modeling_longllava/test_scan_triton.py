"""The Triton kernels against plain loops: outputs, states and gradients.

Without a GPU they run in Triton's interpreter (conftest.py turns it on), which is slow: shapes are tiny, and tiles as
well, so that every loop over tiles runs several times. With one, the same tests run on it, and larger ones follow.
"""

import importlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longllava.modeling_longllava import selective_scan_ref

pytest.importorskip("triton", reason="no Triton here: it exists for Linux only")

# Imported by name, for `longllava.modeling_longllava` holds a function of the name of one of its modules.
kernels = importlib.import_module("longllava.modeling_longllava.scan_triton")
selective_scan_triton = kernels.selective_scan_triton
selective_state_update_triton = kernels.selective_state_update_triton
causal_conv1d_triton = kernels.causal_conv1d_triton

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
on_a_gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU here: too large for Triton's interpreter")


@pytest.fixture
def small_tiles(monkeypatch):
    """Small tiles where the interpreter runs; a GPU runs the real ones."""
    if not HAS_GPU:
        for name in ("FORWARD_TILE", "FORWARD_THREADS", "BACKWARD_TILE", "BACKWARD_THREADS"):
            monkeypatch.setattr(kernels, name, 4)
        for name in ("CONV_TILE", "CONV_BLOCK"):
            monkeypatch.setattr(kernels, name, 8)


def arguments(batch=2, length=9, channels=5, states=4, dtype=torch.float32, grad=False, device=DEVICE):
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator, device=device).to(dtype).requires_grad_(grad)

    return {
        "x": random(batch, length, channels, dtype=dtype),
        "dt": random(batch, length, channels),  # float32 whatever the rest is, as in the model
        "A": (-4 * torch.rand(channels, states, generator=generator, device=device)).requires_grad_(grad),
        "B": random(batch, length, states, dtype=dtype),
        "C": random(batch, length, states, dtype=dtype),
        "D": random(channels),
        "z": random(batch, length, channels, dtype=dtype),
        "dt_bias": random(channels),
        "initial_state": random(batch, channels, states),
    }


def sequences(batch: int, length: int) -> Tensor:
    """Rows that change their sequence at different steps, the first one also right after its first step."""
    steps = torch.arange(length, device=DEVICE)
    return torch.stack([(steps + row) // 3 + (steps > 0) * (row == 0) for row in range(batch)])


def assert_same(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
    if expected.numel() == 0:  # the context of a convolution that is one step wide
        return
    error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-6)
    assert error < tolerance, f"{name}: relative error {error:.2e}"


def assert_scans_agree(args: dict[str, Tensor | None], seq_idx: Tensor | None = None, tolerance: float = 1e-5) -> None:
    """Outputs, final states and all gradients, through both outputs at once."""
    given = [tensor for tensor in args.values() if tensor is not None]
    results = []
    for function in (selective_scan_triton, selective_scan_ref):
        y, state = function(**args, seq_idx=seq_idx)
        weights = torch.randn(y.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
        loss = (y * weights).sum() + (state * state.detach().cos()).sum()
        results.append([y, state, *torch.autograd.grad(loss, given)])
    names = ["y", "state", *(f"gradient of {name}" for name, tensor in args.items() if tensor is not None)]
    for name, actual, expected in zip(names, *results, strict=True):
        # float32 inside on the same rounded inputs: what is given in half precision differs by its last rounding.
        half = actual.dtype in (torch.bfloat16, torch.float16)
        assert_same(actual, expected, 2 * torch.finfo(actual.dtype).eps if half else tolerance, name)


# ----------------------------------------------------------------------------------------------------
# Selective scan
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(
    ("length", "channels", "states"),
    [(1, 5, 4), (2, 1, 4), (4, 4, 8), (5, 3, 16), (13, 5, 4), (9, 6, 5), (6, 9, 2), (7, 2, 1)],
)
def test_outputs_and_gradients_equal_the_loop(length, channels, states, resets, small_tiles):
    args = arguments(length=length, channels=channels, states=states, grad=True)
    assert_scans_agree(args, sequences(2, length) if resets else None)


def test_the_tiles_a_gpu_gets():
    assert_scans_agree(arguments(batch=1, length=19, channels=17, states=16, grad=True))
    args = arguments(batch=1, length=19, channels=17, states=16)
    for actual, expected in zip(selective_scan_triton(**args), selective_scan_ref(**args), strict=True):
        assert_same(actual, expected, 1e-5, "without gradients")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_float32_under_half_precision_inputs(dtype, small_tiles):
    assert_scans_agree(arguments(dtype=dtype, grad=True))
    args = arguments(dtype=dtype)
    assert_scans_agree({name: tensor.to(dtype).requires_grad_() for name, tensor in args.items()})


@pytest.mark.parametrize("missing", [["D"], ["z"], ["dt_bias"], ["initial_state"], ["D", "z"]])
def test_optional_arguments(missing, small_tiles):
    assert_scans_agree(arguments(grad=True) | dict.fromkeys(missing))


def test_gradients_through_one_output_and_for_some_arguments(small_tiles):
    args = arguments()
    for name in ("x", "A"):
        args[name].requires_grad_()
    for output in (0, 1):
        grads = [
            torch.autograd.grad(function(**args)[output].sum(), [args["x"], args["A"]])
            for function in (selective_scan_triton, selective_scan_ref)
        ]
        for name, actual, expected in zip(("x", "A"), *grads, strict=True):
            assert_same(actual, expected, 1e-5, f"gradient of {name} through output {output}")


@pytest.mark.parametrize("piece", [1, 3])
def test_pieces_with_a_carried_state_equal_the_whole(piece, small_tiles):
    args = arguments(length=10)
    whole, final = selective_scan_triton(**args)
    state, outputs = args["initial_state"].clone(), []
    for start in range(0, 10, piece):
        part = {name: args[name][:, start : start + piece] for name in ("x", "dt", "B", "C", "z")}
        y, state = selective_scan_triton(**args | part | {"initial_state": state})
        outputs.append(y)
    assert_same(torch.cat(outputs, 1), whole, 1e-6, "y")
    assert_same(state, final, 1e-6, "state")


def test_inputs_that_are_parts_of_others(small_tiles):
    args = arguments(grad=True)
    args["x"], args["z"] = arguments(channels=10, grad=True)["x"].chunk(2, dim=-1)
    args["dt"] = arguments(length=5, channels=9)["dt"].transpose(1, 2).requires_grad_()
    assert_scans_agree(args)
    args["z"] = arguments(length=5, channels=9)["z"].transpose(1, 2).requires_grad_()
    assert_scans_agree(args)


def test_time_steps_far_from_zero(small_tiles):
    """exp(-15) is lost beside 1 in float32, and exp(100) is infinite: softplus must be right all the same."""
    args = arguments(batch=1, length=5, grad=True) | {"initial_state": None, "dt_bias": None}
    for value in (-15.0, -3.0, 100.0):
        dt = (args["dt"].detach() + value).requires_grad_()
        assert_scans_agree(args | {"dt": dt})


def test_nothing_is_written_to_the_inputs(small_tiles):
    args = arguments(length=3, channels=4)
    before = {name: tensor.clone() for name, tensor in args.items()}
    selective_scan_triton(**args)
    assert all(torch.equal(args[name], before[name]) for name in args)


@pytest.mark.parametrize("name", ["dt", "B", "C", "D", "z", "dt_bias", "initial_state"])
def test_errors_name_the_argument_and_both_shapes(name):
    args = arguments()
    args[name] = args[name][..., :-1]
    with pytest.raises(ValueError, match=rf"^{name} has shape \({', '.join(map(str, args[name].shape))}.*\(2, 9, 5\)"):
        selective_scan_triton(**args)


# ----------------------------------------------------------------------------------------------------
# One token
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_for_one_token_equals_a_scan_of_one_step(dtype):
    args = arguments(length=1, states=16, dtype=dtype)
    y_ref, state_ref = selective_scan_ref(**args)
    state = args.pop("initial_state").clone()
    token = {name: tensor[:, 0] if name in ("x", "dt", "B", "C", "z") else tensor for name, tensor in args.items()}
    y, returned = selective_state_update_triton(state, **token)
    assert returned is state
    assert_same(y, y_ref[:, 0], 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps, "y")
    assert_same(state, state_ref, 1e-6, "state")


def test_a_state_of_another_dtype_stays_so():
    args = arguments(length=1) | {"D": None, "z": None, "dt_bias": None}
    state = args.pop("initial_state").bfloat16()
    y_ref, state_ref = selective_scan_ref(**args, initial_state=state)
    token = {name: args[name][:, 0] for name in ("x", "dt", "B", "C")}
    y, _ = selective_state_update_triton(state, A=args["A"], **token)
    assert_same(y, y_ref[:, 0], 1e-5, "y")
    assert_same(state, state_ref.bfloat16(), torch.finfo(torch.bfloat16).eps, "state")


def test_a_state_that_cannot_be_updated_in_place():
    args = arguments(length=1)
    state = torch.zeros(2, 4, 5, device=DEVICE).transpose(1, 2)
    with pytest.raises(ValueError, match=r"state must be contiguous .* \(20, 1, 5\)"):
        selective_state_update_triton(
            state, args["x"][:, 0], args["dt"][:, 0], args["A"], args["B"][:, 0], args["C"][:, 0]
        )


# ----------------------------------------------------------------------------------------------------
# Convolution
# ----------------------------------------------------------------------------------------------------


def conv_arguments(batch=2, length=9, channels=5, width=4, dtype=torch.float32):
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "context": (batch, width - 1, channels),
    }
    return {
        name: torch.randn(*shape, generator=generator, device=DEVICE).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def conv_ref(x: Tensor, weight: Tensor, bias: Tensor | None, context: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """The definition, one step after the other, in float32."""
    rows, width = torch.cat([context, x], 1).float(), weight.shape[1]
    outputs = []
    for t in range(x.shape[1]):
        total = x.new_zeros(x.shape[0], x.shape[2], dtype=torch.float32)
        same = torch.ones(x.shape[0], 1, dtype=torch.bool, device=x.device)
        for back in range(width):
            if seq_idx is not None and 0 < back <= t:
                same = same & (seq_idx[:, t - back] == seq_idx[:, t - back + 1])[:, None]
            total = total + weight[:, width - 1 - back].float() * rows[:, t + width - 1 - back] * same
        outputs.append(F.silu(total if bias is None else total + bias.float()))
    return torch.stack(outputs, 1).to(x.dtype)


def assert_convolutions_agree(args: dict[str, Tensor | None], seq_idx: Tensor | None = None) -> None:
    given = [tensor for tensor in args.values() if tensor is not None]
    results = []
    for function in (causal_conv1d_triton, conv_ref):
        y = function(**args, seq_idx=seq_idx)
        weights = torch.randn(y.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
        results.append([y, *torch.autograd.grad((y * weights).sum(), given)])
    names = ["y", *(f"gradient of {name}" for name, tensor in args.items() if tensor is not None)]
    for name, actual, expected in zip(names, *results, strict=True):
        half = actual.dtype in (torch.bfloat16, torch.float16)
        assert_same(actual, expected, 2 * torch.finfo(actual.dtype).eps if half else 1e-5, name)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(
    ("length", "channels", "width"), [(1, 5, 4), (2, 3, 3), (5, 8, 4), (7, 5, 2), (13, 9, 4), (6, 3, 1)]
)
def test_the_convolution_equals_its_definition(length, channels, width, resets, small_tiles):
    args = conv_arguments(length=length, channels=channels, width=width)
    assert_convolutions_agree(args, sequences(2, length) if resets else None)


def test_the_tiles_of_the_convolution_a_gpu_gets():
    assert_convolutions_agree(conv_arguments(batch=1, length=37, channels=70))


def test_the_definition_is_that_of_torch():
    args = {name: tensor.detach() for name, tensor in conv_arguments().items()}
    x = torch.cat([args["context"], args["x"]], 1).transpose(1, 2)
    y = F.silu(F.conv1d(x, args["weight"][:, None], args["bias"], groups=5)).transpose(1, 2)
    assert_same(conv_ref(**args), y.contiguous(), 1e-5, "y")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_convolution_in_half_precision(dtype, small_tiles):
    assert_convolutions_agree(conv_arguments(dtype=dtype))
    # A context kept in float32 keeps its dtype in its gradient.
    args = conv_arguments(dtype=dtype)
    assert_convolutions_agree(args | {"context": args["context"].detach().float().requires_grad_()})


def test_a_convolution_of_a_part_of_wider_rows_without_a_bias(small_tiles):
    args = conv_arguments() | {"bias": None}
    args["x"] = conv_arguments(channels=10)["x"].chunk(2, dim=-1)[0]
    assert_convolutions_agree(args)
    args["x"] = conv_arguments(length=5, channels=9)["x"].transpose(1, 2)
    assert_convolutions_agree(args)


def test_pieces_with_a_carried_context_equal_the_whole(small_tiles):
    args = {name: tensor.detach() for name, tensor in conv_arguments().items()}
    whole = causal_conv1d_triton(**args)
    rows = torch.cat([args["context"], args["x"]], 1)
    pieces = [
        causal_conv1d_triton(**args | {"x": args["x"][:, start : start + 2], "context": rows[:, start : start + 3]})
        for start in range(0, 9, 2)
    ]
    assert torch.equal(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize("name", ["bias", "context"])
def test_errors_of_the_convolution_name_the_argument_and_both_shapes(name):
    args = conv_arguments()
    args[name] = args[name][..., :-1]
    with pytest.raises(ValueError, match=rf"^{name} has shape \({', '.join(map(str, args[name].shape))}.*\(2, 9, 5\)"):
        causal_conv1d_triton(**args)


# ----------------------------------------------------------------------------------------------------
# For a GPU
# ----------------------------------------------------------------------------------------------------

COMPILE = """
import importlib, torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

class Hopper:
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

driver.set_active(Hopper())
compiled = []

def compile_only(kernel, grid):
    def run(*args, **constants):
        compiled.append((kernel.__name__, kernel.run(*args, grid=grid, warmup=True, **constants).asm))
    return run

JITFunction.__getitem__ = compile_only
kernels = importlib.import_module("longllava.modeling_longllava.scan_triton")
x = torch.zeros(1, 64, 64, dtype=torch.bfloat16, requires_grad=True)
z, conv_weight = torch.zeros(1, 64, 128, dtype=torch.bfloat16)[..., 64:], torch.zeros(64, 4, dtype=torch.bfloat16)
matrix, vector, rows = torch.zeros(64, 16), torch.zeros(64), torch.zeros(1, 64, 16, dtype=torch.bfloat16)
rest = (x.float().detach(), matrix, rows, rows, vector, z, vector, matrix[None])
seq_idx = torch.zeros(1, 64, dtype=torch.int64)
kernels.selective_scan_triton(x.detach(), *rest)
kernels.selective_scan_triton(x, *rest, seq_idx)[0].sum().backward()
kernels.causal_conv1d_triton(x, conv_weight, vector, x[:, :3].detach(), seq_idx).sum().backward()
for name, asm in compiled:
    print(name, len(asm["cubin"]))
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    """The interpreter accepts what the compiler does not. Triton brings the whole compiler, assembler included."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    sizes = [line.split() for line in result.stdout.splitlines()]
    assert [name for name, _ in sizes] == [
        "_scan_forward",
        "_scan_forward",
        "_scan_backward",
        "_conv_forward",
        "_conv_backward",
    ]
    assert all(int(size) > 0 for _, size in sizes)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "length", "channels"), [(1, 300, 8192), (3, 1001, 255)])
def test_large_scans_and_convolutions(batch, length, channels, dtype):
    args = arguments(batch, length, channels, states=16, dtype=dtype, grad=True)
    assert_scans_agree(args, tolerance=1e-4)
    assert_scans_agree(args, sequences(batch, length), tolerance=1e-4)
    assert_convolutions_agree(conv_arguments(batch, length, channels, dtype=dtype))


@on_a_gpu
def test_offsets_beyond_32_bits():
    """A gate of 2^31 numbers and more: the last steps equal those of a scan that begins in the middle."""
    length, channels = 140_000, 8192
    args = arguments(1, length, channels, states=16, dtype=torch.bfloat16)
    args["z"] = torch.cat([args["z"], args["z"]], -1)[..., channels:]
    args["dt"] = args["dt"].bfloat16()
    middle = length - 1000
    with torch.no_grad():
        y, final = selective_scan_triton(**args)
        first = {name: args[name][:, :middle] for name in ("x", "dt", "B", "C", "z")}
        _, state = selective_scan_triton(**args | first)
        last = {name: args[name][:, middle:].clone() for name in ("x", "dt", "B", "C", "z")}
        y_last, final_last = selective_scan_ref(**args | last | {"initial_state": state})
    assert_same(y[:, middle:], y_last, 2 * torch.finfo(torch.bfloat16).eps, "y")
    assert_same(final, final_last, 1e-4, "state")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs here")
def test_a_model_on_the_second_gpu():
    args = arguments(length=70, states=16, device="cuda:1")
    for actual, expected in zip(selective_scan_triton(**args), selective_scan_ref(**args), strict=True):
        assert_same(actual, expected, 1e-4, "on cuda:1")
