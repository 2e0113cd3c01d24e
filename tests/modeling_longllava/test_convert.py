"""Checkpoints of the original layout: every key and shape at full size, the whole way on small ones, and equality."""

import json
import math
import shutil
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPVisionConfig, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion

from longllava.modeling_longllava import LongLlavaForConditionalGeneration, convert
from longllava.modeling_longllava.convert import add_image_token, convert_checkpoint, original_config, plan_conversion
from longllava.modeling_longllava.hub import tensor_shapes
from longllava.processing import LongLlavaProcessor

KNOWN_TOWER = "openai/clip-vit-large-patch14-336"
SPELLINGS = {
    "moe": {"ff": "moe", "ff_norm": "pre_moe_layernorm", "b": "B_layernorm", "c": "C_layernorm"},
    "feed_forward": {"ff": "feed_forward", "ff_norm": "pre_ff_layernorm", "b": "b_layernorm", "c": "c_layernorm"},
}
# 53B as released; the 9B is the same with one expert.
FULL_SIZE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 65536,
    "mamba_dt_rank": 256,
    "mamba_d_state": 16,
    "num_experts": 16,
}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "mamba_dt_rank": 4,
    "mamba_d_state": 8,
    "num_experts": 4,
}
SMALL_TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 16,
}
# As its authors publish it: ViT-L/14 at 336 pixels.
CLIP_L = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)


def original_settings(**changes: Any) -> dict[str, Any]:
    """An original config.json, as the released checkpoints have it."""
    return {
        "model_type": "llava_jamba",
        "architectures": ["LlavaJambaForCausalLM"],
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts_per_tok": 2,
        "mamba_expand": 2,
        "mamba_d_conv": 4,
        "mamba_inner_layernorms": True,
        "use_mamba_kernels": True,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "image_aspect_ratio": "pad",
        "mm_vision_tower": "/home/somebody/models/clip_vit_large_patch14_336",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "resamplePooling": "2d",
        **changes,
    }


