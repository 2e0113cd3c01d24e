"""LongLlavaProcessor: pictures, video and chat become the tensors that the model reads.

    text with placeholders, pictures, videos
       | expand            one `<image>` per picture, frame or tile in the text           texts, sides, PictureStream
       | tokenize          ids of the text, that of each `<image>` rows * cols times
       | PictureStream     pictures decoded, padded to a square, resized and normalized in threads
       v
    input_ids (B, L)  attention_mask (B, L)  pixel_values (N, 3, S, S)  image_grid_hw (N, 2)

N counts all pictures, video frames and tiles of the batch in the order of their placeholders, prompt after prompt.

The protocol is that of arXiv 2409.02889 (data processing) and of the released inference code:

- a picture is `<img><image></img>`, where `<image>` is a token of the vocabulary and the tags are ordinary text;
- a video is `<vid>`, its frames (each a picture) joined by `<t>`, `</vid>`;
- with sub-images, `<image>` becomes `<image>`, a newline, and the tiles row by row, each `<img><image></img>`, rows
  joined by a newline. The tags around the placeholder stay where they are, so that `<img>` opens before the whole
  picture and its `</img>` closes after the last tile: that is what the released weights were shown.

One difference to the released code: a picture that fits into one tile gets no tile, for the tile would repeat it.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, meta
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .picture_reading_longllava import TowerInput, best_grid, find_picture, picture_size
from .picture_stream_longllava import PictureStream, StillPicture
from .video_reading_longllava import VideoFile, find_video, frame_indices

IGNORE_INDEX = -100


# ---------------------------------------------------------------------------------------------------------------------
# The processor


class Expanded(NamedTuple):
    """Prompts with one `<image>` per picture, frame and tile, and these pictures; see `LongLlavaProcessor.expand`."""

    texts: list[str]  # of each prompt
    sides: list[list[int]]  # of each prompt, of each `<image>`: rows, which are also columns, of its tokens
    pictures: PictureStream  # of all prompts, in the order of their `<image>`
    # Of each prompt, positions in `texts` and in the text as it was given that correspond; see `_substitute`.
    bounds: list[tuple[list[int], list[int]]]
    video_metadata: list[dict[str, Any]]  # of each video; see `find_video`


class LongLlavaProcessor(ProcessorMixin):
    """Turns prompts with pictures and videos into the inputs of LongLLaVA, and chat into prompts.

    `image_processor` holds the settings of the tower's preprocessing (`size`, `crop_size`, `image_mean`, `image_std`,
    `rescale_factor`, `resample`): LLaVA's with `do_pad=True`. The work is done here on Pillow and numpy, equal to the
    last bit to that class on its Pillow backend, and the same where other backends are installed.

    The numbers below are defaults, kept with the checkpoint; each can be chosen anew per call.

    Args:
        patch_size: side of the tower's patches, pixels.
        tokens_per_image: tokens of a picture or tile, a square number whose root divides the tower's patch grid.
        tokens_per_frame: tokens of a video frame; None for `tokens_per_image`.
        max_tiles: most tiles of a big picture.
        max_frames: most frames of a video.
        image_token: the placeholder, one token of the vocabulary.
    """

    video_token = "<video>"  # ordinary text: the prompt that reaches the model holds only pictures

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        patch_size: int = 14,
        tokens_per_image: int = 144,
        tokens_per_frame: int | None = None,
        max_tiles: int = 30,
        max_frames: int = 128,
        image_token: str = "<image>",
    ):
        template_file = Path(__file__).with_name("chat_template.jinja")
        if chat_template is None and template_file.is_file():  # a copy of this module alone has no template beside it
            chat_template = template_file.read_text(encoding="utf-8")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

        self.image_token = image_token
        self.image_token_id = tokenizer.get_vocab().get(image_token)
        if self.image_token_id is None:
            raise ValueError(
                f"{image_token!r} is not in the vocabulary of the tokenizer ({len(tokenizer)} tokens); rename one "
                "of its reserved tokens, so that no embedding has to be added"
            )
        self.patch_size = patch_size
        self.tokens_per_image = tokens_per_image
        self.tokens_per_frame = tokens_per_frame
        self.max_tiles = max_tiles
        self.max_frames = max_frames

        sides = {*dict(image_processor.size).values(), *dict(image_processor.crop_size).values()} - {None}
        if len(sides) != 1 or not image_processor.do_pad:
            raise ValueError(
                "the image processor must pad to a square (do_pad=True) and resize and crop to one side, not "
                f"do_pad={image_processor.do_pad}, size={image_processor.size}, crop_size={image_processor.crop_size}"
            )
        self._grid_side(tokens_per_image, "tokens_per_image")
        self._grid_side(self._frame_tokens(None, None), "tokens_per_frame")
        _positive(max_tiles=max_tiles, max_frames=max_frames)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_grid_hw"]

    @property
    def image_size(self) -> int:
        """Side of the tower's input, pixels."""
        return dict(self.image_processor.crop_size)["height"]

    # ---- text, pictures and videos to tensors

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        videos: Any = None,
        *,
        audio: None = None,
        tokens_per_image: int | None = None,
        tokens_per_frame: int | None = None,
        sub_images: bool | Sequence[bool] = False,
        max_tiles: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = False,
        return_offsets_mapping: bool = False,
        return_mm_token_type_ids: bool = False,
        return_metadata: bool = False,
        stream_pictures: bool = False,
    ) -> BatchFeature:
        """Prompts with `<image>` and `<video>` placeholders to input_ids, attention_mask, pixel_values, image_grid_hw.

        Args:
            text: one prompt or several; None for pictures alone.
            images: one picture, a list of them for all placeholders of all prompts in order, or one list per prompt.
                See `read_picture` for what a picture can be.
            videos: the same with videos. One is a path, URL or bytes of a file, a list of pictures or an array with
                four axes; an array with five axes is a list of them.
            tokens_per_image, tokens_per_frame: a square number each. A `tokens_per_image` of the call is also that of
                frames, unless the call or the checkpoint has one for frames.
            sub_images: give every picture its tiles (see the head of this file), at most `max_tiles`; also one choice
                per prompt.
            num_frames, fps: frames per video, evenly spaced, or frames per second of it; at most `max_frames` in both
                cases. With neither, `max_frames` evenly spaced. The checkpoint's `max_frames` never cuts `num_frames`.
            truncation, max_length: cut the text behind (or, by the tokenizer's `truncation_side`, before) `max_length`
                tokens; an error where that takes a token of a picture.
            add_special_tokens: begin each prompt with the start token, if it does not; the chat template has it.
            return_offsets_mapping: also `offset_mapping` (B, L, 2), positions in `text` as it was given.
            return_mm_token_type_ids: also `mm_token_type_ids` (B, L), 1 at tokens of pictures.
            return_metadata: also `video_metadata`, one dictionary per video (see `find_video`).
            stream_pictures: `pixel_values` is a `PictureStream`, which decodes a picture when the model comes to it.

        Raises ValueError wherever counts do not agree or a picture would be lost.
        """
        if audio is not None:
            raise ValueError("LongLLaVA reads pictures and videos, no audio")
        if text is None:
            if images is None or videos is not None:
                raise ValueError("give text, or pictures alone")
            images = _one_list(images)
        expanded = self.expand(
            self.image_token * len(images) if text is None else text,
            images,
            videos,
            tokens_per_image=tokens_per_image,
            tokens_per_frame=tokens_per_frame,
            sub_images=sub_images,
            max_tiles=max_tiles,
            num_frames=num_frames,
            fps=fps,
            max_frames=max_frames,
        )

        data: dict[str, Any] = {}
        if text is not None:
            rows: list[tuple[np.ndarray, np.ndarray]] = []  # ids (L,) and positions (L, 2) of each prompt
            for number, prompt in enumerate(expanded.texts):
                ids, offsets = self.tokenize(prompt, expanded.sides[number])
                # Back to positions in the prompt as it was given.
                offsets = np.interp(offsets, *expanded.bounds[number]).astype(np.int64)
                if add_special_tokens and ids[:1].tolist() != [self.tokenizer.bos_token_id]:
                    ids = np.concatenate([[self.tokenizer.bos_token_id], ids])
                    offsets = np.concatenate([[[0, 0]], offsets])
                if truncation and max_length is not None:
                    keep = self._truncate(ids, max_length, number)
                    ids, offsets = ids[keep], offsets[keep]
                rows.append((ids, offsets))
            data = self._pad(rows, padding, padding_side, pad_to_multiple_of, max_length, return_tensors)
            if not return_offsets_mapping:
                del data["offset_mapping"]
            if return_mm_token_type_ids:
                data["mm_token_type_ids"] = [(np.asarray(ids) == self.image_token_id) * 1 for ids in data["input_ids"]]
        if len(expanded.pictures) > 0:
            data["pixel_values"] = expanded.pictures if stream_pictures else expanded.pictures.tensor().numpy()
            data["image_grid_hw"] = np.array([[side, side] for sides in expanded.sides for side in sides])
        if return_metadata:
            data["video_metadata"] = expanded.video_metadata
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["video_metadata"])

    def expand(
        self,
        text: str | Sequence[str],
        images: Any = None,
        videos: Any = None,
        *,
        tokens_per_image: int | None = None,
        tokens_per_frame: int | None = None,
        sub_images: bool | Sequence[bool] = False,
        max_tiles: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
    ) -> Expanded:
        """What stands behind the placeholders of one prompt or several: the first half of `__call__`, same arguments.

        No picture is decoded yet, but files must be there, frames of videos are chosen, and for tiles the size of the
        picture is read. `tokenize` makes ids of a text and its sides, or of a part that ends behind an `<image>`.

        Raises ValueError where counts do not agree, and whatever can be known to be wrong with a picture or video.
        """
        if fps is not None and num_frames is not None:
            raise ValueError(f"num_frames={num_frames} and fps={fps} are two ways to choose frames; give one")
        max_tiles = self.max_tiles if max_tiles is None else max_tiles
        max_frames = max(self.max_frames, num_frames or 0) if max_frames is None else max_frames
        _positive(max_tiles=max_tiles, max_frames=max_frames, num_frames=num_frames, fps=fps)
        image_side = self._grid_side(self._image_tokens(tokens_per_image), "tokens_per_image")
        frame_side = self._grid_side(self._frame_tokens(tokens_per_image, tokens_per_frame), "tokens_per_frame")

        prompts = [text] if isinstance(text, str) else list(text)
        if not prompts:
            raise ValueError("0 prompts are given")
        for number, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise TypeError(f"prompt {number} is a {type(prompt).__name__}, not a string")
        tiled = [sub_images] * len(prompts) if isinstance(sub_images, bool) else list(sub_images)
        if len(tiled) != len(prompts):
            raise ValueError(f"{len(tiled)} choices of sub_images are given for {len(prompts)} prompts")

        parts: list[tuple[StillPicture | VideoFile, int]] = []  # all pictures, in the order of the placeholders
        sides: list[int] = []  # rows and columns of tokens of each
        metadata: list[dict[str, Any]] = []
        picture_tag = f"<img>{self.image_token}</img>"

        def choose(total: int, times: np.ndarray | None) -> np.ndarray:
            return frame_indices(total, times, num_frames, fps, max_frames)

        def expand_image(source: Any, with_tiles: bool) -> str:
            # What has to be downloaded for its size is kept: a picture is fetched once.
            source, name = find_picture(source, f"picture {len(parts)}", download=with_tiles)
            rows, cols = 1, 1
            if with_tiles:
                width, height = picture_size(source, name)
                rows, cols = best_grid(height, width, self.image_size, max_tiles)
            if rows * cols == 1:
                parts.append((StillPicture(source, name), 0))
                sides.append(image_side)
                return self.image_token
            picture = StillPicture(source, name, max_tiles)
            parts.extend((picture, number) for number in range(1 + rows * cols))
            sides.extend([image_side] * (1 + rows * cols))
            return "\n".join([self.image_token] + [picture_tag * cols] * rows)

        def expand_video(source: Any) -> str:
            name = f"video {len(metadata)}"
            frames: list[tuple[StillPicture | VideoFile, int]]
            if isinstance(source, str | Path | bytes | bytearray):
                video, info = find_video(source, name, choose)
                frames = [(video, number) for number in range(len(video.stamps))]
            else:
                info = _choose_pictures(source, name, choose)
                frames = [
                    (StillPicture(*find_picture(source[index], f"frame {index} of {name}")), 0)
                    for index in info["frames_indices"]
                ]
            parts.extend(frames)
            sides.extend([frame_side] * len(frames))
            metadata.append(info)
            return f"<vid>{'<t>'.join([picture_tag] * len(frames))}</vid>"

        images_by_prompt = _by_prompt(images, [prompt.count(self.image_token) for prompt in prompts], "image")
        videos_by_prompt = _by_prompt(videos, [prompt.count(self.video_token) for prompt in prompts], "video")
        texts: list[str] = []
        sides_by_prompt: list[list[int]] = []
        bounds: list[tuple[list[int], list[int]]] = []
        for number, prompt in enumerate(prompts):
            before = len(sides)
            expanded, new_bounds, old_bounds = _substitute(
                prompt,
                {
                    self.image_token: (expand_image(source, tiled[number]) for source in images_by_prompt[number]),
                    self.video_token: (expand_video(source) for source in videos_by_prompt[number]),
                },
            )
            texts.append(expanded)
            sides_by_prompt.append(sides[before:])
            bounds.append((new_bounds, old_bounds))
        pictures = PictureStream(parts, TowerInput(self.image_processor))
        return Expanded(texts, sides_by_prompt, pictures, bounds, metadata)

    def _image_tokens(self, tokens_per_image: int | None) -> int:
        return self.tokens_per_image if tokens_per_image is None else tokens_per_image

    def _frame_tokens(self, tokens_per_image: int | None, tokens_per_frame: int | None) -> int:
        for tokens in (tokens_per_frame, self.tokens_per_frame):
            if tokens is not None:
                return tokens
        return self._image_tokens(tokens_per_image)

    def _grid_side(self, tokens: int, name: str) -> int:
        """Rows, which are also columns, of the `tokens` of a picture; ValueError where the tower cannot give them."""
        patches = self.image_size // self.patch_size
        sides = [side for side in range(1, patches + 1) if patches % side == 0]
        usable = [side * side for side in sides]
        if tokens not in usable:
            raise ValueError(
                f"{name}={tokens} is not the square of a divisor of the tower's {patches} x {patches} patches; "
                f"usable: {usable}"
            )
        return sides[usable.index(tokens)]

    def tokenize(self, expanded: str, sides: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (L,) and positions in the text (L, 2), int64, of an expanded text: each `<image>` gives side * side ids.

        Each stretch between two pictures is tokenized by itself, as in the original; and to repeat ids instead of text
        keeps the text of a thousand pictures short.
        """
        stretches = expanded.split(self.image_token)
        if len(sides) != len(stretches) - 1:
            raise ValueError(f"the text has {len(stretches) - 1} {self.image_token}, but {len(sides)} sides are given")
        encoded = self.tokenizer(
            stretches, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True
        )
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        repeats: list[int] = []
        start = 0
        for number, stretch in enumerate(stretches):
            if number > 0:
                ids.append(self.image_token_id)
                offsets.append((start, start + len(self.image_token)))
                repeats.append(sides[number - 1] ** 2)
                start += len(self.image_token)
            ids += encoded["input_ids"][number]
            offsets += [(start + left, start + right) for left, right in encoded["offset_mapping"][number]]
            repeats += [1] * (len(ids) - len(repeats))
            start += len(stretch)
        return (
            np.repeat(np.array(ids, dtype=np.int64), repeats),
            np.repeat(np.array(offsets, dtype=np.int64).reshape(-1, 2), repeats, axis=0),
        )

    def _truncate(self, ids: np.ndarray, max_length: int, number: int) -> slice:
        """What to keep of prompt `number`; ValueError where a token of a picture would go."""
        keep = (
            slice(max_length)
            if self.tokenizer.truncation_side == "right"
            else slice(max(len(ids) - max_length, 0), None)
        )
        total, kept = (int((part == self.image_token_id).sum()) for part in (ids, ids[keep]))
        if kept < total:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens, {total} of them of pictures; cut to max_length={max_length} "
                f"it would keep {kept} of these. Raise max_length, take fewer pictures or fewer tokens_per_image"
            )
        return keep

    def _pad(
        self,
        rows: list[tuple[np.ndarray, np.ndarray]],
        padding: bool | str,
        padding_side: str | None,
        pad_to_multiple_of: int | None,
        max_length: int | None,
        return_tensors: str | None,
    ) -> dict[str, Any]:
        """input_ids, attention_mask (B, L) and offset_mapping (B, L, 2); lists where rows stay of different length."""
        lengths = [len(ids) for ids, _ in rows]
        if padding in (False, "do_not_pad"):
            if return_tensors is not None and len(set(lengths)) > 1:
                raise ValueError(f"prompts of {lengths} tokens make no tensor without padding=True")
            widths = lengths
        elif padding == "max_length" and max_length is None:
            raise ValueError("padding='max_length' needs max_length")
        elif padding in (True, "longest", "max_length"):
            width = max(lengths + ([max_length or 0] if padding == "max_length" else []), default=0)
            multiple = pad_to_multiple_of or 1
            widths = [-(-width // multiple) * multiple] * len(rows)
        else:
            raise ValueError(f"padding is True, False, 'longest', 'max_length' or 'do_not_pad', not {padding!r}")
        if widths != lengths and self.tokenizer.pad_token_id is None:
            raise ValueError(f"prompts of {lengths} tokens have to be padded, and the tokenizer has no padding token")

        side = padding_side or self.tokenizer.padding_side
        data: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "offset_mapping": []}
        for (ids, offsets), width in zip(rows, widths, strict=True):
            missing = width - len(ids)
            ends = (missing, 0) if side == "left" else (0, missing)
            data["input_ids"].append(np.pad(ids, ends, constant_values=self.tokenizer.pad_token_id or 0))
            data["attention_mask"].append(np.pad(np.ones_like(ids), ends))
            data["offset_mapping"].append(np.pad(offsets, (ends, (0, 0))))
        if return_tensors is None:
            return {name: [row.tolist() for row in values] for name, values in data.items()}
        return {name: np.stack(values) for name, values in data.items()}

    # ---- chat to text and tensors

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        load_audio_from_video: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
        **kwargs: Any,
    ) -> Any:
        """A conversation (a list of messages), or several, to the prompt; with `tokenize` and `return_dict`, tensors.

        The content of a message is a string, or a list of blocks: `{"type": "text", "text": ...}`, `{"type": "image",
        "image" | "url" | "path" | "base64": ...}` and `{"type": "video", "video" | "url" | "path": ...}`. Strings and
        text blocks may hold `<img><image></img>` and `<video>` themselves. Pictures and videos come in the blocks or,
        for blocks that hold none and for placeholders in text, through `images=` and `videos=`.

        Arguments of `__call__` can be given directly or in `processor_kwargs`; `tools`, `documents` and anything else
        go to the template, and are an error where it has no such variable (this package's own has none of them).
        With `return_assistant_tokens_mask` there is `assistant_masks` (B, L), 1 on answers and their ends; see
        `build_labels`. Written here and not inherited because transformers before 5.18 puts that mask at the wrong
        tokens behind a picture.
        """
        if load_audio_from_video or sanitize_control_tokens:
            raise ValueError("load_audio_from_video and sanitize_control_tokens are not available for LongLLaVA")
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise ValueError(
                "continue_final_message goes with neither add_generation_prompt nor return_assistant_tokens_mask"
            )
        call_names = inspect.signature(self.__call__).parameters
        options = {name: kwargs.pop(name) for name in call_names if name in kwargs} | (processor_kwargs or {})
        return_tensors = options.pop("return_tensors", return_tensors)
        template: Any = chat_template or self.chat_template
        if isinstance(self.chat_template, dict):
            template = self.chat_template[chat_template or "default"]
        if template is None:
            raise ValueError("this processor has no chat template")
        extra = kwargs.keys() | {name for name, value in (("tools", tools), ("documents", documents)) if value}
        if extra and (unknown := sorted(extra - _variables(template))):
            raise TypeError(f"neither the processor nor its chat template takes {', '.join(map(repr, unknown))}")

        batched = len(conversation) > 0 and isinstance(conversation[0], list | tuple)
        conversations = [
            _clean(messages, f" of conversation {number}" if batched else "")
            for number, messages in enumerate(conversation if batched else [conversation])
        ]
        rendered: Any = render_jinja_template(
            conversations=conversations,
            tools=tools,
            documents=documents,
            chat_template=template,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            **{**self.tokenizer.special_tokens_map, **kwargs},
        )
        prompts, spans = rendered
        if not tokenize:
            return prompts if batched else prompts[0]

        for kind, keys in (("image", ("image", "url", "path", "base64")), ("video", ("video", "url", "path"))):
            found = [_payloads(messages, kind, keys) for messages in conversations]
            given = options.pop(f"{kind}s", None)
            if given is None:
                options[f"{kind}s"] = found if any(found) else None
            elif any(found):
                raise ValueError(
                    f"{sum(map(len, found))} {kind}s come in the messages and others through {kind}s=; use one way"
                )
            else:
                options[f"{kind}s"] = given
        out = self(prompts, return_tensors=return_tensors, return_offsets_mapping=True, **options)
        offsets = out.pop("offset_mapping")
        if return_assistant_tokens_mask:
            out["assistant_masks"] = [
                _mask(np.asarray(row).reshape(-1, 2), row_spans).tolist()
                for row, row_spans in zip(offsets, spans, strict=True)
            ]
            out.convert_to_tensors(return_tensors)
        return out if return_dict else out["input_ids"]

    def build_labels(self, input_ids: torch.Tensor, assistant_masks: torch.Tensor) -> torch.Tensor:
        """Labels (B, L) for training on the answers, -100 elsewhere; of the two from `apply_chat_template`.

        The end of every answer teaches the end-of-text token: at the last answer the input holds it, at an answer
        inside the history the input holds a newline (the next turn's start token follows) and only the label changes.
        The tokenizer must keep that newline a token of its own. Pictures in an answer are read, not taught.
        """
        newline = self.tokenizer.encode("\n", add_special_tokens=False)[-1]
        inside = assistant_masks.bool()
        following = torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=IGNORE_INDEX)
        ends_turn = inside & (input_ids == newline) & (following == self.tokenizer.bos_token_id)
        labels = input_ids.masked_fill(~inside | (input_ids == self.image_token_id), IGNORE_INDEX)
        return labels.masked_fill(ends_turn, self.tokenizer.eos_token_id)

    # ---- for servers

    def _get_num_multimodal_tokens(
        self,
        image_sizes: list[Sequence[int]] | None = None,
        video_sizes: list[Sequence[int]] | None = None,
        tokens_per_image: int | None = None,
        tokens_per_frame: int | None = None,
        sub_images: bool = False,
        max_tiles: int | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """How many `<image>` tokens and how many pictures for the tower each input will become.

        `image_sizes` are (height, width), `video_sizes` (frames, height, width) after sampling. The text around tiles
        and frames is not counted. What `__call__` refuses is refused here too.
        """
        max_tiles = self.max_tiles if max_tiles is None else max_tiles
        _positive(max_tiles=max_tiles)
        image_side = self._grid_side(self._image_tokens(tokens_per_image), "tokens_per_image")
        frame_side = self._grid_side(self._frame_tokens(tokens_per_image, tokens_per_frame), "tokens_per_frame")
        data: dict[str, list[int]] = {}
        if image_sizes is not None:
            parts = [1] * len(image_sizes)
            if sub_images:
                grids = [best_grid(h, w, self.image_size, max_tiles) for h, w in image_sizes]
                parts = [1 + rows * cols * (rows * cols > 1) for rows, cols in grids]
            data |= {"num_image_tokens": [image_side**2 * count for count in parts], "num_image_patches": parts}
        if video_sizes is not None:
            data["num_video_tokens"] = [frame_side**2 * size[0] for size in video_sizes]
        return MultiModalData(**data)


# ---------------------------------------------------------------------------------------------------------------------
# Small parts


def _positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be above 0, not {value}")


def _choose_pictures(source: Any, name: str, choose: Callable[[int, None], np.ndarray]) -> dict[str, Any]:
    """What `find_video` tells of a file, of a sequence of pictures or an array; what that does not know is None."""
    total = len(source)
    if total == 0:
        raise ValueError(f"{name} has 0 frames")
    try:
        indices = choose(total, None).tolist()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    info = {"total_num_frames": total, "fps": None, "duration": None}
    return {**info, "frames_indices": indices, "timestamps": None}


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_frame(value: Any) -> bool:
    """A picture for sure: what could also be the file of a video is not."""
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim < 4)


def _one_list(items: Any) -> list[Any]:
    """A picture, several, or several lists of them, as one list."""
    if isinstance(items, np.ndarray | torch.Tensor) and items.ndim == 4:
        return list(items)
    if not _is_list(items):
        return [items]
    return [part for item in items for part in (item if _is_list(item) else [item])]


def _lists_of_videos(items: list[list[Any]], counts: list[int]) -> bool:
    """Whether a list of lists holds the videos of each prompt, and not videos that are lists of frames."""
    parts = [part for item in items for part in item]
    if any(_is_frame(part) for part in parts):
        return False
    if any(not isinstance(part, str | Path) for part in parts):
        return True
    # A path alone could be that of a video or of a frame: what fits the placeholders is meant.
    return [len(item) for item in items] == counts


def _by_prompt(items: Any, counts: list[int], kind: str) -> list[list[Any]]:
    """One list of pictures (`kind` image) or videos per prompt, as many as it has placeholders (`counts`)."""
    if items is None:
        items = []
    if kind == "video" and isinstance(items, np.ndarray | torch.Tensor) and items.ndim == 5:
        items = list(items)  # a batch of videos
    if kind == "video" and (not _is_list(items) or (len(items) > 0 and all(_is_frame(item) for item in items))):
        items = [items]
    nested = _is_list(items) and len(items) > 0 and all(_is_list(item) for item in items)
    if kind == "video":
        nested = nested and _lists_of_videos(items, counts)
    elif not nested:
        items = _one_list(items)

    if not nested:
        if len(items) != sum(counts):
            where = "the prompt has" if len(counts) == 1 else f"{len(counts)} prompts have"
            raise ValueError(f"{where} {sum(counts)} <{kind}> placeholders, but {len(items)} {kind}s are given")
        stream = iter(items)
        return [[next(stream) for _ in range(count)] for count in counts]
    if len(items) != len(counts):
        raise ValueError(f"{len(items)} lists of {kind}s are given for {len(counts)} prompts")
    for number, (own, count) in enumerate(zip(items, counts, strict=True)):
        if len(own) != count:
            raise ValueError(f"prompt {number} has {count} <{kind}> placeholders, but {len(own)} {kind}s are given")
    return [list(own) for own in items]


def _substitute(prompt: str, replacements: dict[str, Iterator[str]]) -> tuple[str, list[int], list[int]]:
    """The prompt with the next replacement for each placeholder as it comes, and positions in the new and the old text
    that correspond.

    Between two such positions both texts are the same, or one is a placeholder and the other what replaced it.
    """
    pieces: list[str] = []
    new_bounds, old_bounds = [0], [0]
    for piece in re.split(f"({'|'.join(map(re.escape, replacements))})", prompt):
        pieces.append(next(replacements[piece]) if piece in replacements else piece)
        new_bounds.append(new_bounds[-1] + len(pieces[-1]))
        old_bounds.append(old_bounds[-1] + len(piece))
    return "".join(pieces), new_bounds, old_bounds


def _variables(template: str) -> set[str]:
    """The names that a chat template takes from its caller."""
    # transformers' own tag, which jinja does not know; it changes no variable.
    plain = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)
    return meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain))


def _clean(messages: Sequence[dict[str, Any]], whose: str) -> list[dict[str, Any]]:
    """A copy of a conversation without keys that hold None (tables fill them in) and with OpenAI's picture blocks.

    Raises ValueError for what would become an empty turn: no messages, no content, a text block without text. `whose`
    is the end of the name of a message in errors.
    """
    if len(messages) == 0:
        raise ValueError(f"there are 0 messages{whose}")
    copies = []
    for number, message in enumerate(messages):
        name = f"message {number}{whose}"
        if not isinstance(message, dict):
            raise TypeError(f"{name} is a {type(message).__name__}, not a dictionary with role and content")
        message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content")
        if not isinstance(content, str | list | tuple):
            raise ValueError(f"{name} has content {content!r}; content is a string or a list of blocks")
        if _is_list(content):
            blocks = []
            for place, block in enumerate(content):
                if not isinstance(block, dict):
                    raise TypeError(f"block {place} of {name} is a {type(block).__name__}, not a dictionary")
                block = {key: value for key, value in block.items() if value is not None}
                if block.get("type") == "image_url":
                    url = block["image_url"]
                    block = {"type": "image", "url": url["url"] if isinstance(url, dict) else url}
                if block.get("type") == "text" and not isinstance(block.get("text"), str):
                    raise ValueError(f"block {place} of {name} is of type text and has text {block.get('text')!r}")
                blocks.append(block)
            message["content"] = blocks
        copies.append(message)
    return copies


def _payloads(messages: list[dict[str, Any]], kind: str, keys: tuple[str, ...]) -> list[Any]:
    """The pictures or videos in the blocks of a conversation, in their order."""
    blocks = [block for message in messages if _is_list(message.get("content")) for block in message["content"]]
    return [
        next(block[key] for key in keys if key in block)
        for block in blocks
        if block.get("type") == kind and any(key in block for key in keys)
    ]


def _mask(offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """(L,) 1 at tokens whose positions (L, 2) overlap a span; padding has none."""
    mask = np.zeros(len(offsets), dtype=np.int64)
    for start, end in spans:
        mask[(offsets[:, 0] < end) & (offsets[:, 1] > start)] = 1
    return mask


# Saving writes this file and its name in the configuration, so that AutoProcessor finds the class on the Hub.
LongLlavaProcessor.register_for_auto_class("AutoProcessor")
