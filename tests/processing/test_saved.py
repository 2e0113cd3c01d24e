"""Saving and loading: as this package's class, and as remote code in a process that does not know this package."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from longllava.processing import LongLlavaProcessor

SETTINGS = {
    "patch_size": 28,
    "tokens_per_image": 1,
    "tokens_per_frame": 4,
    "max_tiles": 5,
    "max_frames": 6,
    "image_token": "<image>",
}

CLEAN_PROCESS = """
import sys

# PyAV is a requirement of video files only; a picture must not need it.
sys.modules["av"] = None
import numpy as np
from PIL import Image
from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules"), type(processor).__module__
assert not any(name.startswith("longllava") for name in sys.modules)
picture = Image.fromarray(np.arange(60 * 130 * 3, dtype=np.uint32).astype(np.uint8).reshape(60, 130, 3))
content = [
    {"type": "image", "image": picture},
    {"type": "video", "video": [picture] * 8},
    {"type": "text", "text": "What?"},
]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}, {"role": "assistant", "content": "This."}],
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
    return_assistant_tokens_mask=True,
    sub_images=True,
)
inputs["labels"] = processor.build_labels(inputs["input_ids"], inputs["assistant_masks"])
np.savez(sys.argv[2], **inputs)
processor.save_pretrained(sys.argv[3])
"""


def inputs_of(processor: LongLlavaProcessor, folder: Path) -> dict[str, np.ndarray]:
    code = CLEAN_PROCESS.split("picture = ")[1].split("np.savez")[0]
    scope = {"processor": processor, "np": np, "Image": Image}
    exec("picture = " + code, scope)
    return {name: np.asarray(value) for name, value in scope["inputs"].items()}


def test_settings_and_template_survive(tmp_path: Path, tiny_processor: Callable) -> None:
    processor = tiny_processor(**SETTINGS, chat_template="{{ messages[0].content }}!")
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == processor.chat_template
    stored = json.loads((tmp_path / "processor_config.json").read_text())
    assert {name: stored[name] for name in SETTINGS} == SETTINGS
    assert stored["auto_map"] == {"AutoProcessor": "processing_longllava.LongLlavaProcessor"}

    loaded = LongLlavaProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in SETTINGS} == SETTINGS
    assert loaded.apply_chat_template([{"role": "user", "content": "a"}]) == "a!"
    assert loaded.to_dict() == {name: value for name, value in processor.to_dict().items() if name != "auto_map"}


def test_flat_folder_works_in_a_clean_process(tmp_path: Path, tiny_processor: Callable) -> None:
    """AutoProcessor and remote code give the same tensors; so does what it saves, loaded once more."""
    folder, again = tmp_path / "saved", tmp_path / "again"
    tiny_processor(max_frames=6).save_pretrained(folder)
    assert {path.name for path in folder.glob("*.py")} == {
        "processing_longllava.py",
        "picture_reading_longllava.py",
        "picture_stream_longllava.py",
        "video_reading_longllava.py",
    }
    expected = inputs_of(LongLlavaProcessor.from_pretrained(folder), tmp_path)
    assert set(expected) == {
        "input_ids",
        "attention_mask",
        "pixel_values",
        "image_grid_hw",
        "assistant_masks",
        "labels",
    }
    assert len(expected["pixel_values"]) == 1 + 6 + 6  # picture, its 2 x 3 tiles, frames
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    for source in (folder, again):
        command = [sys.executable, "-c", CLEAN_PROCESS, str(source), str(tmp_path / "found.npz"), str(again)]
        subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=120)
        with np.load(tmp_path / "found.npz") as found:
            assert set(found) == set(expected)
            for name, value in expected.items():
                np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_image_processor_must_pad_and_be_square(tiny_processor: Callable) -> None:
    processor = tiny_processor()
    image_processor = type(processor.image_processor)
    square = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    for settings in (
        {"do_pad": False, **square},
        {"do_pad": True, **square, "size": {"shortest_edge": 64}},
        {"do_pad": True, **square, "crop_size": {"height": 56, "width": 28}},
    ):
        with pytest.raises(ValueError, match="must pad to a square"):
            LongLlavaProcessor(image_processor(**settings), processor.tokenizer, tokens_per_image=4)


def test_collator_of_trl(tiny_processor: Callable) -> None:
    """TRL's own collator for pictures: columns images and messages, its mask of the answers, the same ids."""
    collators = pytest.importorskip("trl.trainer.sft_trainer", reason="TRL is not installed (extra: train)")
    processor = tiny_processor()
    pictures = [Image.new("RGB", (56, 56), color) for color in ("red", "green", "blue")]
    rows = [
        {
            "images": pictures[:count],
            "messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": answer}],
        }
        for count, answer in ((1, "one"), (2, "two and more"))
    ]
    batch = collators.DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)(rows)
    assert batch["pixel_values"].shape[0] == batch["image_grid_hw"].shape[0] == 3
    taught = [[label for label in row if label != -100] for row in batch["labels"].tolist()]
    assert processor.batch_decode(taught) == ["one<|endoftext|>", "two and more<|endoftext|>"]
    assert batch["input_ids"].dtype == torch.int64


def test_pipeline(tiny_folder: Path) -> None:
    """Chat, and text with a picture, through pipeline("image-text-to-text") on a random model."""
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=str(tiny_folder), trust_remote_code=True, device="cpu")
    picture = Image.new("RGB", (60, 40), "red")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]
    chat = [{"role": "user", "content": content}]
    answer = pipe(text=chat, max_new_tokens=3, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)
    answers = pipe(text=[chat, chat], max_new_tokens=3, return_full_text=False)
    assert [entry[0]["generated_text"] for entry in answers] == [answer[0]["generated_text"]] * 2
    plain = pipe(images=picture, text="<img><image></img>\nWhat?", max_new_tokens=3, return_full_text=False)
    assert isinstance(plain[0]["generated_text"], str)