def original_shapes(
    settings: dict[str, Any], tower: CLIPVisionConfig, spelling: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of an original checkpoint, written down from the architecture, not from our code."""
    names = SPELLINGS[spelling]
    hidden, inner = settings["hidden_size"], settings["intermediate_size"]
    channels, states, rank = 2 * hidden, settings["mamba_d_state"], settings["mamba_dt_rank"]
    key_value = hidden // settings["num_attention_heads"] * settings["num_key_value_heads"]
    yield "model.embed_tokens.weight", (settings["vocab_size"], hidden)
    for index in range(settings["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.{names['ff_norm']}.weight", (hidden,)
        if index % 8 == 4:
            yield f"{layer}.self_attn.q_proj.weight", (hidden, hidden)
            yield f"{layer}.self_attn.k_proj.weight", (key_value, hidden)
            yield f"{layer}.self_attn.v_proj.weight", (key_value, hidden)
            yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        else:
            mamba = f"{layer}.mamba"
            yield f"{mamba}.A_log", (channels, states)
            yield f"{mamba}.D", (channels,)
            yield f"{mamba}.conv1d.weight", (channels, 1, 4)
            yield f"{mamba}.conv1d.bias", (channels,)
            yield f"{mamba}.in_proj.weight", (2 * channels, hidden)
            yield f"{mamba}.x_proj.weight", (rank + 2 * states, channels)
            yield f"{mamba}.dt_proj.weight", (channels, rank)
            yield f"{mamba}.dt_proj.bias", (channels,)
            yield f"{mamba}.out_proj.weight", (hidden, channels)
            yield f"{mamba}.dt_layernorm.weight", (rank,)
            yield f"{mamba}.{names['b']}.weight", (states,)
            yield f"{mamba}.{names['c']}.weight", (states,)
        mixture = index % 2 == 1 and settings["num_experts"] > 1
        if mixture:
            yield f"{layer}.{names['ff']}.router.weight", (settings["num_experts"], hidden)
        # The older spelling keeps its experts' form where there is one; the newer one has a plain layer there.
        count = settings["num_experts"] if mixture else 1
        for expert in range(count):
            ff = f"{layer}.{names['ff']}"
            if mixture or spelling == "moe":
                ff = f"{ff}.experts.{expert}"
            yield f"{ff}.gate_proj.weight", (inner, hidden)
            yield f"{ff}.up_proj.weight", (inner, hidden)
            yield f"{ff}.down_proj.weight", (hidden, inner)
    yield "model.final_layernorm.weight", (hidden,)
    yield "lm_head.weight", (settings["vocab_size"], hidden)

    width, clip = tower.hidden_size, "model.vision_tower.vision_tower.vision_model"
    yield f"{clip}.embeddings.class_embedding", (width,)
    yield f"{clip}.embeddings.patch_embedding.weight", (width, 3, tower.patch_size, tower.patch_size)
    patches = (tower.image_size // tower.patch_size) ** 2
    yield f"{clip}.embeddings.position_embedding.weight", (patches + 1, width)
    layers = [f"{clip}.encoder.layers.{index}" for index in range(tower.num_hidden_layers)]
    norms = [f"{layer}.layer_norm{number}" for layer in layers for number in (1, 2)]
    for norm in [f"{clip}.pre_layrnorm", f"{clip}.post_layernorm", *norms]:
        yield f"{norm}.weight", (width,)
        yield f"{norm}.bias", (width,)
    for layer in layers:
        shapes = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        shapes |= {"mlp.fc1": (tower.intermediate_size, width), "mlp.fc2": (width, tower.intermediate_size)}
        for name, (rows, columns) in shapes.items():
            yield f"{layer}.{name}.weight", (rows, columns)
            yield f"{layer}.{name}.bias", (rows,)
    for number, columns in ((0, width), (2, hidden)):
        yield f"model.mm_projector.{number}.weight", (hidden, columns)
        yield f"model.mm_projector.{number}.bias", (hidden,)


def write_header_only(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file in bfloat16 of full length that holds no data: a hole on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)


@pytest.fixture
def small_checkpoint(tmp_path, tiny_tokenizer):
    """`write(spelling, shards, binary, **settings)` -> (folder of an original checkpoint, its tensors)."""

    def write(spelling: str = "moe", shards: int = 1, binary: bool = False, **settings: Any):
        folder = tmp_path / "original"
        (folder / "clip").mkdir(parents=True)
        tower = CLIPVisionConfig(**SMALL_TOWER)
        tower.save_pretrained(folder / "clip")
        original = original_settings(**(SMALL | {"mm_vision_tower": "clip", "torch_dtype": "float32"} | settings))
        (folder / "config.json").write_text(json.dumps(original))
        tiny_tokenizer.save_pretrained(folder)
        generator = torch.Generator().manual_seed(0)
        tensors = {
            name: torch.randn(shape, generator=generator) / 10
            for name, shape in original_shapes(original, tower, spelling)
        }
        names = list(tensors)
        stem, suffix = ("pytorch_model", "bin") if binary else ("model", "safetensors")
        weight_map = {}
        for number in range(shards):
            file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number + 1:05}-of-{shards:05}.{suffix}"
            part = {name: tensors[name] for name in names[number::shards]}
            torch.save(part, folder / file) if binary else save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        if shards > 1:
            (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder, tensors

    return write


def load(folder: Path) -> LongLlavaForConditionalGeneration:
    """Loads a converted folder, and insists that transformers found every key and no other."""
    model, info = LongLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    problems = {key: value for key, value in info.items() if value}
    assert not problems, problems
    return model.eval()


# Full size, on the meta device


@pytest.mark.parametrize("num_experts", [16, 1], ids=["53B", "9B"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_full_size_layout_is_planned_completely(tmp_path, spelling, num_experts):
    """32 layers of 4,096 and CLIP ViT-L/14-336 in 8 files: what comes out is what transformers itself would save."""
    settings = original_settings(**(FULL_SIZE | {"num_experts": num_experts}))
    shapes = dict(original_shapes(settings, CLIP_L, spelling))
    names = list(shapes)
    files = [tmp_path / f"model-{number:05}-of-00008.safetensors" for number in range(1, 9)]
    for number, path in enumerate(files):
        write_header_only(path, {name: shapes[name] for name in names[number::8]})

    config = original_config(settings, CLIP_L, image_token_id=516)
    plans = plan_conversion({path: tensor_shapes(path) for path in files}, config)

    assert list(plans) == files
    converted = {new: shapes[old] for plan in plans.values() for old, new in plan.items()}
    assert len(converted) == len(shapes)
    with torch.device("meta"):
        model = LongLlavaForConditionalGeneration(config)
    saved = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}
    assert converted == saved
    parameters = sum(math.prod(shape) for shape in converted.values())
    assert parameters == sum(parameter.numel() for parameter in model.parameters())
    assert round(parameters / 1e9, 1) == {16: 51.9, 1: 9.6}[num_experts]


def test_full_size_config():
    """The settings that decide shapes and token counts arrive, the machine's own do not."""
    config = original_config(original_settings(**FULL_SIZE), CLIP_L, image_token_id=516)
    assert config.text_config.num_experts == 16
    assert config.text_config.max_position_embeddings == 262144
    assert (config.pooling, config.tokens_per_image, config.vision_feature_layer) == ("2d", 144, -2)
    assert config.vision_config.hidden_size == 1024
    assert "somebody" not in config.to_json_string(use_diff=False)
    dense = original_config(original_settings(**(FULL_SIZE | {"num_experts": 1})), CLIP_L, image_token_id=516)
    assert dense.text_config.router_aux_loss_coef == 0.0


@pytest.mark.parametrize(("stored", "pooling", "tokens"), [("2d", "2d", 144), ("1d", "1d", 144), (None, "none", 576)])
def test_pooling_flag_is_kept(stored, pooling, tokens):
    config = original_config(original_settings(**FULL_SIZE, resamplePooling=stored), CLIP_L, image_token_id=516)
    assert (config.pooling, config.tokens_per_image) == (pooling, tokens)


# The whole way, small


@pytest.mark.parametrize("num_experts", [4, 1], ids=["mixture", "dense"])
@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize(("spelling", "shards"), [("moe", 1), ("feed_forward", 3)])
def test_converted_folder_loads_with_the_same_numbers(
    small_checkpoint, tmp_path, spelling, shards, binary, num_experts
):
    source, tensors = small_checkpoint(spelling, shards, binary, num_experts=num_experts)
    dst = convert_checkpoint(source, tmp_path / "converted")

    assert sorted(path.name for path in dst.glob("*.safetensors*")) == (
        ["model.safetensors"]
        if shards == 1
        else [*(f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)), "model.safetensors.index.json"]
    )
    model = load(dst)
    state = model.state_dict()
    ff = SPELLINGS[spelling]["ff"]
    assert torch.equal(state["lm_head.weight"], tensors["lm_head.weight"])
    assert torch.equal(
        state["model.language_model.layers.0.mamba.b_layernorm.weight"],
        tensors[f"model.layers.0.mamba.{SPELLINGS[spelling]['b']}.weight"],
    )
    assert torch.equal(
        state["model.vision_tower.pre_layrnorm.weight"],
        tensors["model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight"],
    )
    assert torch.equal(state["model.multi_modal_projector.linear_2.weight"], tensors["model.mm_projector.2.weight"])
    if num_experts == 4:
        fused = state["model.language_model.layers.1.feed_forward.experts.gate_up_proj"]
        gate, up = (tensors[f"model.layers.1.{ff}.experts.3.{part}_proj.weight"] for part in ("gate", "up"))
        assert torch.equal(fused[3], torch.cat([gate, up]))
    total = sum(tensor.double().sum().item() for tensor in tensors.values())
    assert sum(tensor.double().sum().item() for tensor in state.values()) == pytest.approx(total)
    assert sum(tensor.numel() for tensor in state.values()) == sum(tensor.numel() for tensor in tensors.values())

    processor = LongLlavaProcessor.from_pretrained(dst)
    assert processor.image_processor.do_pad
    assert processor.image_processor.crop_size["height"] == 56
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id == 3
    # It is a Hub folder already; tests of the export show that such a folder works on its own.
    complete = {"modeling_longllava.py", "processing_longllava.py", "generation_config.json", "README.md"}
    assert complete <= {path.name for path in dst.iterdir()}


