"""The folder that goes to the Hub: writing it (`export_model`) and uploading it (`push_model`).

Such a folder is flat and complete: safetensors with one tensor per expert, the configuration with an `auto_map`, the
processor, and the Python files that `trust_remote_code=True` runs; this package need not be installed to use it.
`model.save_pretrained` and `processor.save_pretrained` into one folder write the same. What an export adds is the
model card, the check that every tensor is there, and that no weights pass through memory.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from safetensors import safe_open
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files

from longllava.processing import LongLlavaProcessor, processing_longllava

from . import modeling_longllava
from .configuration_longllava import LongLlavaConfig
from .modeling_longllava import LongLlavaForConditionalGeneration

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
tags:
- longllava
- jamba
- mamba
- multimodal
- video
- long-context
---

# {name}

LongLLaVA answers questions about text, a picture, hundreds of pictures, long videos and very large images. Its
language model is a hybrid: {attention} of {layers} layers are attention, the others are Mamba, and {experts}.
A picture costs {tokens} tokens by default. Paper: [LongLLaVA](https://arxiv.org/abs/2409.02889).

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True, dtype="auto")
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
pictures = [{{"type": "image", "path": path}} for path in ("first.png", "second.png")]
question = {{"type": "text", "text": "What is different between the two pictures?"}}
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": [*pictures, question]}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(model.device, dtype=model.dtype)
answer = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```
"""


def local_folder(source: str | Path, allow_patterns: Iterable[str]) -> Path:
    """`source` itself where it is a folder, else the Hub repository of that id, downloaded as far as the patterns say.

    Raises:
        FileNotFoundError: `source` is neither a folder nor spelled like an id.
    """
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise FileNotFoundError(f"{source} is no folder and no Hub id (owner/name)")
    return Path(snapshot_download(str(source), allow_patterns=list(allow_patterns)))


