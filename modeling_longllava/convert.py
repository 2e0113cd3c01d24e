"""Checkpoints of the original implementation (`llava_jamba`) -> ours, one file of weights at a time.

    original                                                  ours
    model.vision_tower.vision_tower.vision_model.*            model.vision_tower.*
    model.mm_projector.0 / .2                                 model.multi_modal_projector.linear_1 / .linear_2
    model.embed_tokens, model.layers, model.final_layernorm   model.language_model.*
    lm_head                                                   lm_head

Inside a layer two spellings occur: `moe`, `pre_moe_layernorm`, `B_layernorm`, `C_layernorm` are what others write as
`feed_forward`, `pre_ff_layernorm`, `b_layernorm`, `c_layernorm`; a layer without a choice is their `moe.experts.0`.
"""

import json
import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPVisionConfig, JambaConfig, LlavaImageProcessorPil

from longllava.processing import LongLlavaProcessor

from .configuration_longllava import LongLlavaConfig
from .hub import (
    WEIGHTS,
    WEIGHTS_INDEX,
    expected_tensors,
    generation_config,
    local_folder,
    new_folder,
    tensor_shapes,
    weight_files,
    write_hub_files,
)

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
UNUSED_PIECE = "<|reserved_0|>"  # id 516 of Jamba's vocabulary, never trained

_TEXT_PATTERNS = ("*.json", "*.jinja", "tokenizer.model")
_STORED_TOWER = "model.vision_tower.vision_tower.vision_model."
_OWN_TOWER = "vision_model."  # the same in a checkpoint of CLIP itself
_RENAMES = [
    (re.compile(f"^({re.escape(_STORED_TOWER)}|{re.escape(_OWN_TOWER)})"), "model.vision_tower."),
    (re.compile(r"^model\.mm_projector\.0\."), "model.multi_modal_projector.linear_1."),
    (re.compile(r"^model\.mm_projector\.2\."), "model.multi_modal_projector.linear_2."),
    (re.compile(r"^model\.(embed_tokens|layers|final_layernorm)\."), r"model.language_model.\1."),
    (re.compile(r"\.moe\."), ".feed_forward."),
    (re.compile(r"\.pre_moe_layernorm\."), ".pre_ff_layernorm."),
    (re.compile(r"\.B_layernorm\."), ".b_layernorm."),
    (re.compile(r"\.C_layernorm\."), ".c_layernorm."),
]
# 0, 1, 2, ...: old versions of transformers saved it with the tower, newer ones compute it.
_COMPUTED = re.compile(r"\.embeddings\.position_ids$")

# The tower of the released checkpoints, which is our default, so that no download is needed to know its shape.
KNOWN_TOWERS = {"openai/clip-vit-large-patch14-336": LongLlavaConfig().vision_config}


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    vision_tower: str | Path | None = None,
    image_token_id: int | None = None,
    tokenizer: str | Path | None = None,
) -> Path:
    """Converts an original checkpoint into a complete Hub folder (see hub.py), with memory for one of its files.

    Its generation_config.json is the original's, if there is one, and suppresses `<image>`: answers hold no pictures.

    Args:
        src: folder or Hub id; safetensors or `pytorch_model*.bin`, in one file or sharded, either spelling.
        dst: a new or empty folder. It appears when everything is written.
        vision_tower: folder or Hub id of the CLIP tower, for its configuration and preprocessing, and for its weights
            where `src` has none. By default what `mm_vision_tower` names, unless that is an absolute path.
        image_token_id: id of the piece that becomes `<image>`; see `add_image_token` for the default.
        tokenizer: folder or Hub id, where `src` has no tokenizer.

    Raises:
        ValueError: a setting that this model does not have; tensors left over, missing or of another shape, all of
            them listed. That is known before any weights are read.
        FileExistsError: `dst` is not empty.
    """
    source = local_folder(src, [*_TEXT_PATTERNS, "*.safetensors"])
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} holds no config.json, so it is no checkpoint")
    original = json.loads((source / "config.json").read_text())
    files = weight_files(source) or weight_files(
        local_folder(src, [*_TEXT_PATTERNS, "pytorch_model*.bin"]), "pytorch_model.bin"
    )
    if not files:
        raise ValueError(f"{source} holds neither safetensors nor pytorch_model.bin, with an index or without")

    shapes = {path: _shapes(path) for path in files}
    has_tower = any(name.startswith(_STORED_TOWER) for found in shapes.values() for name in found)

    tower = _tower(source, original, vision_tower, has_tower)
    vision_config = KNOWN_TOWERS[tower] if isinstance(tower, str) else _vision_config(tower)
    if isinstance(tower, Path) and not has_tower:
        for path in weight_files(tower) or weight_files(tower, "pytorch_model.bin"):
            shapes[path] = {name: shape for name, shape in _shapes(path).items() if name.startswith(_OWN_TOWER)}

    with new_folder(dst) as folder, tempfile.TemporaryDirectory() as temporary:
        text_folder = local_folder(tokenizer, _TEXT_PATTERNS) if tokenizer else source
        image_token_id = add_image_token(text_folder, temporary, image_token_id=image_token_id)
        config = original_config(original, vision_config, image_token_id)
        pieces = AutoTokenizer.from_pretrained(temporary)
        if len(pieces) > config.text_config.vocab_size:
            raise ValueError(
                f"{text_folder} has {len(pieces)} pieces, but the embedding has {config.text_config.vocab_size} rows"
            )
        _write_weights(plan_conversion(shapes, config), folder)
        processor = LongLlavaProcessor(
            _image_processor(tower, vision_config),
            pieces,
            patch_size=vision_config.patch_size,
            tokens_per_image=config.tokens_per_image,
        )
        generation = generation_config(source, config)
        # No training taught the model not to write the renamed piece, and there is no picture behind one it writes.
        generation.suppress_tokens = [config.image_token_id]
        write_hub_files(folder, config, processor, generation, name=Path(dst).absolute().name)
    return Path(dst)


