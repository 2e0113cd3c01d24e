"""The recipes: what they train and refuse, that a run ends in a folder that loads and goes on where it stopped."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, List, Value

pytest.importorskip("sklearn")
pytest.importorskip("trl")

from longllava.evaluation.pocket_tasks import make_row
from longllava.modeling_longllava import LongLlavaForConditionalGeneration
from longllava.processing import LongLlavaProcessor
from longllava.trainers import sft
from longllava.trainers.data import Collator, Mixture, build_dataset
from longllava.trainers.model import PARTS, ModelArguments, load_model, parameter_table, set_trained_parts
from longllava.trainers.pocket import build_config, build_processor

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("pocket_*.yaml"))
MODULES = {
    "vision_tower": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "language_model": "model.language_model.",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pocket model with random weights, smaller still: the processor's sizes, one layer of the tower."""
    folder = tmp_path_factory.mktemp("pocket")
    config = build_config()
    config.vision_config.num_hidden_layers = 1
    torch.manual_seed(0)
    LongLlavaForConditionalGeneration(config).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


def recipe(folder: Path, tmp_path: Path, **changes) -> list[str]:
    """Arguments of a run of four steps of two rows."""
    settings = {
        "model_name_or_path": str(folder),
        "train": ["projector", "language_model"], "output_dir": str(tmp_path / "out"),
        "mixture": [{"task": "caption", "pictures": [2]}, {"task": "framed", "pictures": [3], "questions": 2}],
        "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "bf16": False,
        "gradient_checkpointing": False, "report_to": "none", "router_aux_loss_coef": 0.0, "accuracy_steps": 4,
        "accuracy_rows": 2, "disable_tqdm": True, "lr_scheduler_type": "constant", "use_cpu": True,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings | changes))
    return ["--config", str(path)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return LongLlavaForConditionalGeneration.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("train", [["projector"], ["vision_tower", "projector"], ["projector", "language_model"]])
def test_a_step_moves_exactly_the_named_parts(folder: Path, train: list[str]) -> None:
    model, processor = load_model(ModelArguments(str(folder), train))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    batch = Collator(processor)([make_row("framed", "train", 0, i, 4, 4) for i in range(4)])
    # without weight decay or momentum: what moves has a gradient
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    model(**batch).loss.backward()
    optimizer.step()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    named = {name for name in before if name.startswith(tuple(MODULES[part] for part in train))}
    assert moved <= named
    # the class token's last step and the last norm are not read; one of four experts may get no token
    still = {name for name in named - moved if "experts" not in name and "post_layernorm" not in name}
    assert not still


@pytest.mark.parametrize(("train", "message"), [([], "trains nothing"), (["projector", "head"], "names head")])
def test_a_recipe_that_trains_nothing_or_something_unknown_is_refused(folder, train, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(ModelArguments(str(folder), train))


def test_restart_draws_only_the_named_parts_anew(folder: Path) -> None:
    old = weights(folder)
    model, _ = load_model(ModelArguments(str(folder), ["projector"], restart=["projector"]))
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, old[name])}
    assert changed == {f"model.multi_modal_projector.linear_{n}.weight" for n in (1, 2)}


def test_parameter_table_counts_every_parameter_once(folder: Path) -> None:
    model, _ = load_model(ModelArguments(str(folder), ["language_model"]))
    rows = [line.replace(",", "").split() for line in parameter_table(model).splitlines()[1:]]
    assert [row[0] for row in rows] == list(PARTS)
    assert sum(int(row[1]) + int(row[2]) for row in rows) == sum(weight.numel() for weight in model.parameters())
    assert [int(row[1]) > 0 for row in rows] == [False, False, True]
    set_trained_parts(model, ["projector"])
    assert all(weight.requires_grad for weight in model.model.multi_modal_projector.parameters())


def test_labels_are_the_answers_and_their_ends(folder: Path) -> None:
    """Three turns: only answers are trained, each up to the end-of-text token, whatever the input holds there."""
    processor = LongLlavaProcessor.from_pretrained(folder)
    row = make_row("framed", "train", 0, 0, 4, 3)
    batch = Collator(processor)([row])
    answers = [message["content"][0]["text"] for message in row["messages"][1::2]]
    labels = batch["labels"][0]
    end = processor.tokenizer.eos_token
    assert processor.tokenizer.decode(labels[labels != -100]) == end.join(answers) + end
    assert batch["pixel_values"].shape == (4, 3, 56, 56)


