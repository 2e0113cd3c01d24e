"""How well a model answers the pocket tasks on digits that it never saw.

    longllava evaluate pocket    # the shipped model, all tasks, test digits

Every answer goes the whole real way: processor, `generate`, decoding, and a comparison with the exact right answer.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from longllava.evaluation.pocket_tasks import MAX_ORDER, make_row
from longllava.modeling_longllava import LongLlavaForConditionalGeneration
from longllava.processing import LongLlavaProcessor

TASKS: tuple[tuple[str, int], ...] = (  # task and number of pictures or frames
    ("read", 1),
    ("framed", 4),
    ("framed", 8),
    ("framed", 16),
    ("framed", 32),
    ("count", 8),
    ("count", 16),
    ("order", 4),
    ("order", MAX_ORDER),
    ("first_last", 16),
    ("sheet", 1),
)
BATCH_SIZE = 16  # rows of one generation
EVALUATION_SEED = 2024


@torch.no_grad()
def answer(
    model: LongLlavaForConditionalGeneration, processor: LongLlavaProcessor, rows: list[dict[str, Any]]
) -> list[str]:
    """The model's answer to the first question of every row."""
    inputs = processor.apply_chat_template(
        [row["messages"][:1] for row in rows],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding_side="left",
        sub_images=[row["sub_images"] for row in rows],
    ).to(model.device)
    longest = max(len(processor.tokenizer(row["answer"])["input_ids"]) for row in rows)
    generated = model.generate(**inputs, max_new_tokens=longest + 2, do_sample=False)
    return processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def measure(
    model: LongLlavaForConditionalGeneration,
    processor: LongLlavaProcessor,
    tasks: tuple[tuple[str, int], ...] | list[tuple[str, int]] = TASKS,
    rows: int = 200,
    split: str = "test",
    seed: int = EVALUATION_SEED,
    progress: bool = False,
) -> dict[str, float]:
    """Share of exactly right answers, 0..1, under `task@pictures`.

    Args:
        tasks: pairs of task and number of pictures.
        rows: rows of every pair; the rows of a seed are always the same.
        split: whose digits, `test` or `validation`.
    """
    accuracies = {}
    with tqdm(total=rows * len(tasks), disable=not progress, unit="row") as bar:
        for task, pictures in tasks:
            bar.set_description(f"{task}, {pictures}")
            right = 0
            for start in range(0, rows, BATCH_SIZE):
                batch = [make_row(task, split, seed, i, pictures) for i in range(start, min(start + BATCH_SIZE, rows))]
                answers = answer(model, processor, batch)
                right += sum(found.strip() == row["answer"] for found, row in zip(answers, batch, strict=True))
                bar.update(len(batch))
            accuracies[f"{task}@{pictures}"] = right / rows
    return accuracies


def table(accuracies: dict[str, float], rows: int) -> str:
    """The accuracies as lines of a Markdown table."""
    lines = [f"| task | pictures | right of {rows} |", "|---|---:|---:|"]
    for name, accuracy in accuracies.items():
        task, pictures = name.split("@")
        lines.append(f"| {task} | {pictures} | {accuracy:.1%} |")
    return "\n".join(lines)


def evaluate_pocket(
    model_path: str | Path = "spaces_demo/pocket", rows: int = 1000, output: str | Path | None = None
) -> dict[str, float]:
    """Measure a folder's (or hub id's) model on all tasks with test digits; also into a JSON file if one is named."""
    processor = LongLlavaProcessor.from_pretrained(model_path)
    model = LongLlavaForConditionalGeneration.from_pretrained(model_path).eval()
    accuracies = measure(model, processor, TASKS, rows, progress=sys.stderr.isatty())
    if output is not None:
        Path(output).write_text(json.dumps({"rows": rows, "accuracy": accuracies}, indent=2) + "\n", encoding="utf-8")
    return accuracies


def write_examples(folder: str | Path, seed: int = 14) -> dict[str, tuple[str, str]]:
    """Pictures, a video and a big sheet of test digits as files: what `spaces_demo/examples` holds.

    Writes `picture_1.png` to `picture_4.png` (one of them in a red frame), `video.mp4` (16 frames, one per second) and
    `sheet.png` into `folder`.

    Returns:
        For `pictures`, `video` and `sheet` a question about the files and its right answer.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = make_row("framed", "test", seed, 0, 4)
    for number, picture in enumerate(pictures["images"], start=1):
        picture.save(folder / f"picture_{number}.png")
    video = make_row("first_last", "test", seed, 0, 16)
    write_video(folder / "video.mp4", video["images"])
    sheet = make_row("sheet", "test", seed, 0)
    sheet["images"][0].save(folder / "sheet.png")
    rows = {"pictures": pictures, "video": video, "sheet": sheet}
    return {name: (row["messages"][0]["content"][-1]["text"], row["answer"]) for name, row in rows.items()}


def write_video(path: Path, frames: list[Image.Image], fps: int = 1) -> None:
    """Frames of one size as an MPEG-4 file of high quality."""
    import av

    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        stream.bit_rate = 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