def plan_conversion(
    shapes: dict[Path, dict[str, tuple[int, ...]]], config: LongLlavaConfig
) -> dict[Path, dict[str, str]]:
    """The new name of every tensor, file by file, from names and shapes alone.

    Args:
        shapes: for each file of the original checkpoint, its tensors' names and shapes.
        config: the configuration that the result has to fit.

    Raises:
        ValueError: tensors left over, missing, doubled or of another shape than `config` says, all of them listed.
    """
    expected = expected_tensors(config)
    origin: dict[str, str] = {}  # new name -> old name
    problems: list[str] = []
    plans: dict[Path, dict[str, str]] = {}
    for path, found in shapes.items():
        plan: dict[str, str] = {}
        for old, shape in found.items():
            if _COMPUTED.search(old):
                continue
            new = _new_name(old, expected)
            if new not in expected:
                problems.append(f"  left over: {old} {shape} in {path.name}")
            elif new in origin:
                problems.append(f"  twice: {new} from {origin[new]} and from {old} in {path.name}")
            elif shape != expected[new]:
                problems.append(f"  shape: {old} {shape} in {path.name}, the configuration says {expected[new]}")
            origin[new] = old
            plan[old] = new
        if plan:
            plans[path] = plan
    problems += [f"  missing: {new} {shape}" for new, shape in expected.items() if new not in origin]
    if problems:
        raise ValueError(f"{len(problems)} of {len(expected)} tensors do not fit:\n" + "\n".join(problems))
    return plans


