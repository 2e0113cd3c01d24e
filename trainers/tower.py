"""The pocket model's vision tower, trained before anything else: LongLLaVA starts from a pretrained CLIP tower.

    python -m longllava.trainers.tower spaces_demo/pocket runs/pocket_0_tower

Takes the configuration and the processor of a folder and writes them with weights: a tower whose every pooled token
tells the digit and the frame's colour of its picture through one linear layer, everything else at random. Through the
language model the same pictures would take many times longer to learn to read.
"""

import logging
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from longllava.evaluation.pocket_tasks import COLOURS, draw_corner, draw_pictures, load_scans, split_scans
from longllava.modeling_longllava import LongLlavaConfig, LongLlavaForConditionalGeneration
from longllava.processing import LongLlavaProcessor

logger = logging.getLogger(__name__)

STEPS, BATCH_SIZE, LEARNING_RATE, WARMUP = 5000, 64, 1e-3, 100
CORNERS = 0.25  # share of pictures that look like the tile of a sheet
NOTHING, NO_FRAME = 10, len(COLOURS)  # the classes after the digits and after the colours


def draw_batch(split: str, size: int, rng: np.random.Generator) -> tuple[list[Image.Image], np.ndarray, np.ndarray]:
    """Pictures of random digits, their digits (size,) and their frames' colours (size,) as class numbers."""
    augment = split == "train"
    digits, colours = rng.integers(0, 10, size), rng.integers(0, len(COLOURS), size)
    scans = load_scans()[0][[rng.choice(split_scans(split)[digit]) for digit in digits]]
    pixels = draw_pictures(scans, [list(COLOURS)[colour] for colour in colours], rng, augment)
    for place in np.flatnonzero(rng.random(size) < CORNERS):
        empty = rng.random() < 0.2
        pixels[place] = draw_corner(None if empty else scans[place], rng, augment)
        digits[place], colours[place] = NOTHING if empty else digits[place], NO_FRAME
    return [Image.fromarray(picture) for picture in pixels], digits, colours


class Reader(nn.Module):
    """Digit and colour from every pooled token of a picture; only the tower is kept."""

    def __init__(self, model: LongLlavaForConditionalGeneration):
        super().__init__()
        self.inner = model.model
        heads = nn.Linear(model.config.vision_config.hidden_size, NOTHING + NO_FRAME + 2)
        self.inner.register_module("multi_modal_projector", heads)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 3, S, S) -> logits of digits (N, tokens, 11) and of colours (N, tokens, colours + 1)."""
        logits = torch.stack(self.inner.get_image_features(pixel_values).pooler_output)
        return logits[..., : NOTHING + 1], logits[..., NOTHING + 1 :]


def train_tower(source: Path, target: Path, steps: int = STEPS, seed: int = 0) -> float:
    """Train the tower of the configuration in `source` and write the whole model to `target`.

    Returns:
        The share of validation pictures whose digit and colour are both read right by the mean of the tokens.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    processor = LongLlavaProcessor.from_pretrained(source)
    model = LongLlavaForConditionalGeneration(LongLlavaConfig.from_pretrained(source))
    # CLIP's own 0.02 is far below the size of the patches' embeddings: a tower that starts there takes long to notice
    # where a patch lies
    nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.5)
    projector = model.model.multi_modal_projector
    reader = Reader(model)
    trained = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=min(0.5, WARMUP / steps), cycle_momentum=False
    )
    begun = time.monotonic()
    for step in range(1, steps + 1):
        pictures, digits, colours = draw_batch("train", BATCH_SIZE, rng)
        digit_logits, colour_logits = reader(processor(images=pictures)["pixel_values"])
        tokens = digit_logits.shape[1]
        loss = F.cross_entropy(digit_logits.flatten(0, 1), torch.from_numpy(digits).repeat_interleave(tokens))
        loss = loss + F.cross_entropy(colour_logits.flatten(0, 1), torch.from_numpy(colours).repeat_interleave(tokens))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            accuracy = read_accuracy(reader, processor)
            minutes = (time.monotonic() - begun) / 60
            logger.info("step %d, %.1f min: loss %.3f, validation %.1f %%", step, minutes, loss, 100 * accuracy)
    model.model.multi_modal_projector = projector
    model.save_pretrained(target)
    processor.save_pretrained(target)
    return accuracy


@torch.no_grad()
def read_accuracy(reader: Reader, processor: LongLlavaProcessor, size: int = 512) -> float:
    """Share of validation pictures whose digit and colour are both right."""
    pictures, digits, colours = draw_batch("validation", size, np.random.default_rng(1))
    digit_logits, colour_logits = reader(processor(images=pictures)["pixel_values"])
    right_digit = digit_logits.log_softmax(-1).mean(1).argmax(-1).numpy() == digits
    right_colour = colour_logits.log_softmax(-1).mean(1).argmax(-1).numpy() == colours
    return float((right_digit & right_colour).mean())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train_tower(Path(sys.argv[1]), Path(sys.argv[2]))