def test_tower_missing_from_the_shards_is_read_from_its_own_checkpoint(small_checkpoint, tmp_path):
    source, tensors = small_checkpoint()
    stored = "model.vision_tower.vision_tower."
    save_file({name: tensor for name, tensor in tensors.items() if stored not in name}, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: model\.vision_tower\.embeddings\.class_embedding \(24,\)"):
        convert_checkpoint(source, tmp_path / "converted")

    clip = {name.removeprefix(stored): tensor for name, tensor in tensors.items() if stored in name}
    clip |= {"text_model.final_layer_norm.weight": torch.ones(8), "logit_scale": torch.ones(1)}
    save_file(clip, source / "clip" / "model.safetensors")
    model = load(convert_checkpoint(source, tmp_path / "converted"))
    assert torch.equal(
        model.state_dict()["model.vision_tower.post_layernorm.bias"], clip["vision_model.post_layernorm.bias"]
    )


def test_position_ids_of_old_transformers_are_no_left_over(small_checkpoint, tmp_path):
    source, tensors = small_checkpoint()
    tensors["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, source / "model.safetensors")
    load(convert_checkpoint(source, tmp_path / "converted"))


# What does not fit


def test_every_problem_is_listed_and_nothing_is_written(small_checkpoint, tmp_path):
    source, tensors = small_checkpoint("feed_forward", shards=1)
    tensors["model.image_newline"] = torch.ones(32)
    tensors["model.layers.8.input_layernorm.weight"] = torch.ones(32)
    tensors["model.layers.1.moe.router.weight"] = tensors["model.layers.1.feed_forward.router.weight"].clone()
    tensors["lm_head.weight"] = torch.ones(299, 32)
    del tensors["model.layers.3.mamba.D"], tensors["model.layers.5.feed_forward.experts.2.up_proj.weight"]
    save_file(tensors, source / "model.safetensors")

    with pytest.raises(ValueError) as error:
        convert_checkpoint(source, tmp_path / "converted")
    lines = str(error.value).splitlines()
    assert lines[0].startswith("6 of ")
    for line in (
        "  left over: model.image_newline (32,) in model.safetensors",
        "  left over: model.layers.8.input_layernorm.weight (32,) in model.safetensors",
        "  shape: lm_head.weight (299, 32) in model.safetensors, the configuration says (300, 32)",
        "  missing: model.language_model.layers.3.mamba.D (64,)",
        "  missing: model.language_model.layers.5.feed_forward.experts.2.up_proj.weight (48, 32)",
    ):
        assert line in lines
    assert sum(line.startswith("  twice: model.language_model.layers.1.feed_forward.router") for line in lines) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_interrupted_conversion_leaves_no_half_result(small_checkpoint, tmp_path, monkeypatch):
    source, _ = small_checkpoint(shards=3)
    written = []

    def interrupt(tensors, path, metadata):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(convert, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "converted")
    assert len(written) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_only_one_file_is_in_memory(small_checkpoint, tmp_path, monkeypatch):
    """When a file is written, nothing of the one before it is held any more."""
    source, _ = small_checkpoint(shards=4)
    before: list[weakref.ref] = []
    alive = []

    def watch(tensors, path, metadata):
        alive.append(sum(reference() is not None for reference in before))
        before[:] = [weakref.ref(tensor) for tensor in tensors.values()]
        save_file(tensors, path, metadata)

    monkeypatch.setattr(convert, "save_file", watch)
    convert_checkpoint(source, tmp_path / "converted")
    assert alive == [0, 0, 0, 0]


def test_binary_file_with_code_in_it_is_not_run(small_checkpoint, tmp_path):
    source, tensors = small_checkpoint(binary=True)
    torch.save({**tensors, "payload": Path("harmless")}, source / "pytorch_model.bin")
    with pytest.raises(UnpicklingError, match="Weights only load failed"):
        convert_checkpoint(source, tmp_path / "converted")


def test_missing_shard_is_named(small_checkpoint, tmp_path):
    source, _ = small_checkpoint(shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="3 files, 1 are not there: model-00002-of-00003.safetensors"):
        convert_checkpoint(source, tmp_path / "converted")


def test_destination_is_never_overwritten(small_checkpoint, tmp_path):
    source, _ = small_checkpoint()
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        convert_checkpoint(source, tmp_path / "converted")
    assert [path.name for path in (tmp_path / "converted").iterdir()] == ["notes.txt"]


def test_absolute_tower_path_is_refused_even_if_it_exists(small_checkpoint, tmp_path):
    source, _ = small_checkpoint(mm_vision_tower=str(tmp_path / "original" / "clip"))
    with pytest.raises(ValueError, match="path .*clip of another machine; name the tower"):
        convert_checkpoint(source, tmp_path / "converted")
    load(convert_checkpoint(source, tmp_path / "converted", vision_tower=source / "clip"))


def test_known_tower_needs_no_folder(small_checkpoint, tmp_path, monkeypatch):
    assert convert.KNOWN_TOWERS[KNOWN_TOWER].to_dict() == CLIP_L.to_dict()
    monkeypatch.setitem(convert.KNOWN_TOWERS, KNOWN_TOWER, CLIPVisionConfig(**SMALL_TOWER))
    source, _ = small_checkpoint(mm_vision_tower="/home/somebody/clip")
    shutil.rmtree(source / "clip")
    dst = convert_checkpoint(source, tmp_path / "converted", vision_tower=KNOWN_TOWER)
    assert load(dst).config.vision_config.hidden_size == 24
    assert LongLlavaProcessor.from_pretrained(dst).image_processor.crop_size["height"] == 56


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mm_projector_type", "linear"),
        ("mm_vision_select_feature", "cls_patch"),
        ("image_aspect_ratio", "anyres"),
        ("resamplePooling", "3d"),
        ("sliding_window", 4096),
        ("model_type", "jamba"),
    ],
)
def test_settings_without_a_place_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} = {value!r}"):
        original_config(original_settings(**(FULL_SIZE | {setting: value})), CLIP_L, image_token_id=516)


