"""Supervised fine-tuning of LongLLaVA by a recipe.

    python -m longllava.trainers.sft --config recipes/pocket_1_align.yaml

Every stage is this file with another YAML; anything on the command line wins over the YAML, for example
`--max_steps 100 --output_dir runs/try`. A run that was stopped goes on with `--resume_from_checkpoint true`. Rows are
never cut, so that no picture is: there is no `--max_length`.
"""

import logging
import sys
import time

from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer, TrlParser

from longllava.evaluation.pocket import measure
from longllava.modeling_longllava import LongLlavaForConditionalGeneration
from longllava.processing import LongLlavaProcessor
from longllava.trainers.data import Collator, DataArguments, Mixture, build_dataset
from longllava.trainers.model import ModelArguments, load_model, parameter_table

logger = logging.getLogger(__name__)


class HeldOutAccuracy(TrainerCallback):
    """Answers to validation questions while the model learns: what the loss does not tell."""

    def __init__(self, mixture: Mixture, processor: LongLlavaProcessor, arguments: DataArguments):
        pairs = {(entry["task"], max(entry["pictures"])) for entry in mixture.mixture}
        self.tasks = sorted(pairs)
        self.processor, self.arguments = processor, arguments

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.arguments.accuracy_steps and state.global_step != state.max_steps:
            return
        model.eval()
        found = measure(model, self.processor, self.tasks, self.arguments.accuracy_rows, split="validation")
        model.train()
        state.log_history.append({"step": state.global_step, "accuracy": found})
        logger.info("step %d: %s", state.global_step, "  ".join(f"{k} {v:.1%}" for k, v in found.items()))


class Trainer(SFTTrainer):
    """TRL's trainer, resumed with all weights."""

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # files hold one tensor per expert, the model one for all of a layer; transformers' trainer does not convert
        # them here and would leave the experts, with a warning, as they were before the first step
        saved = LongLlavaForConditionalGeneration.from_pretrained(resume_from_checkpoint)
        self.model.load_state_dict(saved.state_dict())


def main(args: list[str] | None = None) -> None:
    """Train as the recipe says and write model and processor to its `output_dir`.

    Args:
        args: command-line arguments, `sys.argv[1:]` if None.
    """
    parser = TrlParser((ModelArguments, DataArguments, SFTConfig))
    # What a recipe need not say: the rows are drawn at random already, in groups of one batch, so they are taken in
    # order; and labels are made by our collator from whole conversations, so nothing may be cut or renamed on the way.
    parser.set_defaults(train_sampling_strategy="sequential", remove_unused_columns=False, max_length=None)
    model_arguments, data_arguments, config = parser.parse_args_and_config(args)
    if config.max_steps < 1:
        raise ValueError(f"max_steps is {config.max_steps}, but a recipe says how many steps it takes, at least 1")
    if config.max_length is not None:
        raise ValueError(f"max_length is {config.max_length}, but rows are never cut: leave it out")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    set_seed(config.seed)
    model, processor = load_model(model_arguments)
    logger.info("\n%s", parameter_table(model))

    mixture = Mixture(data_arguments.mixture, config.seed, config.per_device_train_batch_size)
    batches = config.max_steps * config.gradient_accumulation_steps * config.world_size
    rows = batches * config.per_device_train_batch_size
    trainer = Trainer(
        model=model,
        args=config,
        train_dataset=build_dataset(mixture, rows),
        processing_class=processor,
        data_collator=Collator(processor),
        callbacks=[HeldOutAccuracy(mixture, processor, data_arguments)],
    )
    begun = time.monotonic()
    resume = config.resume_from_checkpoint
    trainer.train(get_last_checkpoint(config.output_dir) if resume == "true" else resume)
    trainer.save_model()
    trainer.save_state()
    logger.info("%d steps in %.1f minutes", trainer.state.global_step, (time.monotonic() - begun) / 60)


if __name__ == "__main__":
    main()
