"""Fixtures for every test: a tiny random model, a tokenizer built in memory, pictures; nothing is downloaded.

`tiny_config`, `tiny_model` and `tiny_processor` are functions, so that a test states what differs from the defaults:
`tiny_model(num_experts=1)`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before any library of the Hub is imported: a test that reaches for the network fails at once instead of waiting.
os.environ["HF_HUB_OFFLINE"] = "1"
# One thread per test process: the models are so small that a second thread costs more than it brings.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton asks when it is imported, as transformers does: without a GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaImageProcessorPil, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
IMAGE_TOKEN_ID = 3
VOCAB_SIZE = 260  # four special tokens and the 256 bytes


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with reference data of the original implementation, beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared: the reference data of the original implementation are not here")
    return SHARED


@pytest.fixture(scope="session")
def reference(shared: Path) -> Path:
    """What the original implementation computes: a checkpoint, pictures, logits, conversations."""
    folder = shared / "upstream_reference"
    if not folder.is_dir():
        pytest.skip("no ../shared/upstream_reference: equality with the original cannot be checked")
    return folder


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens; `<|pad|>` 0, `<|startoftext|>` 1, `<|endoftext|>` 2, `<image>` 3, bytes from 4."""
    vocab = {"<|pad|>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, "<image>": IMAGE_TOKEN_ID}
    for piece in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


@pytest.fixture
def tiny_config() -> Callable[..., Any]:
    """`tiny_config(num_experts=4, **config)`: 4 tokens for a 56-pixel picture, attention at layer 2."""

    def build(num_experts: int = 4, text: dict[str, Any] | None = None, **config: Any) -> Any:
        from longllava.modeling_longllava import LongLlavaConfig

        vision_config = {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "projection_dim": 16,
        }
        text_config = {
            "model_type": "jamba",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": num_experts,
            "num_experts_per_tok": min(2, num_experts),
            # A dense model has no router, so there is no loss to balance it.
            "router_aux_loss_coef": 0.001 if num_experts > 1 else 0.0,
            # Wide enough that an answer depends on everything before it.
            "initializer_range": 0.1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "mamba_expand": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **(text or {}),
        }
        settings = {"image_token_id": IMAGE_TOKEN_ID, "tokens_per_image": 4, **config}
        return LongLlavaConfig(vision_config=vision_config, text_config=text_config, **settings)

    return build


@pytest.fixture
def tiny_model(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    """`tiny_model(seed=0, **tiny_config's arguments)` -> LongLlavaForConditionalGeneration in eval mode, float32."""

    def build(seed: int = 0, **settings: Any) -> Any:
        from longllava.modeling_longllava import LongLlavaForConditionalGeneration

        torch.manual_seed(seed)
        return LongLlavaForConditionalGeneration(tiny_config(**settings)).eval()

    return build


@pytest.fixture
def tiny_processor(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    """`tiny_processor(**settings)` -> LongLlavaProcessor that fits the tiny model: 56 pixels, 4 tokens per picture."""

    def build(**settings: Any) -> Any:
        from longllava.processing import LongLlavaProcessor

        size = {"shortest_edge": 56}
        image_processor = LlavaImageProcessorPil(do_pad=True, size=size, crop_size={"height": 56, "width": 56})
        return LongLlavaProcessor(image_processor, tiny_tokenizer, **{"tokens_per_image": 4, **settings})

    return build


@pytest.fixture
def tiny_folder(tiny_model: Callable[..., Any], tiny_processor: Callable[..., Any], tmp_path: Path) -> Path:
    """Model and processor saved side by side, as a user has them."""
    folder = tmp_path / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A coarse random pattern: unlike noise it survives resizing, so two pictures stay different."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BILINEAR)


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Four RGB pictures of different shapes: square, wide, tall, tiny."""
    return [
        picture(seed, width, height) for seed, (width, height) in enumerate([(64, 64), (90, 40), (37, 81), (5, 9)])
    ]


@pytest.fixture
def picture_files(pictures: list[Image.Image], tmp_path: Path) -> list[Path]:
    """The same pictures as PNG files, named in their order."""
    paths = [tmp_path / f"picture{index}.png" for index in range(len(pictures))]
    for image, path in zip(pictures, paths, strict=True):
        image.save(path)
    return paths


@pytest.fixture
def video_file(tmp_path: Path) -> Path:
    """An MP4 of 12 frames at 6 frames a second (2 seconds), 64 x 48, grey from dark to light."""
    import av

    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=6)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * index, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