@pytest.mark.parametrize("missing", [["vocab_size"], ["num_experts"], ["vocab_size", "mm_vision_select_layer"]])
def test_settings_that_cannot_be_guessed_are_named(missing):
    settings = {key: value for key, value in original_settings(**FULL_SIZE).items() if key not in missing}
    with pytest.raises(ValueError, match=f"config.json does not say {', '.join(missing)}$"):
        original_config(settings, CLIP_L, image_token_id=516)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype", None])
def test_dtype_has_two_names(key):
    settings = original_settings(**FULL_SIZE)
    del settings["torch_dtype"]
    settings |= {key: "float16"} if key else {}
    expected = torch.float16 if key else torch.float32
    assert original_config(settings, CLIP_L, image_token_id=516).dtype == expected


def test_image_token_is_not_generated(small_checkpoint, tmp_path):
    """A head that answers every question with `<image>`: the converted generation_config.json says no."""
    source, _ = small_checkpoint()
    model = load(convert_checkpoint(source, tmp_path / "converted"))
    assert model.generation_config.suppress_tokens == [3]
    question = torch.tensor([[1, 50, 60]])
    with torch.no_grad():
        last = model.model(input_ids=question).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()
        model.lm_head.weight[3] = last
    options = {"max_new_tokens": 1, "do_sample": False}
    assert model.generate(question, **options)[0, -1] != 3
    model.generation_config.suppress_tokens = None
    assert model.generate(question, **options)[0, -1] == 3


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder and no Hub id"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "converted")
    with pytest.raises(ValueError, match="holds no config.json"):
        convert_checkpoint(tmp_path, tmp_path / "converted")
    (tmp_path / "config.json").write_text(json.dumps(original_settings(**SMALL)))
    with pytest.raises(ValueError, match="neither safetensors nor pytorch_model.bin"):
        convert_checkpoint(tmp_path, tmp_path / "converted")


