"""The fast selective scan against the plain loop that defines it: outputs, states and gradients."""

import importlib

import pytest
import torch
from torch import Tensor
from transformers.utils import is_kernels_available

from longllava.modeling_longllava import (
    LongLlavaForConditionalGeneration,
    selective_scan,
    selective_scan_backend,
    selective_scan_ref,
)
from longllava.modeling_longllava.selective_scan import selective_state_update

# `longllava.modeling_longllava.selective_scan` is the function; this is the module of the same name.
scan_module = importlib.import_module("longllava.modeling_longllava.selective_scan")


def arguments(
    batch=2, length=70, channels=37, states=16, dtype=torch.float32, grad=False, seed=0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)

    return {
        "x": random(batch, length, channels, dtype=dtype),
        "dt": random(batch, length, channels, dtype=dtype),
        "A": (-4 * torch.rand(channels, states, generator=generator)).requires_grad_(grad),
        "B": random(batch, length, states, dtype=dtype),
        "C": random(batch, length, states, dtype=dtype),
        "D": random(channels),
        "z": random(batch, length, channels, dtype=dtype),
        "dt_bias": random(channels),
        "initial_state": random(batch, channels, states),
    }


def sequences(batch: int, length: int) -> Tensor:
    """Rows that change their sequence at different steps, the first one also right after its first step."""
    steps = torch.arange(length)
    return torch.stack([(steps + row) // 7 + (steps > 0) * (row == 0) for row in range(batch)])


def assert_same(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-6)
    assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
@pytest.mark.parametrize("resets", [False, True])
def test_outputs_and_gradients_equal_the_loop(length, resets):
    args = arguments(length=length, grad=True)
    seq_idx = sequences(2, length) if resets else None
    results = []
    for function in (selective_scan, selective_scan_ref):
        y, state = function(**args, seq_idx=seq_idx)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        # Both outputs at once, so that the gradient through the final state is tested with the other.
        loss = (y * weights).sum() + (state * state.detach().cos()).sum()
        results.append((y, state, torch.autograd.grad(loss, list(args.values()))))
    (y, state, grads), (y_ref, state_ref, grads_ref) = results
    assert_same(y, y_ref, 1e-5, "y")
    assert_same(state, state_ref, 1e-5, "state")
    for name, grad, grad_ref in zip(args, grads, grads_ref, strict=True):
        assert_same(grad, grad_ref, 1e-5, f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_float32_under_half_precision_inputs(dtype):
    args = arguments(length=130, dtype=dtype, grad=True)
    y, state = selective_scan(**args)
    y_ref, state_ref = selective_scan_ref(**args)
    assert y.dtype == dtype and state.dtype == torch.float32
    # The same float32 arithmetic on the same rounded inputs: only the last rounding of y may differ.
    assert_same(state, state_ref, 1e-5, "state")
    assert_same(y, y_ref, torch.finfo(dtype).eps, "y")
    grads = torch.autograd.grad(y.float().sum() + state.sum(), list(args.values()))
    grads_ref = torch.autograd.grad(y_ref.float().sum() + state_ref.sum(), list(args.values()))
    for name, grad, grad_ref in zip(args, grads, grads_ref, strict=True):
        assert grad.dtype == args[name].dtype
        assert_same(grad, grad_ref, 2 * torch.finfo(dtype).eps, f"gradient of {name}")


@pytest.mark.parametrize("missing", ["D", "z", "dt_bias", "initial_state"])
def test_optional_arguments(missing):
    args = arguments(grad=True)
    args[missing] = None
    y, state = selective_scan(**args)
    y_ref, state_ref = selective_scan_ref(**args)
    assert_same(y, y_ref, 1e-5, "y")
    given = {name: tensor for name, tensor in args.items() if tensor is not None}
    grads = torch.autograd.grad(y.sum() + state.sum(), list(given.values()))
    grads_ref = torch.autograd.grad(y_ref.sum() + state_ref.sum(), list(given.values()))
    for name, grad, grad_ref in zip(given, grads, grads_ref, strict=True):
        assert_same(grad, grad_ref, 1e-5, f"gradient of {name}")


def test_many_blocks_of_channels(monkeypatch):
    monkeypatch.setattr(scan_module, "BLOCK_VALUES", 64)  # 32 channels at a time
    args = arguments(channels=70, states=4, grad=True)
    y, state = selective_scan(**args)
    y_ref, state_ref = selective_scan_ref(**args)
    assert_same(y, y_ref, 1e-5, "y")
    assert_same(state, state_ref, 1e-5, "state")
    grads = torch.autograd.grad(y.sum() + state.sum(), list(args.values()))
    grads_ref = torch.autograd.grad(y_ref.sum() + state_ref.sum(), list(args.values()))
    for name, grad, grad_ref in zip(args, grads, grads_ref, strict=True):
        assert_same(grad, grad_ref, 1e-5, f"gradient of {name}")


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_pieces_with_a_carried_state_equal_the_whole(piece):
    args = arguments(length=100)
    whole, final = selective_scan(**args)
    state, outputs = args["initial_state"], []
    for start in range(0, 100, piece):
        steps = slice(start, start + piece)
        part = {name: args[name][:, steps] for name in ("x", "dt", "B", "C", "z")}
        y, state = selective_scan(**args | part | {"initial_state": state})
        outputs.append(y)
    assert_same(torch.cat(outputs, 1), whole, 1e-5, "y")
    assert_same(state, final, 1e-5, "state")


def test_a_reset_separates_rows_that_are_packed():
    args = arguments(batch=1, length=50) | {"initial_state": None}
    packed, _ = selective_scan(**args, seq_idx=(torch.arange(50) >= 20).long()[None])
    for steps in (slice(0, 20), slice(20, 50)):
        alone, _ = selective_scan(**args | {name: args[name][:, steps] for name in ("x", "dt", "B", "C", "z")})
        assert_same(packed[:, steps], alone, 1e-5, f"steps {steps}")


def test_the_initial_state_is_not_written_to():
    for channels, states in ((8, 4), (1, 4), (8, 1)):  # with a side of 1 a transposed tensor is a view
        args = arguments(length=3, channels=channels, states=states)
        before = args["initial_state"].clone()
        selective_scan(**args)
        assert torch.equal(args["initial_state"], before)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_is_carried_exactly_through_a_kernel_without_one(state, dtype):
    """The wrapper of `mamba_ssm`, whose kernel has channels before length and always starts from zero."""

    def kernel(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        assert delta_softplus and return_last_state
        swap = [tensor.transpose(1, 2) for tensor in (u, delta, B, C, z)]
        y, last = selective_scan_ref(swap[0], swap[1], A, swap[2], swap[3], D=D, z=swap[4], dt_bias=delta_bias)
        return y.transpose(1, 2), last

    args = arguments(dtype=dtype)
    if not state:
        args["initial_state"] = None
    y, final = scan_module._scan_with_kernel(kernel, *args.values())
    y_ref, final_ref = selective_scan_ref(**args)
    assert y.dtype == y_ref.dtype and y.shape == y_ref.shape
    assert_same(y, y_ref, 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps, "y")
    assert_same(final, final_ref, 1e-5, "state")


@pytest.fixture
def installed(monkeypatch):
    """Says which of the optional packages are there; no backend is forced."""
    monkeypatch.delenv("LONGLLAVA_SCAN", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def choose(*packages: str) -> None:
        monkeypatch.setattr(scan_module, "HAS_MAMBA_SSM", "mamba_ssm" in packages)
        monkeypatch.setattr(scan_module, "HAS_TRITON", "triton" in packages)

    return choose


@pytest.mark.parametrize(
    ("packages", "device", "backend"),
    [
        (("mamba_ssm", "triton"), "cuda", "mamba_ssm"),
        (("triton",), "cuda:1", "triton"),
        ((), "cuda", "torch"),
        (("mamba_ssm", "triton"), "cpu", "torch"),
    ],
)
def test_the_fastest_backend_that_is_there(installed, packages, device, backend):
    installed(*packages)
    assert selective_scan_backend(device) == backend
    assert selective_scan_backend(torch.device(device)) == backend


def test_a_backend_is_forced(installed, monkeypatch):
    installed("mamba_ssm", "triton")
    for backend in ("mamba_ssm", "triton", "torch"):
        monkeypatch.setenv("LONGLLAVA_SCAN", backend)
        assert selective_scan_backend("cuda") == backend
    for backend in ("torch", "compile"):
        monkeypatch.setenv("LONGLLAVA_SCAN", backend)
        assert selective_scan_backend("cpu") == backend
    monkeypatch.setenv("LONGLLAVA_SCAN", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert selective_scan_backend("cpu") == "triton"


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("cuda", "cuda", r"cuda is unknown on cuda \(.*\); possible here: torch$"),
        ("mamba_ssm", "cuda", r"mamba_ssm cannot run on cuda \(mamba_ssm is not installed, .*possible here: torch$"),
        ("triton", "cuda", r"triton cannot run on cuda \(.*triton is not installed\); possible here: torch$"),
        ("compile", "cuda", r"compile cannot run on cuda \(.*\); possible here: torch$"),
        ("mamba_ssm", "cpu", r"mamba_ssm cannot run on cpu \(.*\); possible here: torch, compile$"),
        ("triton", "cpu", r"triton cannot run on cpu \(.*\); possible here: torch, compile$"),
    ],
)
def test_a_backend_that_cannot_run(installed, monkeypatch, backend, device, message):
    installed()
    monkeypatch.setenv("LONGLLAVA_SCAN", backend)
    with pytest.raises(ValueError, match=f"^LONGLLAVA_SCAN={message}"):
        selective_scan_backend(device)
    if device == "cpu":
        with pytest.raises(ValueError, match=f"^LONGLLAVA_SCAN={message}"):
            selective_scan(**arguments())


def test_what_the_kernel_of_mamba_ssm_lacks_runs_elsewhere(monkeypatch):
    """It neither resets inside a row nor pays off for one token."""
    monkeypatch.setattr(scan_module, "selective_scan_backend", lambda _: "mamba_ssm")
    monkeypatch.setattr(scan_module, "HAS_TRITON", False)
    for length, seq_idx in ((1, None), (20, sequences(2, 20))):
        args = arguments(length=length)
        y, state = selective_scan(**args, seq_idx=seq_idx)
        y_ref, state_ref = selective_scan_ref(**args, seq_idx=seq_idx)
        assert_same(y, y_ref, 1e-5, "y")
        assert_same(state, state_ref, 1e-5, "state")


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU the kernels run in Triton's interpreter")
@pytest.mark.parametrize("resets", [False, True])
def test_triton_is_forced(monkeypatch, resets):
    pytest.importorskip("triton")
    monkeypatch.setenv("LONGLLAVA_SCAN", "triton")
    args = arguments(length=20, channels=5, states=4, grad=True)
    seq_idx = sequences(2, 20) if resets else None
    kernels = importlib.import_module("longllava.modeling_longllava.scan_triton")
    calls, run = [], kernels.selective_scan_triton
    monkeypatch.setattr(kernels, "selective_scan_triton", lambda *given: calls.append(given) or run(*given))
    results = [scan(**args, seq_idx=seq_idx) for scan in (selective_scan, selective_scan_ref)]
    grads = [torch.autograd.grad(y.sum() + state.sum(), list(args.values())) for y, state in results]
    assert len(calls) == 1
    assert_same(results[0][0], results[1][0], 1e-5, "y")
    assert_same(results[0][1], results[1][1], 1e-5, "state")
    for name, grad, grad_ref in zip(args, *grads, strict=True):
        assert_same(grad, grad_ref, 1e-5, f"gradient of {name}")


@pytest.mark.skipif(is_kernels_available(), reason="the message is for those who lack the package")
def test_use_kernels_without_the_package_says_what_to_install(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Kernels are not available.*pip install kernels"):
        LongLlavaForConditionalGeneration.from_pretrained(tmp_path, use_kernels=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the kernels of mamba_ssm cannot run")
def test_on_a_gpu():
    args = {name: tensor.cuda() for name, tensor in arguments(length=130).items()}
    y, state = selective_scan(**args)
    y_ref, state_ref = selective_scan_ref(**args)
    assert_same(y, y_ref, 1e-4, f"y ({selective_scan_backend()})")
    assert_same(state, state_ref, 1e-4, "state")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_in_place_equals_the_scan(backend, dtype, monkeypatch):
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("LONGLLAVA_SCAN", backend)
    args = arguments(length=1, dtype=dtype)
    y_ref, final_ref = selective_scan_ref(**args)
    state = args.pop("initial_state").clone()
    one = {name: args[name][:, 0] for name in ("x", "dt", "B", "C", "z")}
    y = selective_state_update(state, **one, A=args["A"], D=args["D"], dt_bias=args["dt_bias"])
    assert y.dtype == dtype
    assert_same(y, y_ref[:, 0], 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps, "y")
    assert_same(state, final_ref, 1e-5, "state")
    with pytest.raises(ValueError, match=r"^B has shape"):
        selective_state_update(state, **one | {"B": one["B"][:, 1:]}, A=args["A"])


@pytest.mark.parametrize("function", [selective_scan, selective_scan_ref])
@pytest.mark.parametrize("name", ["dt", "B", "C", "D", "z", "dt_bias", "initial_state"])
def test_errors_name_the_argument_and_both_shapes(function, name):
    args = arguments()
    args[name] = args[name][..., :-1]
    shape = tuple(args[name].shape)
    with pytest.raises(ValueError, match=rf"^{name} has shape \({', '.join(map(str, shape))}.*\(2, 70, 37\)"):
        function(**args)


def test_nothing_to_scan():
    with pytest.raises(ValueError, match="length 0"):
        selective_scan(**arguments(length=0))
