"""The pocket model before training: its configuration, its tokenizer and its processor.

`python -m longllava.trainers.pocket FOLDER` writes them without weights; `longllava.trainers.tower` starts there.
"""

import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import GenerationConfig, LlavaImageProcessorPil, PreTrainedTokenizerFast

from longllava.evaluation.pocket_tasks import COLOURS, COUNTED, QUESTIONS, SIDE
from longllava.modeling_longllava import LongLlavaConfig
from longllava.processing import LongLlavaProcessor

PATCH = 14
VOCABULARY = 448
SPECIAL = ("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<image>")  # ids 0 to 3
PROTOCOL = ("<|User|>", "<|Assistant|>", "<img>", "</img>", "<vid>", "</vid>", "<t>")  # one token each, plain text


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over any text, whose merges come from the tasks' own sentences."""
    sentences = [
        text.format(colour=colour, digit=COUNTED)
        for texts in QUESTIONS.values()
        for text in texts
        for colour in COLOURS
    ]
    sentences += [f"a {colour} {digit}, {digit} and {digit}" for colour in COLOURS for digit in range(10)]
    sentences += ["nothing", "What do you see?", ", ".join(COLOURS), "The picture, the video and the sheet."]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = VOCABULARY - len(PROTOCOL)
    tokenizer.train_from_iterator(
        sentences, BpeTrainer(vocab_size=size, special_tokens=reserved, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in PROTOCOL])
    pad, start, end, _ = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=pad, clean_up_tokenization_spaces=False
    )


def build_config() -> LongLlavaConfig:
    """A LongLLaVA of 1.76 million parameters: every part of the large one, one attention layer to seven Mamba."""
    vision = {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": SIDE, "patch_size": PATCH, "projection_dim": 128,
    }  # fmt: skip
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "attn_layer_period": 8, "attn_layer_offset": 4, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 1, "mamba_dt_rank": 8, "initializer_range": 0.05,
        "router_aux_loss_coef": 0.0, "tie_word_embeddings": True, "max_position_embeddings": 16384,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    # the large tower skips its last layer, trained for another loss; this one is trained here and uses them all
    return LongLlavaConfig(
        vision_config=vision, text_config=text, image_token_id=3, vision_feature_layer=-1, tokens_per_image=4,
        vision_batch_size=128, tie_word_embeddings=True,
    )  # fmt: skip


def build_processor() -> LongLlavaProcessor:
    """Pictures of `SIDE` pixels; mean and deviation are those of the dark paper that the digits are drawn on."""
    image_processor = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.2, 0.2, 0.2],
        image_std=[0.3, 0.3, 0.3],
    )
    return LongLlavaProcessor(image_processor, build_tokenizer(), patch_size=PATCH, tokens_per_image=4, max_tiles=16)


def build_pocket(folder: Path) -> None:
    """Write configuration, tokenizer and processor, but no weights, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    build_config().save_pretrained(folder)
    generation = GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, max_new_tokens=64, do_sample=False, suppress_tokens=[3]
    )  # an image token that the model wrote itself would have no picture
    generation.save_pretrained(folder)
    build_processor().save_pretrained(folder)


if __name__ == "__main__":
    build_pocket(Path(sys.argv[1]))