# Tokenizer


def test_jamba_tokenizer_gets_the_image_token(shared, tmp_path):
    """Piece 516 becomes `<image>`; no other text gets other ids."""
    source = shared / "jamba_tokenizer"
    assert add_image_token(source, tmp_path / "new") == 516
    # Not AutoTokenizer for the old one: transformers 5 would build a LlamaTokenizer, which splits ", x" differently.
    old, new = PreTrainedTokenizerFast.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "new")
    assert len(new) == len(old) == 65536
    assert new.image_token == "<image>"
    assert new.image_token_id == 516
    assert new.convert_ids_to_tokens(516) == "<image>"
    text = "<|User|>\nWhich of <img></img> <vid><t></vid> is größer, 大?<|endoftext|>\n\n  \t"
    assert new(text).input_ids == old(text).input_ids
    assert new("a <image> b").input_ids == old("a <|reserved_0|> b").input_ids
    assert new.decode([516], skip_special_tokens=True) == ""
    assert new("hello, 大").input_ids == old("hello, 大").input_ids
    # Saved and loaded again, and prepared a second time, it stays what it is.
    new.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("<image>").input_ids == [1, 516]
    assert add_image_token(tmp_path / "saved", tmp_path / "again") == 516


def test_pieces_that_cannot_become_the_image_token(shared, tmp_path):
    source = shared / "jamba_tokenizer"
    with pytest.raises(ValueError, match="image_token_id 65536 is outside the 65536 pieces"):
        add_image_token(source, tmp_path, image_token_id=65536)
    with pytest.raises(ValueError, match="piece 1554 is '<0x0A>', a piece of ordinary text"):
        add_image_token(source, tmp_path, image_token_id=1554)
    with pytest.raises(ValueError, match=r"piece 2 is '<\|endoftext\|>', in use as eos_token"):
        add_image_token(source, tmp_path, image_token_id=2)
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        add_image_token(tmp_path, tmp_path / "new")
    assert not (tmp_path / "tokenizer.json").exists()