def original_config(original: dict[str, Any], vision_config: CLIPVisionConfig, image_token_id: int) -> LongLlavaConfig:
    """Our configuration for an original config.json.

    Raises:
        ValueError: a setting of the original that changes the result and that this model does not have, or one that
            is not there and that cannot be guessed.
    """
    # None also stands for a setting that an older config.json does not have.
    only = {
        "model_type": ("llava_jamba",),
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", None),
        "mm_patch_merge_type": ("flat", None),
        "image_aspect_ratio": ("pad",),
        "resamplePooling": ("2d", "1d", None),
        "mamba_inner_layernorms": (True, None),
        "sliding_window": (None,),
        "tie_word_embeddings": (False, None),
    }
    for key, values in only.items():
        if original.get(key) not in values:
            raise ValueError(f"config.json says {key} = {original.get(key)!r}, not {' or '.join(map(repr, values))}")
    # The other fields that may be absent have the same defaults in the original as in JambaConfig.
    absent = [key for key in ("vocab_size", "num_experts", "mm_vision_select_layer") if original.get(key) is None]
    if absent:
        raise ValueError(f"config.json does not say {', '.join(absent)}")
    vocab_size = original["vocab_size"]
    if not 0 <= image_token_id < vocab_size:
        raise ValueError(f"image_token_id {image_token_id} is outside the vocabulary of {vocab_size} rows")

    # The fields of JambaConfig itself; kernels are a choice of the machine, not of the checkpoint.
    fields = JambaConfig.__annotations__.keys() - {"use_mamba_kernels", "use_mambapy", "use_associative_scan"}
    text = {key: value for key, value in original.items() if key in fields}
    text.setdefault("max_position_embeddings", original.get("n_ctx", JambaConfig().max_position_embeddings))
    if original["num_experts"] == 1:
        text["router_aux_loss_coef"] = 0.0  # no router, no loss to balance it; training fails on the original 0.001

    pooling = original.get("resamplePooling") or "none"
    patches = (vision_config.image_size // vision_config.patch_size) ** 2
    return LongLlavaConfig(
        vision_config=vision_config.to_dict(),
        text_config={**text, "model_type": "jamba"},
        image_token_id=image_token_id,
        vision_feature_layer=original["mm_vision_select_layer"],
        pooling=pooling,
        # The original pools 2 x 2 patches (2d) or 4 in a row (1d) into one token.
        tokens_per_image=patches if pooling == "none" else patches // 4,
        dtype=original.get("dtype") or original.get("torch_dtype") or "float32",  # renamed in transformers 5
    )


def add_image_token(
    tokenizer: str | Path, dst: str | Path, *, image_token_id: int | None = None, image_token: str = IMAGE_TOKEN
) -> int:
    """Copies a tokenizer's files to `dst` with one unused piece renamed to `<image>`; returns its id.

    The vocabulary keeps its size, so no embedding grows and no id moves.

    Args:
        tokenizer: folder with `tokenizer.json`.
        dst: folder for the result, created if needed.
        image_token_id: the piece to rename; by default the piece that already has the name, else `<|reserved_0|>`.

    Raises:
        FileNotFoundError: no `tokenizer.json`.
        ValueError: the id is outside the vocabulary, the piece there is in use, or another piece has the name.
    """
    source, dst = Path(tokenizer), Path(dst)
    if not (source / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{source} holds no tokenizer.json; name a tokenizer (--tokenizer)")
    contents = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    settings_file = source / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}

    added = {token["id"]: token for token in contents["added_tokens"]}
    vocab: dict[str, int] = contents["model"]["vocab"]
    piece_of = {index: piece for piece, index in vocab.items()} | {i: token["content"] for i, token in added.items()}
    id_of = {piece: index for index, piece in piece_of.items()}
    if image_token_id is None:
        image_token_id = id_of.get(image_token, id_of.get(UNUSED_PIECE))
        if image_token_id is None:
            raise ValueError(f"{source} has neither {image_token} nor {UNUSED_PIECE}; give an image_token_id")
    if image_token_id not in piece_of:
        raise ValueError(f"image_token_id {image_token_id} is outside the {len(piece_of)} pieces of {source}")
    if id_of.get(image_token, image_token_id) != image_token_id:
        raise ValueError(f"{image_token} is piece {id_of[image_token]} of {source} already, not {image_token_id}")

    piece = piece_of[image_token_id]
    if piece != image_token:
        _check_unused(piece, image_token_id, added, settings, contents)
    if piece in vocab:
        contents["model"]["vocab"] = {
            image_token if index == image_token_id else key: index for key, index in vocab.items()
        }
    # `normalized` off: the name is found in the text as it was written. `special`: decoding can skip it.
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added[image_token_id] = {"id": image_token_id, "content": image_token, **flags}
    contents["added_tokens"] = [added[index] for index in sorted(added)]
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"][str(image_token_id)] = {"content": image_token, **flags}
    settings["image_token"] = image_token
    # transformers 5 builds a `LlamaTokenizer` anew and splits spaces otherwise than the file says (", at" of the
    # reference conversations); this class reads the file as it is.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}  # as prompts are padded

    dst.mkdir(parents=True, exist_ok=True)
    for name, data in (("tokenizer.json", contents), ("tokenizer_config.json", settings)):
        (dst / name).write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    if (source / "special_tokens_map.json").is_file():
        shutil.copyfile(source / "special_tokens_map.json", dst / "special_tokens_map.json")
    return image_token_id


def _check_unused(
    piece: str, index: int, added: dict[int, dict[str, Any]], settings: dict[str, Any], contents: dict[str, Any]
) -> None:
    """A piece is free for a new name if it is a special token that plays no part; text never produces it then."""
    if index not in added or not added[index]["special"]:
        raise ValueError(f"piece {index} is {piece!r}, a piece of ordinary text; it cannot become {IMAGE_TOKEN}")
    roles = [key for key, value in settings.items() if key.endswith("_token") and piece in (value, _content(value))]
    if piece in json.dumps(contents["post_processor"], ensure_ascii=False):
        roles.append("post_processor")
    if piece in settings.get("chat_template", ""):
        roles.append("chat_template")
    if roles:
        raise ValueError(f"piece {index} is {piece!r}, in use as {', '.join(roles)}; it cannot become {IMAGE_TOKEN}")


def _content(value: Any) -> Any:
    return value["content"] if isinstance(value, dict) else None


def _new_name(old: str, expected: dict[str, tuple[int, ...]]) -> str:
    new = old
    for pattern, replacement in _RENAMES:
        new = pattern.sub(replacement, new)
    if new not in expected:  # the only expert of a dense layer
        new = new.replace(".feed_forward.experts.0.", ".feed_forward.")
    return new


def _tower(source: Path, original: dict[str, Any], vision_tower: str | Path | None, has_weights: bool) -> Path | str:
    """The folder of the CLIP tower, or its name where that is known and nothing has to be read for it."""
    name = vision_tower or original.get("mm_vision_tower")
    if name is None:
        raise ValueError(f"{source} names no vision tower; name one (--vision-tower)")
    if vision_tower is None and Path(name).is_absolute():
        # A path of the author's machine says nothing here, even where something happens to lie under it.
        raise ValueError(f"mm_vision_tower is the path {name} of another machine; name the tower (--vision-tower)")
    if vision_tower is None and (source / name).is_dir():
        return source / name
    if has_weights and str(name) in KNOWN_TOWERS:
        return str(name)
    return local_folder(name, ["*.json"] if has_weights else ["*.json", "*.safetensors", "pytorch_model*.bin"])


def _vision_config(tower: Path) -> CLIPVisionConfig:
    if not (tower / "config.json").is_file():
        raise ValueError(f"{tower} holds no config.json, so it is no vision tower")
    return CLIPVisionConfig.from_pretrained(tower)


def _image_processor(tower: Path | str, vision_config: CLIPVisionConfig) -> LlavaImageProcessorPil:
    """The tower's own preprocessing, after padding to a square."""
    settings: dict[str, Any] = {
        "size": {"shortest_edge": vision_config.image_size},
        "crop_size": {"height": vision_config.image_size, "width": vision_config.image_size},
    }
    if isinstance(tower, Path) and (tower / "preprocessor_config.json").is_file():
        stored = json.loads((tower / "preprocessor_config.json").read_text())
        names = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor", "do_center_crop")
        settings |= {name: stored[name] for name in names if name in stored}
    return LlavaImageProcessorPil(do_pad=True, **settings)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if path.suffix == ".safetensors":
        return tensor_shapes(path)
    # On the meta device names and shapes are read and the data is not.
    stored = torch.load(path, map_location="meta", weights_only=True)
    return {name: tuple(tensor.shape) for name, tensor in stored.items()}


def _read(path: Path, plan: dict[str, str]) -> dict[str, torch.Tensor]:
    """The planned tensors of one file under their new names."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {new: file.get_tensor(old) for old, new in plan.items()}
    stored = torch.load(path, map_location="cpu", weights_only=True)
    # A copy each: tensors may share one buffer in such a file, which safetensors rightly refuses.
    return {new: stored.pop(old).clone(memory_format=torch.contiguous_format) for old, new in plan.items()}


def _write_weights(plans: dict[Path, dict[str, str]], folder: Path) -> None:
    """One file for each original one, and the index where there is more than one."""
    names = [WEIGHTS]
    if len(plans) > 1:
        names = [f"model-{number:05}-of-{len(plans):05}.safetensors" for number in range(1, len(plans) + 1)]
    weight_map: dict[str, str] = {}
    total_size = 0
    for (path, plan), name in zip(tqdm(plans.items(), desc="Converting", unit="file"), names, strict=True):
        tensors = _read(path, plan)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
        logger.info("%s -> %s, %d tensors", path.name, name, len(tensors))
        del tensors  # before the next file is read
    if len(names) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n")
