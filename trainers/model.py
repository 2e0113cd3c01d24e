"""The model of a recipe: loaded, or built with random weights, and frozen wherever the recipe does not train it."""

from dataclasses import dataclass, field

from torch import nn

from longllava.modeling_longllava import LongLlavaForConditionalGeneration
from longllava.processing import LongLlavaProcessor

PARTS = ("vision_tower", "projector", "language_model")


@dataclass
class ModelArguments:
    """Which model a recipe starts from, and which of its parts it trains."""

    model_name_or_path: str = field(metadata={"help": "Folder or hub id of the model and its processor."})
    train: list[str] = field(default_factory=list, metadata={"help": f"Parts to train, among {', '.join(PARTS)}."})
    restart: list[str] = field(default_factory=list, metadata={"help": "Parts that start at random all the same."})


def load_model(arguments: ModelArguments) -> tuple[LongLlavaForConditionalGeneration, LongLlavaProcessor]:
    """The model, with `requires_grad` as the recipe says, and its processor.

    Raises:
        ValueError: the recipe trains nothing, or names a part that does not exist.
    """
    processor = LongLlavaProcessor.from_pretrained(arguments.model_name_or_path)
    model = LongLlavaForConditionalGeneration.from_pretrained(arguments.model_name_or_path)
    if arguments.restart:
        fresh = _modules(LongLlavaForConditionalGeneration(model.config))
        for name in _known(arguments.restart):
            for module, new in zip(_modules(model)[name], fresh[name], strict=True):
                module.load_state_dict(new.state_dict())
    set_trained_parts(model, arguments.train)
    return model, processor


def _modules(model: LongLlavaForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """The modules of every part; the output embedding belongs to the language model."""
    return {
        "vision_tower": [model.model.vision_tower],
        "projector": [model.model.multi_modal_projector],
        "language_model": [model.model.language_model, model.lm_head],
    }


def _known(names: list[str]) -> list[str]:
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ValueError(f"the recipe names {', '.join(unknown)}; the parts of the model are {', '.join(PARTS)}")
    return names


def set_trained_parts(model: LongLlavaForConditionalGeneration, train: list[str]) -> None:
    """Let exactly the named parts of the model learn.

    Raises:
        ValueError: no part is named, or one that does not exist.
    """
    if not train:
        raise ValueError(f"the recipe trains nothing: `train` takes one or more of {', '.join(PARTS)}")
    model.requires_grad_(False)
    for name in _known(train):
        for module in _modules(model)[name]:
            module.requires_grad_(True)


def parameter_table(model: LongLlavaForConditionalGeneration) -> str:
    """Trained and frozen parameters by part, one line each; a weight shared by two modules counts once."""
    lines = [f"{'part':<16}{'trained':>14}{'frozen':>14}"]
    for name, modules in _modules(model).items():
        parameters = {id(weight): weight for module in modules for weight in module.parameters()}.values()
        trained = sum(weight.numel() for weight in parameters if weight.requires_grad)
        frozen = sum(weight.numel() for weight in parameters if not weight.requires_grad)
        lines.append(f"{name:<16}{trained:>14,}{frozen:>14,}")
    return "\n".join(lines)