def test_image_token_elsewhere_is_reported(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="<image> is piece 3 of .* already, not 100"):
        add_image_token(tmp_path, tmp_path / "new", image_token_id=100)


def test_tokenizer_and_embedding_must_fit(small_checkpoint, shared, tmp_path):
    source, _ = small_checkpoint()
    with pytest.raises(ValueError, match="image_token_id 516 is outside the vocabulary of 300 rows"):
        convert_checkpoint(source, tmp_path / "converted", tokenizer=shared / "jamba_tokenizer")
    with pytest.raises(ValueError, match="has 65536 pieces, but the embedding has 300 rows"):
        convert_checkpoint(source, tmp_path / "converted", tokenizer=shared / "jamba_tokenizer", image_token_id=100)


# Equality with the original implementation


@pytest.fixture
def converted_reference(reference, tiny_tokenizer, tmp_path) -> Path:
    """The reference checkpoint, which has no tokenizer, through the converter; piece 3 of its 512 is `<image>`."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return convert_checkpoint(
        reference / "moe", tmp_path / "converted", tokenizer=tmp_path / "tokenizer", image_token_id=3
    )


def test_converted_reference_computes_what_the_original_does(reference, converted_reference):
    """Pixel values equal; features and logits within 2e-4 (standard deviation near 0.9); 8 greedy tokens equal."""
    expected = load_file(reference / "moe" / "expected.safetensors")
    model, processor = load(converted_reference), LongLlavaProcessor.from_pretrained(converted_reference)
    pictures = [Image.open(reference / "moe" / f"img{index}.png") for index in range(3)]
    pixel_values = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixel_values[:, :, ::12, ::12], expected["pixel_values_every_12th"])

    input_ids = []
    for token in expected["input_ids"][0].tolist():
        input_ids += [3] * 144 if token == -200 else [token]
    inputs = {"input_ids": torch.tensor([input_ids]), "pixel_values": pixel_values}
    with torch.no_grad():
        features = torch.stack(model.get_image_features(pixel_values).pooler_output)
        logits = model(**inputs).logits
        generated = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    torch.testing.assert_close(features, expected["image_features"], atol=2e-4, rtol=0)
    torch.testing.assert_close(logits, expected["logits"], atol=2e-4, rtol=0)
    assert generated[0, len(input_ids) :].tolist() == expected["generated"][0].tolist()


def test_both_spellings_of_the_reference_are_the_same_model(reference, converted_reference, tiny_tokenizer, tmp_path):
    """The reference with its keys in the other spelling, as sharded .bin files, gives the same weights."""
    source = tmp_path / "other"
    shutil.copytree(reference / "moe", source, ignore=shutil.ignore_patterns("*.safetensors", "*.png"))
    tiny_tokenizer.save_pretrained(source)
    renames = {old: SPELLINGS["feed_forward"][key] for key, old in SPELLINGS["moe"].items()}
    tensors = {}
    for name, tensor in load_file(reference / "moe" / "model.safetensors").items():
        tensors[".".join(renames.get(part, part) for part in name.split("."))] = tensor
    names = sorted(tensors)
    files = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for number, file in enumerate(files):
        torch.save({name: tensors[name] for name in names[number::2]}, source / file)
    weight_map = {name: files[index % 2] for index, name in enumerate(names)}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))

    other = load(convert_checkpoint(source, tmp_path / "converted_other", image_token_id=3)).state_dict()
    for name, tensor in load(converted_reference).state_dict().items():
        assert torch.equal(tensor, other[name]), name