def test_sheets_and_pictures_share_a_batch(folder: Path) -> None:
    """Only the sheet is shown as tiles: 1 + 12 pictures beside 2."""
    processor = LongLlavaProcessor.from_pretrained(folder)
    batch = Collator(processor)([make_row("sheet", "train", 0, 0), make_row("count", "train", 0, 0, 2)])
    pictures = (batch["input_ids"] == processor.image_token_id).sum(dim=1) // 4
    assert pictures.tolist() == [13, 2] and len(batch["pixel_values"]) == 15


def test_rows_with_their_pictures_in_a_column(folder: Path) -> None:
    """The form that TRL's users have: placeholders in the messages, pictures beside them, stored by `datasets`."""
    collate = Collator(LongLlavaProcessor.from_pretrained(folder))
    inside = [make_row("count", "train", 0, index, 2) for index in range(4)]
    column = []
    for row in inside:
        messages = []
        for message in row["messages"]:
            blocks = [{"type": block["type"], "text": block.get("text")} for block in message["content"]]
            messages.append({"role": message["role"], "content": blocks})
        column.append({"messages": messages, "images": row["images"]})
    block = {"type": Value("string"), "text": Value("string")}
    messages = List({"role": Value("string"), "content": List(block)})
    table = Dataset.from_list(column, features=Features({"messages": messages, "images": List(Image())}))
    expected, found = collate(inside), collate([table[index] for index in range(4)])
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    with pytest.raises(ValueError, match="2 image blocks, but 1 images"):
        collate([{**column[0], "images": column[0]["images"][:1]}])


@pytest.mark.parametrize(
    "change, message", [({"max_steps": -1}, "max_steps is -1"), ({"max_length": 64}, "max_length is 64")]
)
def test_a_recipe_that_cannot_be_followed_is_refused(folder, tmp_path, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        sft.main(recipe(folder, tmp_path, **change))


def test_rows_of_a_run_depend_on_their_number_only() -> None:
    mixture = Mixture([{"task": "caption", "pictures": [1, 2]}, {"task": "sheet", "pictures": [1]}], 7, 4)
    dataset = build_dataset(mixture, 12)
    once, again = dataset[5], dataset[[4, 5]]
    assert once["messages"] == again["messages"][1]
    for start in range(0, 12, 4):  # a batch never mixes sheets with others
        assert len({dataset[i]["sub_images"] for i in range(start, start + 4)}) == 1


def test_a_run_writes_a_folder_that_loads_and_resumes(folder: Path, tmp_path: Path) -> None:
    """Two steps, then two more from the checkpoint, are the same as four at once."""
    sft.main(recipe(folder, tmp_path, output_dir=str(tmp_path / "whole")))
    half = recipe(folder, tmp_path, max_steps=4)
    # the run is interrupted by taking its first checkpoint alone
    (tmp_path / "out").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "out" / "checkpoint-2")
    sft.main([*half, "--resume_from_checkpoint", "true"])
    whole, resumed, start = weights(tmp_path / "whole"), weights(tmp_path / "out"), weights(folder)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], start[name]) for name in whole)
    LongLlavaProcessor.from_pretrained(tmp_path / "out")
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any("accuracy" in entry for entry in history)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_ship_are_complete(path: Path) -> None:
    """Each recipe names what it trains and tasks that exist, and stage by stage starts from the last one's folder."""
    settings = yaml.safe_load(path.read_text())
    assert settings["train"] and set(settings["train"]) <= set(PARTS)
    for entry in settings["mixture"]:
        make_row(entry["task"], "train", 0, 0, max(entry["pictures"]), entry.get("questions", 1))
    place = RECIPES.index(path)
    if place > 0:
        assert settings["model_name_or_path"] == yaml.safe_load(RECIPES[place - 1].read_text())["output_dir"]
