"""What is measured: scans, models of any size with random weights, a peer with the same weights, full caches,
picture files."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import JambaConfig, JambaForCausalLM, LlavaImageProcessorPil
from transformers.cache_utils import Cache
from transformers.models.jamba.modeling_jamba import JambaExperts
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from longllava.modeling_longllava import (
    LongLlavaConfig,
    LongLlavaForConditionalGeneration,
    selective_scan,
    selective_scan_backend,
    selective_scan_ref,
)
from longllava.processing import LongLlavaProcessor
from longllava.trainers import pocket

POCKET = Path(__file__).resolve().parent.parent / "spaces_demo" / "pocket"
CONFIGS = ("small", "pocket", "9b", "53b")
PICTURE = (1280, 720)  # width and height of a drawn picture file
FILES = 8  # different picture files; a longer list repeats them
FILL = 1 << 16  # tokens of a cache that are filled at a time
START = 16  # tokens that a model reads itself before its cache is filled


# ---------------------------------------------------------------------------------------------------------------------
# Scans

ScanInputs = dict[str, Tensor]
Scan = Callable[[], tuple[Tensor, Tensor]]


def scan_inputs(
    channels: int, length: int, states: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ScanInputs:
    """Random inputs of one scan as a trained Mamba layer sees them: A = -1 .. -states, time steps near 0.05."""
    generator = torch.Generator(device).manual_seed(0)
    widths = {"x": channels, "dt": channels, "B": states, "C": states, "z": channels}
    inputs = {
        name: torch.randn(1, length, width, generator=generator, device=device).to(dtype)
        for name, width in widths.items()
    }
    inputs["dt"] -= 3
    return inputs | {
        "A": -torch.arange(1.0, states + 1, device=device).repeat(channels, 1),
        "D": torch.ones(channels, device=device),
        "dt_bias": torch.zeros(channels, device=device),
    }


@contextmanager
def forced_scan(backend: str) -> Iterator[None]:
    """Make `selective_scan` use one backend."""
    before = os.environ.get("LONGLLAVA_SCAN")
    os.environ["LONGLLAVA_SCAN"] = backend
    try:
        yield
    finally:
        del os.environ["LONGLLAVA_SCAN"]
        if before is not None:
            os.environ["LONGLLAVA_SCAN"] = before


def _ours(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def scan(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        with forced_scan(backend):
            found = selective_scan_backend(inputs["x"].device)
            if found != backend:
                raise RuntimeError(f"LONGLLAVA_SCAN={backend} runs {found} here")
            return selective_scan(**inputs)

    return scan


def _channels_first(kernel: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A scan with the signature of mamba_ssm's, on inputs (batch, channels or states, length)."""

    def scan(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        options = {"delta_bias": inputs.pop("dt_bias"), "delta_softplus": True, "return_last_state": True}
        arguments = [inputs.pop(name) for name in ("x", "dt", "A", "B", "C")]
        y, state = kernel(*arguments, **inputs, **options)
        return y.transpose(1, 2), state

    return scan


def _mamba_ssm(*arguments: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(*arguments, **options)


OURS = {"cpu": ("torch", "compile"), "cuda": ("torch", "triton")}
PEERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": selective_scan_ref,
    "mamba_ssm": _channels_first(_mamba_ssm),
    "transformers": _channels_first(mamba_selective_scan),
}


def scan_names(device: torch.device) -> tuple[str, ...]:
    """Who can take part: our backends, `reference` (the plain loop that defines the scan), and other libraries'."""
    return (*OURS[device.type], *(name for name in PEERS if device.type == "cuda" or name != "mamba_ssm"))


def build_scan(name: str, inputs: ScanInputs, train: bool) -> Callable[[], tuple[Tensor, ...]]:
    """One scan, ready to run: outputs and last state; with `train` also the gradients of all inputs, in their order.

    Everybody gets the inputs as they lie in memory in its own model: ours channels last, other libraries' first.
    """
    scan = PEERS[name] if name in PEERS else _ours(name)
    turned = name in ("transformers", "mamba_ssm")

    def turn(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2) if turned and tensor.ndim == 3 else tensor

    own = {key: turn(tensor).contiguous() for key, tensor in inputs.items()}

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return scan(**own)

    def forward_and_backward() -> tuple[Tensor, ...]:
        leaves = {key: tensor.detach().requires_grad_() for key, tensor in own.items()}
        y, state = scan(**leaves)
        # Through the outputs only: mamba_ssm's last state has no gradient.
        gradients = torch.autograd.grad(y.float().sum(), list(leaves.values()))
        return y.detach(), state.detach(), *map(turn, gradients)

    return forward_and_backward if train else forward


def scan_bytes(inputs: ScanInputs) -> int:
    """Bytes that any scan has to move: each input read, and an output of the size of x written."""
    return sum(tensor.nbytes for tensor in inputs.values()) + inputs["x"].nbytes


def difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest difference of two results, as a share of the largest value of each tensor."""
    pairs = zip(found, expected, strict=True)
    return max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Models


def build_config(name: str) -> LongLlavaConfig:
    """`9b` and `53b` have the sizes of the released models, `pocket` that of the shipped one; `small` has a language
    model of 8 layers of 128 and reads pictures as large as the released ones do. Ids are those of the pocket's
    tokenizer, which `build_processor` uses for all.

    Raises:
        ValueError: if there is no such name.
    """
    if name == "pocket":
        return pocket.build_config()
    if name == "9b":  # the experts of the 53B, merged into one
        return LongLlavaConfig(text_config={"num_experts": 1, "router_aux_loss_coef": 0.0}, image_token_id=3)
    if name == "53b":
        return LongLlavaConfig(image_token_id=3)
    if name != "small":
        raise ValueError(f"--config is one of {', '.join(CONFIGS)}, not {name}")
    text = JambaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=448, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, num_experts=1, router_aux_loss_coef=0.0,
    )  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1,
        "image_size": 336, "patch_size": 14, "projection_dim": 64,
    }  # fmt: skip
    return LongLlavaConfig(vision_config=vision, text_config=text, image_token_id=3, tokens_per_image=4)


def build_model(
    config: LongLlavaConfig, device: torch.device, dtype: torch.dtype
) -> LongLlavaForConditionalGeneration:
    """A model with random weights, made where it runs and in its dtype: never copied, never larger than it is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        with device:
            model = LongLlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def build_peer(model: LongLlavaForConditionalGeneration) -> JambaForCausalLM:
    """transformers' own model on the weights of our language model: the same tensors, in no memory of their own."""
    config = copy.deepcopy(model.config.text_config)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        peer = JambaForCausalLM(config)
    weights = {f"model.{name}": tensor for name, tensor in model.model.language_model.state_dict().items()}
    peer.load_state_dict({**weights, "lm_head.weight": model.lm_head.weight}, assign=True)
    return peer.eval()


def build_processor(config: LongLlavaConfig) -> LongLlavaProcessor:
    """A processor for pictures of the model's size, with the pocket model's tokenizer.

    It writes `<img>` and `</img>` as one token each, where that of the released models needs five for both: 146 tokens
    per picture instead of 149.
    """
    processor = pocket.build_processor()
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    image_processor = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return LongLlavaProcessor(
        image_processor, processor.tokenizer, patch_size=patch, tokens_per_image=config.tokens_per_image
    )


def load_model(
    size: str, device: torch.device, dtype: torch.dtype
) -> tuple[LongLlavaForConditionalGeneration, LongLlavaProcessor]:
    """Model and processor of a size: `pocket` as it ships, where this is a checkout, others with random weights."""
    if size == "pocket" and POCKET.is_dir():
        model = LongLlavaForConditionalGeneration.from_pretrained(POCKET, dtype=dtype)
        return model.to(device).eval(), LongLlavaProcessor.from_pretrained(POCKET)
    config = build_config(size)
    return build_model(config, device, dtype), build_processor(config)


def random_ids(config: LongLlavaConfig, tokens: int, device: torch.device) -> Tensor:
    """(1, tokens) ids without that of the picture, the same for the same number."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(config.image_token_id + 1, config.text_config.vocab_size, (1, tokens), generator=generator)
    return ids.to(device)


def text_parameters(model: LongLlavaForConditionalGeneration) -> tuple[int, int]:
    """Weights that one token is multiplied with: in the layers, with the experts it is sent to, and in the head."""
    text = model.config.text_config
    layers = 0
    for module in model.model.language_model.layers.modules():
        share = text.num_experts_per_tok / text.num_experts if isinstance(module, JambaExperts) else 1
        layers += int(share * sum(weight.numel() for weight in module.parameters(recurse=False)))
    return layers, model.lm_head.weight.numel()


def attention_layers(config: JambaConfig) -> int:
    return config.layers_block_type.count("attention")


def prefill_flops(model: LongLlavaForConditionalGeneration, tokens: int, pictures: int = 0) -> float:
    """Floating point operations of a prompt; a multiplication and an addition are two.

    Counted: matrix products with weights, the head at one position, attention over what comes before (half of all
    pairs), and the vision tower with its own attention. Not counted: scan, convolution, norms.
    """
    text, vision = model.config.text_config, model.config.vision_config
    layers, head = text_parameters(model)
    flops = 2.0 * (layers * tokens + head)
    flops += 2.0 * attention_layers(text) * text.hidden_size * tokens**2
    patches = model.config.patches_per_side**2 + 1
    depth = model.config.vision_feature_layer % (vision.num_hidden_layers + 1)
    weights = sum(p.numel() for layer in model.model.vision_tower.encoder.layers[:depth] for p in layer.parameters())
    per_picture = 2.0 * weights * patches + 4.0 * depth * vision.hidden_size * patches**2
    projector = sum(weight.numel() for weight in model.model.multi_modal_projector.parameters())
    return flops + pictures * (per_picture + 2.0 * projector * model.config.tokens_per_image)


def token_bytes(config: JambaConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that a token adds to the cache."""
    head_size = config.hidden_size // config.num_attention_heads
    return 2 * attention_layers(config) * config.num_key_value_heads * head_size * dtype.itemsize


def decode_bytes(model: LongLlavaForConditionalGeneration, context: int) -> int:
    """Bytes that a new token has to move: weights (of the experts it is sent to), keys and values read; Mamba states
    read and written."""
    text = model.config.text_config
    states = (text.num_hidden_layers - attention_layers(text)) * text.mamba_expand * text.hidden_size
    states *= text.mamba_d_state * 4 + text.mamba_d_conv * model.dtype.itemsize
    return sum(text_parameters(model)) * model.dtype.itemsize + context * token_bytes(text, model.dtype) + 2 * states


def cache_bytes(cache: Cache) -> int:
    """Bytes that the keys and values of a cache occupy, room for more included."""
    layers = (layer for layer in cache.layers if hasattr(layer, "keys"))
    return sum(tensor.untyped_storage().nbytes() for layer in layers for tensor in (layer.keys, layer.values))


def fill_cache(model: Any, config: JambaConfig, cache: Cache, context: int) -> Cache:
    """Make `cache` hold `context` tokens without reading them: states of a short text, then random keys and values.

    `model` is ours or transformers'; both get the same numbers from the same arguments.
    """
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    ids = torch.arange(START, device=device)[None] + config.vocab_size - START  # no special token among them
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    generator = torch.Generator(device).manual_seed(0)
    head_size = config.hidden_size // config.num_attention_heads
    for first in range(START, context, FILL):
        shape = (2, 1, config.num_key_value_heads, min(FILL, context - first), head_size)
        for index, kind in enumerate(config.layers_block_type):
            if kind == "attention":
                keys, values = torch.randn(shape, generator=generator, device=device, dtype=dtype)
                cache.update(keys, values, index)
    return cache


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def write_pictures(folder: Path, size: tuple[int, int] = PICTURE) -> list[Path]:
    """Draw `FILES` different JPEG files of `size` (width, height), with grain: as large as photographs."""
    paths = []
    for number in range(FILES):
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 256, (9, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
        grain = random.integers(-12, 13, smooth.shape, dtype=np.int16)
        paths.append(folder / f"picture_{number}.jpg")
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def conversation(paths: list[Path], pictures: int, question: str) -> list[dict[str, Any]]:
    """One user's turn with so many pictures, the files over and over, and a question."""
    blocks = [{"type": "image", "path": str(paths[number % len(paths)])} for number in range(pictures)]
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": question}]}]