@contextmanager
def new_folder(dst: str | Path) -> Iterator[Path]:
    """A folder to write into, renamed to `dst` at the end of the block and removed if the block does not reach it.

    A process that is killed leaves `.NAME.partial-PID` behind, which nothing mistakes for a model.

    Raises:
        FileExistsError: `dst` is a file or a folder with something in it.
    """
    dst = Path(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise FileExistsError(f"{dst} exists and is not an empty folder")
    partial = dst.absolute().parent / f".{dst.absolute().name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        yield partial
        if dst.exists():
            dst.rmdir()
        partial.rename(dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def expected_tensors(config: LongLlavaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a complete folder of this configuration; no weights are allocated.

    In memory transformers fuses the experts of a layer: gate_up_proj (experts, 2 * inner, hidden) and down_proj
    (experts, hidden, inner). In files each expert has its own gate_proj, up_proj and down_proj, as the Hub and vLLM
    want them, and transformers converts in both directions for the native JambaModel inside ours.
    """
    with torch.device("meta"):
        model = LongLlavaForConditionalGeneration(config)
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        layer, _, fused = name.rpartition(".experts.")
        if not layer:
            expected[name] = tuple(tensor.shape)
            continue
        experts, rows, columns = tensor.shape
        parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
        for expert in range(experts):
            for part in parts:
                expected[f"{layer}.experts.{expert}.{part}.weight"] = (rows // len(parts), columns)
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]  # stored once, as the embedding
    return expected


def check_tensors(found: dict[str, tuple[int, ...]], config: LongLlavaConfig) -> None:
    """Compares names and shapes with `expected_tensors`.

    Raises:
        ValueError: names that are missing, that are not part of the model, or whose shapes differ, all of them listed.
    """
    expected = expected_tensors(config)
    problems = [f"  missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    for name, shape in found.items():
        if name not in expected:
            problems.append(f"  not part of the model: {name} {shape}")
        elif shape != expected[name]:
            problems.append(f"  {name} has shape {shape}, the configuration says {expected[name]}")
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit the configuration:\n" + "\n".join(problems))


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in one safetensors file, read from its header."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)


def weight_files(folder: Path, weights: str = WEIGHTS) -> list[Path]:
    """The files that hold the weights, in order: those named by the index, else the single file, else none.

    Raises:
        FileNotFoundError: the index names files that are not there; all of them are listed.
    """
    index = folder / f"{weights}.index.json"
    if not index.is_file():
        return [folder / weights] if (folder / weights).is_file() else []
    files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise FileNotFoundError(f"{index} names {len(files)} files, {len(absent)} are not there: {', '.join(absent)}")
    return files


def write_hub_files(
    folder: Path, config: LongLlavaConfig, processor: LongLlavaProcessor, generation: GenerationConfig, name: str
) -> None:
    """Writes everything but the weights: configurations, processor, code and, where there is none, the model card."""
    config.architectures = [LongLlavaForConditionalGeneration.__name__]
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    for key in ("is_local", "local_files_only"):  # how it was loaded here, which transformers would write down
        processor.tokenizer.init_kwargs.pop(key, None)
    processor.save_pretrained(folder)
    # The two entry files and whatever they import from beside them, the way save_pretrained finds it.
    for entry in (modeling_longllava.__file__, processing_longllava.__file__):
        for path in [entry, *get_relative_import_files(entry)]:
            shutil.copyfile(path, folder / Path(path).name)
    if not (folder / "README.md").exists():
        text = config.text_config
        experts = (
            f"one layer in {text.expert_layer_period} chooses {text.num_experts_per_tok} of {text.num_experts} experts"
        )
        card = _CARD.format(
            name=name,
            attention=text.layers_block_type.count("attention"),
            layers=text.num_hidden_layers,
            experts=experts if text.num_experts > 1 else "none has experts",
            tokens=config.tokens_per_image,
        )
        ModelCard(card).save(folder / "README.md")


def generation_config(folder: Path, config: LongLlavaConfig) -> GenerationConfig:
    """The folder's own generation_config.json, else one with the special tokens of the text configuration."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    text = config.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )


def export_model(model: str | Path, dst: str | Path) -> Path:
    """Writes the complete Hub folder of a model to `dst`; the weights are copied file by file and never loaded.

    Args:
        model: a folder in our layout, with or without Python code, or a Hub id.
        dst: a new or empty folder. It appears when it is complete.

    Raises:
        ValueError: not a LongLLaVA folder, no safetensors, or tensors that do not fit the configuration (listed).
        FileExistsError: `dst` is not empty.
    """
    with new_folder(dst) as folder:
        _export(model, folder, name=Path(dst).absolute().name, place=shutil.copyfile)
    return Path(dst)


def push_model(
    model: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    commit_message: str = "Upload LongLLaVA",
    token: str | None = None,
) -> str:
    """Creates the repository where there is none, uploads the complete folder in one commit; returns the address.

    Args:
        model: a folder in our layout, with or without Python code, or a Hub id.
        repo_id: `owner/name`, or `name` in the account of the token.
        private: who can see a repository that this call creates.
        token: by default the one that `hf auth login` stored.
    """
    with tempfile.TemporaryDirectory() as temporary:
        # Links, not copies: a checkpoint of 100 GB is read once, by the upload.
        folder = Path(temporary)
        _export(model, folder, name=repo_id, place=lambda source, target: os.symlink(source.resolve(), target))
        api = HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message=commit_message)
    return str(repository)


def _export(model: str | Path, folder: Path, name: str, place: Callable[[Path, Path], object]) -> None:
    source = local_folder(model, ["*.json", "*.jinja", "*.safetensors", "README.md", "LICENSE"])
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} holds no config.json, so it is no model folder")
    model_type = json.loads((source / "config.json").read_text()).get("model_type")
    if model_type != LongLlavaConfig.model_type:
        hint = "; `longllava convert` reads the original layout" if model_type == "llava_jamba" else ""
        raise ValueError(f"{source} is a {model_type} model, not {LongLlavaConfig.model_type}{hint}")
    weights = weight_files(source)
    if not weights:
        raise ValueError(f"{source} holds neither {WEIGHTS} nor {WEIGHTS_INDEX}; only safetensors go to the Hub")
    config = LongLlavaConfig.from_pretrained(source)
    check_tensors({name: shape for path in weights for name, shape in tensor_shapes(path).items()}, config)

    extras = [source / extra for extra in (WEIGHTS_INDEX, "README.md", "LICENSE") if (source / extra).is_file()]
    for path in [*weights, *extras]:
        place(path, folder / path.name)
    write_hub_files(
        folder, config, LongLlavaProcessor.from_pretrained(source), generation_config(source, config), name=name
    )
