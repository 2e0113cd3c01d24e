"""`longllava chat`: questions about pictures and videos, answered in the terminal.

A conversation keeps the model's cache between turns: a second question costs its own tokens only, however many
pictures came before it.
"""

import re
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import BatchFeature, Cache, TextStreamer

from longllava.modeling_longllava import LongLlavaForConditionalGeneration
from longllava.processing import LongLlavaProcessor

PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}


class Medium(NamedTuple):
    """A picture or a video of a conversation: `kind` is `image` or `video`, `source` a path or URL."""

    kind: str
    source: str


class Cost(NamedTuple):
    """What a medium takes of the window: `views` are its frames, or the picture itself and its tiles."""

    medium: Medium
    views: int
    tokens: int


def by_number(path: Path) -> list[str | int]:
    """Sort key under which picture 2 comes before picture 10: text and numbers in turn."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", path.name))]


def find_media(arguments: list[str]) -> list[Medium]:
    """Files, folders and URLs in the order given; a folder stands for the pictures and videos in it, by name.

    Raises:
        FileNotFoundError: nothing is at a path, or a folder holds neither pictures nor videos.
    """
    media = []
    for argument in arguments:
        path = Path(argument)
        if argument.startswith(("http://", "https://")):
            suffix = Path(argument.partition("?")[0]).suffix.lower()
            media.append(Medium("video" if suffix in VIDEOS else "image", argument))
            continue
        if path.is_dir():
            files = [file for file in path.iterdir() if file.suffix.lower() in PICTURES | VIDEOS]
            # Some systems keep a hidden file beside each picture, with its suffix.
            files = sorted((file for file in files if not file.name.startswith(".")), key=by_number)
            if not files:
                raise FileNotFoundError(f"the folder {argument} holds neither pictures nor videos")
        elif path.is_file():
            files = [path]
        else:
            raise FileNotFoundError(f"there is no file or folder {argument}")
        media += [Medium("video" if file.suffix.lower() in VIDEOS else "image", str(file)) for file in files]
    return media


def media_costs(media: list[Medium], prompt: str, inputs: BatchFeature, processor: LongLlavaProcessor) -> list[Cost]:
    """The costs of a prompt's media in their order.

    Args:
        inputs: of this prompt, with `offset_mapping` (1, L, 2): all tokens of a medium lie within its placeholder.
    """
    placeholder = f"{re.escape(processor.image_token)}|{re.escape(processor.video_token)}"
    starts = torch.tensor([match.start() for match in re.finditer(placeholder, prompt)])
    at = inputs["offset_mapping"][0, inputs["input_ids"][0] == processor.image_token_id, 0]  # (image tokens,)
    tokens = torch.bincount(torch.bucketize(at, starts, right=True) - 1, minlength=len(starts)).tolist()
    views = iter(inputs["image_grid_hw"].prod(-1).tolist())
    costs = []
    for medium, total in zip(media, tokens, strict=True):
        count, seen = 0, 0
        while seen < total:
            seen += next(views)
            count += 1
        costs.append(Cost(medium, count, total))
    return costs


def describe_costs(costs: list[Cost], total: int, window: int) -> list[str]:
    """One line per medium, or per stretch of media that cost the same, and one for the sum against the window."""
    lines = []
    for (kind, views, tokens), same in groupby(costs, key=lambda cost: (cost.medium.kind, cost.views, cost.tokens)):
        names = [cost.medium.source for cost in same]
        parts = f"{views} frames, " if kind == "video" else f"whole and {views - 1} tiles, " if views > 1 else ""
        if len(names) > 3:
            noun = "videos" if kind == "video" else "pictures"
            lines.append(
                f"{names[0]} ... {names[-1]}: {len(names)} {noun}, {parts}{tokens} tokens each, "
                f"{len(names) * tokens} together"
            )
        else:
            lines += [f"{name}: {parts}{tokens} tokens" for name in names]
    over = " (longer than the window: answers may be poor)" if total > window else ""
    return [*lines, f"{total} of the window's {window} tokens{over}"]


class Conversation:
    """Turns about the same pictures and videos, on one cache.

    Attributes:
        costs: of the media, in their order; known before the first answer.
        prompt_length: tokens of the newest prompt.
        reused: how many of them came from the cache.
    """

    def __init__(
        self,
        model: LongLlavaForConditionalGeneration,
        processor: LongLlavaProcessor,
        media: list[Medium],
        max_new_tokens: int,
        **options: Any,
    ):
        """`options` go to the processor: tokens_per_image, sub_images, num_frames and the like."""
        self.model, self.processor, self.media = model, processor, media
        self.max_new_tokens, self.options = max_new_tokens, options
        self.messages: list[dict[str, Any]] = []
        self.costs: list[Cost] = []
        self.prompt, self.prompt_length, self.reused = "", 0, 0
        self.inputs = BatchFeature()
        self.cache: Cache | None = None
        self.cached_ids = torch.empty(1, 0, dtype=torch.long)

    @property
    def window(self) -> int:
        """Tokens that the model was made for."""
        return self.model.config.text_config.max_position_embeddings

    def add_question(self, question: str) -> None:
        """Append a turn of the user and prepare its inputs.

        Raises:
            ValueError: the question holds a placeholder, or (the first one) a picture or video cannot be read; nothing
                has changed then.
        """
        for placeholder in (self.processor.image_token, self.processor.video_token):
            if placeholder in question:
                raise ValueError(f"a question cannot contain {placeholder}: it stands for a picture or video")
        placeholders = [] if self.messages else [{"type": medium.kind} for medium in self.media]
        turn = {"role": "user", "content": [*placeholders, {"type": "text", "text": question}]}
        messages = [*self.messages, turn]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if self.prompt:
            # Pictures are read once. What is new begins at the start token of the answer before; a special token
            # parts the text for the tokenizer, so the ids are those of the whole prompt.
            start = self.prompt.rindex(self.processor.tokenizer.bos_token)
            kept = self.inputs["input_ids"][0].tolist()
            kept = kept[: len(kept) - kept[::-1].index(self.processor.tokenizer.bos_token_id) - 1]
            new = self.processor.tokenizer(prompt[start:], add_special_tokens=False)["input_ids"]
            self.inputs["input_ids"] = torch.tensor([kept + new], device=self.model.device)
            self.inputs["attention_mask"] = torch.ones_like(self.inputs["input_ids"])
        else:
            of_kind = {
                kind: [medium.source for medium in self.media if medium.kind == kind] for kind in ("image", "video")
            }
            inputs = self.processor(
                text=prompt,
                images=of_kind["image"] or None,
                videos=of_kind["video"] or None,
                return_offsets_mapping=True,
                **self.options,
            )
            self.costs = media_costs(self.media, prompt, inputs, self.processor) if self.media else []
            del inputs["offset_mapping"]
            self.inputs = inputs.to(self.model.device)
        self.messages, self.prompt, self.prompt_length = messages, prompt, self.inputs["input_ids"].shape[1]

    def answer(self) -> str:
        """Generate the answer to the newest question, printing it as it comes."""
        ids = self.inputs["input_ids"]
        # An answer that the tokenizer spells otherwise than the model did leaves the cache useless.
        length = self.cached_ids.shape[1]
        if not torch.equal(ids[:, :length], self.cached_ids.to(ids.device)):
            self.cache, length = None, 0
        self.reused = length
        output = self.model.generate(
            **self.inputs,
            past_key_values=self.cache,
            max_new_tokens=self.max_new_tokens,
            streamer=TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
            return_dict_in_generate=True,
        )
        # The last token was sampled, not read.
        self.cache, self.cached_ids = output.past_key_values, output.sequences[:, :-1]
        text = self.processor.tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
        return text
