"""The vision tower's own training: what it writes, and that the pictures say what their classes say."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

from longllava.evaluation.pocket_tasks import COLOURS
from longllava.modeling_longllava import LongLlavaForConditionalGeneration
from longllava.processing import LongLlavaProcessor
from longllava.trainers.pocket import build_pocket
from longllava.trainers.tower import NO_FRAME, NOTHING, draw_batch, train_tower


def test_a_few_steps_learn_and_write_a_whole_model(tmp_path: Path) -> None:
    build_pocket(tmp_path / "start")
    accuracy = train_tower(tmp_path / "start", tmp_path / "tower", steps=60)
    assert accuracy > 0.1  # digit and colour, or nothing and no frame: chance is near 2 %
    model = LongLlavaForConditionalGeneration.from_pretrained(tmp_path / "tower")
    projector = model.model.multi_modal_projector
    assert projector.linear_2.out_features == model.config.text_config.hidden_size  # not the reader's
    assert LongLlavaProcessor.from_pretrained(tmp_path / "tower").tokens_per_image == 4


def test_classes_are_what_the_pictures_show() -> None:
    pictures, digits, colours = draw_batch("validation", 64, np.random.default_rng(0))
    for picture, digit, colour in zip(pictures, digits, colours, strict=True):
        pixels = np.asarray(picture)
        if colour == NO_FRAME:
            assert tuple(pixels[0, 0]) not in COLOURS.values()
            assert (pixels.max() > 100) == (digit != NOTHING)
        else:
            assert tuple(pixels[0, 0]) == list(COLOURS.values())[colour]
    assert {NO_FRAME} < set(colours) and NOTHING in digits
