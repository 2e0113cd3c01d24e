"""The data of a recipe: rows drawn on demand from a mixture of tasks, and the collator that makes tensors of them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from longllava.evaluation.pocket_tasks import make_row
from longllava.processing import LongLlavaProcessor


@dataclass
class DataArguments:
    """What a recipe trains on, and how often it looks at validation rows."""

    mixture: list[dict] = field(
        default_factory=list,
        metadata={"help": "Tasks: {task, pictures: [a, b, ...], questions, weight}; one is drawn for every batch."},
    )
    accuracy_steps: int = field(default=500, metadata={"help": "Steps between two looks at the held-out accuracy."})
    accuracy_rows: int = field(default=48, metadata={"help": "Validation rows per task and number of pictures."})


class Mixture:
    """Row `index` of a training run, a pure function of the recipe: `mixture(3)`.

    All rows of one batch have the same task and the same number of pictures, so that hardly any token is padding.
    """

    def __init__(self, mixture: list[dict], seed: int, batch_size: int):
        if not mixture:
            raise ValueError("the recipe has no data: `mixture` names no task")
        self.mixture, self.seed, self.batch_size = mixture, seed, batch_size
        weights = np.array([entry.get("weight", 1.0) for entry in mixture], dtype=float)
        self.weights = weights / weights.sum()

    def __call__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, index // self.batch_size])
        entry = self.mixture[int(rng.choice(len(self.mixture), p=self.weights))]
        pictures = int(rng.choice(entry["pictures"]))
        return make_row(entry["task"], "train", self.seed, index, pictures, entry.get("questions", 1))


def build_dataset(mixture: Mixture, rows: int) -> Dataset:
    """`rows` rows of a mixture as a `Dataset` that holds their numbers only and draws each when it is asked for."""

    def draw(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        drawn = [mixture(index) for index in batch["index"]]
        return {key: [row[key] for row in drawn] for key in ("messages", "images", "sub_images")}

    return Dataset.from_dict({"index": range(rows)}).with_transform(draw)


def fill_pictures(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row, whose blocks `{"type": "image"}` get the pictures of the column `images`, in order.

    A row whose blocks hold their pictures themselves stays as it is. Keys that a table fills with None are left out.

    Raises:
        ValueError: there are not as many pictures as blocks that wait for one.
    """
    messages = []
    for message in row["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = [{key: value for key, value in block.items() if value is not None} for block in content]
        messages.append({**message, "content": content})
    blocks = [block for message in messages for block in message["content"] if isinstance(block, dict)]
    waiting = [block for block in blocks if block == {"type": "image"}]
    pictures = list(row.get("images") or [])
    if waiting and len(waiting) != len(pictures):
        raise ValueError(f"a row has {len(waiting)} image blocks, but {len(pictures)} images")
    for block, picture in zip(waiting, pictures, strict=False):
        block["image"] = picture
    return messages


class Collator:
    """Rows -> model inputs with labels, by the protocol's rule for answers and their ends.

    A row has `messages`, with pictures inside or in a column `images`, and if it likes `sub_images`.
    """

    def __init__(self, processor: LongLlavaProcessor):
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = self.processor.apply_chat_template(
            [fill_pictures(row) for row in rows],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            padding_side="right",
            sub_images=[bool(row.get("sub_images")) for row in rows],
        )
        labels = self.processor.build_labels(inputs["input_ids"], inputs.pop("assistant_masks"))
        return {**inputs, "labels": labels}
