"""A conversation that reads every picture once, goes on at any time, and can be forked, taken back and kept in a file.

    session = LongLlavaSession(model, processor)
    session.watch(video="film.mp4")              # read now; decoding, encoding and prefill overlap
    session.ask("What happens at the end?")      # costs the question and the answer
    session.fork().ask("Who wins?")              # another question on the same past; `session` knows nothing of it
    session.save("film.safetensors")             # and tomorrow LongLlavaSession.load(...)

What is cached is always the beginning of the tokens that the processor makes of the whole conversation, so an answer
is that of a fresh `generate`. Text is joined to what follows it before it is tokenized: pieces of text end at a
picture, and text behind the last picture, answers too, is tokenized anew each turn and read again where that gives
other tokens than are cached. The point right behind the last picture, to which this may lead back, is the `anchor`.
"""

import io
import json
import os
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.utils import logging

from .cache import GrowingLayer, LongLlavaCache, Snapshot

FORMAT = 1  # of saved sessions
# Of the processor, what a session and each `watch` may set. The last three choose among the frames of a video.
OPTIONS = ("tokens_per_image", "tokens_per_frame", "sub_images", "max_tiles", "num_frames", "fps", "max_frames")
GROUP = 64  # pictures that are taken from an iterator at a time
# What must agree between the model that read a saved session and the one that goes on: all that decides a shape or a
# token. (The weights have a checksum.)
CONFIG_KEYS = ("image_token_id", "vision_feature_layer", "pooling", "tokens_per_image")
TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset",
    "num_experts", "num_experts_per_tok", "mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_dt_rank",
)  # fmt: skip
VISION_KEYS = ("image_size", "patch_size", "hidden_size", "num_hidden_layers")


class Watched(NamedTuple):
    """What a picture or video became: `views` (itself and its tiles, or its frames) of `tokens` tokens together."""

    views: int
    tokens: int


class _Anchor(NamedTuple):
    """Right behind the last picture: everything before it is read for good."""

    cache: Snapshot
    tokens: int
    done: int  # characters of the conversation, as the chat template writes it, up to here
    checksum: int  # of these characters
    tail: str  # what expanding the last placeholder left behind its last picture, such as "</img></vid>"


class _Point(NamedTuple):
    """A state of the session to come back to."""

    cache: Snapshot
    tokens: int
    messages: tuple[dict[str, Any], ...]
    pictures: int
    anchor: _Anchor


class _Stop(StoppingCriteria):
    """Stops an answer from another thread."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class LongLlavaSession:
    """One conversation with a model. See the head of this file for its use.

    If a call fails, or is interrupted, the session is what it was before the call. (Text behind the last picture may
    have left the cache; it is read again.) One call runs at a time; forks may run in threads of their own.

    The chat template must only append: what it writes for the turns so far must not change with later ones.

    Args:
        model (`LongLlavaForConditionalGeneration`): answers; its `prefill_chunk_size` bounds memory beside the cache.
        processor (`LongLlavaProcessor`): reads pictures and writes the prompt.
        options: defaults for the processor (`tokens_per_image`, `tokens_per_frame`, `sub_images`, `max_tiles`,
            `num_frames`, `fps`, `max_frames`); each call of `watch` may change them.

    Raises:
        ValueError: if model and processor have different ids for the image token, or an option is unknown.
    """

    def __init__(self, model: Any, processor: Any, **options: Any):
        if processor.image_token_id != model.config.image_token_id:
            raise ValueError(
                f"the processor's image token has id {processor.image_token_id}, "
                f"that of the model {model.config.image_token_id}"
            )
        _check_options(options)
        self.model, self.processor, self.options = model, processor, options
        self._cache = LongLlavaCache(model.config)
        self._ids = torch.empty(1, 0, dtype=torch.long)  # of all cached tokens
        self._messages: tuple[dict[str, Any], ...] = ()
        self._pictures = 0
        self._anchor = _Anchor(self._cache.snapshot(), 0, 0, 0, "")
        self._points: list[_Point] = []  # before each question; the last one also while a call runs
        self._busy = False

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as messages with content blocks; of pictures and videos the paths, if they have one."""
        return [{"role": m["role"], "content": [dict(block) for block in m["content"]]} for m in self._messages]

    @property
    def num_tokens(self) -> int:
        """Tokens in the cache."""
        return self._ids.shape[1]

    @property
    def num_pictures(self) -> int:
        """Pictures, frames and tiles read so far."""
        return self._pictures

    # ---- reading

    def watch(self, images: Any = None, video: Any = None, **options: Any) -> list[Watched]:
        """Read pictures, or a video, now. They stand where the user's turn goes on, before the next question.

        Args:
            images: one picture, or a list or iterator of them: paths, URLs, PIL pictures, arrays.
            video: a video file, a list of frames, or an iterator of live frames, which are all taken and read in
                groups as they come; the call returns when it ends.
            options: for the processor, over those of the session. `num_frames`, `fps` and `max_frames` choose among
                the frames of a video file or list; of live frames each is taken.

        Returns:
            What each picture, or the video, became.

        Raises:
            ValueError: if a picture cannot be read, there is none, or an option is unknown; the message names it.
        """
        if (images is None) == (video is None):
            raise ValueError("watch takes images or a video, one of the two")
        _check_options(options)
        given, options = options, self.options | options
        with self._undone_on_error():
            if video is not None:
                live = isinstance(video, Iterator)
                return [self._watch_frames(video, given) if live else self._watch_video(video, options)]
            if isinstance(images, Iterator) and not isinstance(images, io.IOBase):  # a file iterates over its lines
                groups: Iterable[list[Any]] = iter(lambda: list(islice(images, GROUP)), [])
            else:
                groups = [_as_list(images)]
            watched = [seen for group in groups if group for seen in self._watch_images(group, options)]
            if not watched:
                raise ValueError("0 pictures are given")
            return watched

    def _watch_images(self, images: list[Any], options: dict[str, Any]) -> list[Watched]:
        self._add("user", [_block("image", source) for source in images])
        placeholder = self.processor.image_token
        text, read = self._unread_text(placeholder)
        expanded = self.processor.expand(text, images=images, **options)
        (text,), (sides,) = expanded.texts, expanded.sides
        self._read(text, sides, expanded.pictures, read)
        bounds = expanded.bounds[0][0]
        watched, rest = [], iter(sides)
        for start, stop in zip(bounds[1:-1:2], bounds[2::2], strict=True):  # every second stretch is a placeholder's
            own = list(islice(rest, text[start:stop].count(placeholder)))
            watched.append(Watched(len(own), sum(side * side for side in own)))
        return watched

    def _watch_video(self, video: Any, options: dict[str, Any]) -> Watched:
        self._add("user", [_block("video", video)])
        text, read = self._unread_text(self.processor.video_token)
        expanded = self.processor.expand(text, videos=[video], **options)
        (text,), (sides,) = expanded.texts, expanded.sides
        self._read(text, sides, expanded.pictures, read)
        return Watched(len(sides), sum(side * side for side in sides))

    def _watch_frames(self, frames: Iterator[Any], options: dict[str, Any]) -> Watched:
        """Frames of which nobody knows how many will come: groups of a video that ends with the iterator."""
        for name in ("num_frames", "fps", "max_frames"):
            if options.get(name) is not None:
                raise ValueError(f"{name} is {options[name]}, but of live frames each is taken: leave it out")
        options = self.options | options
        tokens = {name: options[name] for name in ("tokens_per_image", "tokens_per_frame") if name in options}
        self._add("user", [{"type": "video"}])
        text, read = self._unread_text(self.processor.video_token)
        before = text.removesuffix(self.processor.video_token)
        views = total = 0
        while group := list(islice(frames, GROUP)):
            expanded = self.processor.expand(
                self.processor.video_token, videos=[group], num_frames=len(group), **tokens
            )
            (text,), (sides,) = expanded.texts, expanded.sides
            if views > 0:  # goes on inside of the video
                text = self._anchor.tail.removesuffix("</vid>") + "<t>" + text.removeprefix("<vid>")
            self._read(before + text, sides, expanded.pictures, read)
            before = ""
            views, total = views + len(sides), total + sum(side * side for side in sides)
        if views == 0:
            raise ValueError("the video ended before its first frame")
        return Watched(views, total)

    def _add(self, role: str, blocks: list[dict[str, Any]]) -> None:
        """Append blocks to the turn of `role`, which begins with them if the turn before is another's."""
        *before, last = self._messages or (None,)
        if last is not None and last["role"] == role:
            last = {"role": role, "content": (*last["content"], *blocks)}
            self._messages = (*before, last)
        else:
            self._messages = (*self._messages, {"role": role, "content": tuple(blocks)})

    def _conversation(self, **options: Any) -> str:
        """The whole conversation as the chat template writes it."""
        rendered = self.processor.apply_chat_template(self.messages, tokenize=False, **options)
        if zlib.crc32(rendered[: self._anchor.done].encode()) != self._anchor.checksum:
            raise ValueError(
                f"the chat template writes the first {self._anchor.done} characters of this conversation otherwise "
                "than when they were read: the session needs the template it began with, and one that only appends"
            )
        return rendered

    def _unread_text(self, placeholder: str) -> tuple[str, str]:
        """The text from the anchor to the last placeholder, and the whole conversation up to there."""
        rendered = self._conversation()
        rendered = rendered[: rendered.rindex(placeholder) + len(placeholder)]
        return self._anchor.tail + rendered[self._anchor.done :], rendered

    def _new_ids(self, text: str, sides: list[int]) -> Tensor:
        """Of the text behind the anchor the ids (1, L) that are not cached, after going back if cached ones differ."""
        ids = torch.from_numpy(self.processor.tokenize(text, sides)[0])[None]
        cached = self._ids[:, self._anchor.tokens :]
        length = min(ids.shape[1], cached.shape[1])
        same = int((ids[:, :length] == cached[:, :length]).int().cumprod(1).sum())
        if same < cached.shape[1]:
            self._go_back(self._anchor.tokens + same)
        return ids[:, self.num_tokens - self._anchor.tokens :]

    def _go_back(self, tokens: int) -> None:
        """Let the cache go back to a state with at most so many tokens, behind the anchor or at it."""
        cache, known = self._anchor.cache, self._anchor.tokens
        for point in self._points:
            if known < point.tokens <= tokens:
                cache, known = point.cache, point.tokens
        self._cache.restore(cache)
        self._ids = self._ids[:, :known]
        # Points behind it lose their tokens, not their text: it will be read again.
        self._points = [
            point if point.tokens <= known else point._replace(cache=cache, tokens=known) for point in self._points
        ]

    def _read(self, text: str, sides: list[int], pictures: Iterable[Tensor], read: str) -> None:
        """Prefill the text behind the anchor up to its last picture, and set the anchor there.

        `read` is the whole conversation up to that picture's placeholder.
        """
        head, token, tail = text.rpartition(self.processor.image_token)
        ids = self._new_ids(head + token, sides)
        progress = logging.tqdm(
            pictures, total=len(sides), unit="picture", desc="reading", disable=True if len(sides) <= 64 else None
        )
        with self._computing():
            self.model(
                input_ids=ids.to(self._device),
                pixel_values=iter(progress),
                image_grid_hw=torch.tensor(sides)[:, None].expand(-1, 2),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            snapshot = self._cache.snapshot()
        self._ids = torch.cat([self._ids, ids], 1)
        self._pictures += len(sides)
        self._anchor = _Anchor(snapshot, self.num_tokens, len(read), zlib.crc32(read.encode()), tail)

    @property
    def _device(self) -> torch.device:
        """Where inputs go; the weights of an offloaded model are on "meta", and its hooks move the inputs."""
        return torch.device("cpu") if self.model.device.type == "meta" else self.model.device

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Nothing of the caller's modes: what is cached must be usable in any of them, and in other threads."""
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())
            modes.enter_context(torch.autocast(self._device.type, enabled=False))
            yield

    # ---- asking

    def ask(self, question: str, **options: Any) -> str:
        """The answer to a question on everything seen so far; both become a turn of the conversation.

        Args:
            options: for `generate`, such as `max_new_tokens`.

        Raises:
            ValueError: if the question is empty or holds a placeholder of a picture, or more than one sequence is
                asked for; nothing has changed then.

        An answer that spells a placeholder, such as `<video>`, stays in the conversation as `< video>`: it would stand
        for a video there.
        """
        with self._undone_on_error(keep=True):
            inputs = self._ask(question, options)
            with self._computing():
                output = self.model.generate(**inputs)
            return self._answered(inputs, output)

    def stream(self, question: str, **options: Any) -> Iterator[str]:
        """The answer piece by piece, as it is written; it begins with the first piece that is asked for.

        Closing the iterator early ends the answer there, and what was written stays as the turn. Until it is exhausted
        or closed the session does nothing else. Arguments and errors as in [`ask`].
        """
        if "streamer" in options:
            raise ValueError("stream has a streamer of its own; ask takes another one")
        with self._undone_on_error(keep=True):
            inputs = self._ask(question, options)
            stop, results = _Stop(), []
            streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
            inputs["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or []), stop])

            def generate() -> None:
                try:
                    with self._computing():
                        results.append(self.model.generate(**inputs, streamer=streamer))
                except BaseException as error:
                    results.append(error)
                finally:
                    streamer.end()

            thread = threading.Thread(target=generate, daemon=True)
            thread.start()
            try:
                with suppress(GeneratorExit):
                    yield from (piece for piece in streamer if piece)
            finally:
                stop.event.set()
                thread.join()
            result = results.pop()  # an error that this list kept would keep the session alive
            if isinstance(result, BaseException):
                raise result
            self._answered(inputs, result)

    def _ask(self, question: str, options: dict[str, Any]) -> dict[str, Any]:
        """Append the question; what `generate` takes to answer it."""
        if not question.strip():
            raise ValueError("the question is empty")
        for placeholder in (self.processor.image_token, self.processor.video_token):
            if placeholder in question:
                raise ValueError(f"a question cannot contain {placeholder}: it stands for a picture or video")
        config = options.get("generation_config") or self.model.generation_config
        for name in ("num_beams", "num_return_sequences"):
            number = options.get(name, getattr(config, name)) or 1
            if number > 1:
                raise ValueError(f"{name} is {number}, but a session goes on from one sequence: it must be 1")
        self._add("user", [{"type": "text", "text": question}])
        text = self._anchor.tail + self._conversation(add_generation_prompt=True)[self._anchor.done :]
        new = self._new_ids(text, [])
        ids = torch.cat([self._ids, new], 1).to(self._device)
        return {
            **options,
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "past_key_values": self._cache,
            "return_dict_in_generate": True,
        }

    def _answered(self, inputs: dict[str, Any], output: Any) -> str:
        """Append the answer that `generate` gave."""
        sequence = output.sequences
        text = self.processor.tokenizer.decode(sequence[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self._ids = sequence[:, : self._cache.get_seq_length()].cpu()  # the last token was sampled, not read
        kept = text
        for placeholder in (self.processor.image_token, self.processor.video_token):
            kept = kept.replace(placeholder, placeholder[0] + " " + placeholder[1:])
        self._add("assistant", [{"type": "text", "text": kept}])
        return text

    # ---- back, aside, and into a file

    def rewind(self) -> None:
        """Take back the last question and its answer, and whatever was watched after it.

        For this every question keeps a copy of the Mamba states on the CPU: 16 MB each for the 9B.

        Raises:
            ValueError: if there is no question.
        """
        self._check_idle()
        if not self._points:
            raise ValueError("there is no question to take back")
        self._return_to(self._points.pop())

    def fork(self) -> "LongLlavaSession":
        """A second session with the same past. It shares the cache's memory as far as neither writes over the other.

        Forks that are asked one after the other, each dropped before the next, need no memory of their own. Of several
        that live at the same time, one goes on in place and every other copies the cache when it reads or answers.
        """
        self._check_idle()
        other = object.__new__(LongLlavaSession)
        other.__dict__.update(self.__dict__)
        other.options, other._points = dict(self.options), list(self._points)
        with self._computing():
            other._cache = self._cache.fork()
        return other

    def _point(self) -> _Point:
        with self._computing():
            snapshot = self._cache.on_cpu(self._cache.snapshot())
        return _Point(snapshot, self.num_tokens, self._messages, self._pictures, self._anchor)

    def _return_to(self, point: _Point) -> None:
        with self._computing():
            self._cache.restore(point.cache)
        self._ids = self._ids[:, : point.tokens]
        self._messages, self._pictures, self._anchor = point.messages, point.pictures, point.anchor

    def _check_idle(self) -> None:
        if self._busy:
            raise RuntimeError(
                "another call of this session is running; if an answer is being streamed, exhaust its iterator or "
                "close it"
            )

    @contextmanager
    def _undone_on_error(self, keep: bool = False) -> Iterator[None]:
        """Go back to the present state if the block fails. `keep` leaves that point for `rewind`."""
        self._check_idle()
        self._check_model()
        self._points.append(self._point())
        self._busy = True
        try:
            yield
        except BaseException:
            self._return_to(self._points.pop())
            raise
        else:
            if not keep:
                self._points.pop()
        finally:
            self._busy = False

    def _check_model(self) -> None:
        if self.model.training:
            raise ValueError("the model is in training mode: call model.eval() first")
        for layer in self._cache.layers:
            if isinstance(layer, GrowingLayer) and layer.is_initialized and layer.keys.dtype != self.model.dtype:
                raise ValueError(
                    f"the session was read in {layer.keys.dtype}, but the model is {self.model.dtype} now"
                )

    def save(self, path: str | Path) -> None:
        """Write the session, without pictures, to one safetensors file; an older file of that name stays until then.

        The file holds the cache, and the Mamba states that `rewind` needs for each question.

        Raises:
            FileNotFoundError: if there is no such folder.
        """
        self._check_idle()
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent} for the session {path.name}")
        snapshots: list[Snapshot] = []  # points share them

        def number(snapshot: Snapshot) -> int:
            for index, known in enumerate(snapshots):
                if known is snapshot:
                    return index
            snapshots.append(snapshot)
            return len(snapshots) - 1

        def describe(point: _Point) -> dict[str, Any]:
            anchor = point.anchor._asdict() | {"cache": number(point.anchor.cache)}
            return point._asdict() | {"cache": number(point.cache), "anchor": anchor}

        points = [describe(point) for point in (*self._points, self._point())]
        header = {
            "format": FORMAT,
            "config": _fingerprint(self.model),
            "dtype": str(self.model.dtype),
            "options": self.options,
            "points": points,
            "snapshots": [snapshot.length for snapshot in snapshots],
        }
        tensors = {"ids": self._ids}
        for index, layer in enumerate(self._cache.layers):
            if isinstance(layer, GrowingLayer) and layer.is_initialized:
                tensors[f"layers.{index}.keys"] = layer.keys.cpu().contiguous()
                tensors[f"layers.{index}.values"] = layer.values.cpu().contiguous()
        for place, snapshot in enumerate(snapshots):
            for index, states in enumerate(snapshot.states):
                if states is not None:
                    tensors[f"snapshots.{place}.{index}.convolution"] = states[0].cpu().contiguous()
                    tensors[f"snapshots.{place}.{index}.state"] = states[1].cpu().contiguous()
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata={"longllava_session": json.dumps(header, default=_as_number)})
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path, model: Any, processor: Any) -> "LongLlavaSession":
        """A saved session, to go on with `model`, which must be the one that read it.

        Raises:
            ValueError: if the file is cut off or no session, of another format, or of a model with another
                configuration, other weights or another dtype; the message names what differs and both values.
        """
        if any(weight.is_meta for weight in model.parameters()):
            raise ValueError("a session is loaded for a model whose weights are in place, not for an offloaded one")
        session = cls(model, processor)
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("longllava_session", "null"))
                if header is None:
                    raise ValueError(f"{path} is a safetensors file, but no saved session")
                _check_header(path, header, model)
                with session._computing():
                    session._fill(file, header)
        except SafetensorError as error:
            raise ValueError(f"{path} is cut off or not a saved session: {error}") from error
        return session

    def _fill(self, file: Any, header: dict[str, Any]) -> None:
        layers = self.model.model.language_model.layers
        devices = [next(layer.parameters()).device for layer in layers]
        names = set(file.keys())

        def tensor(name: str, layer: int) -> Tensor:
            return file.get_tensor(name).to(devices[layer])

        for index, layer in enumerate(self._cache.layers):
            if isinstance(layer, GrowingLayer) and f"layers.{index}.keys" in names:
                layer.update(tensor(f"layers.{index}.keys", index), tensor(f"layers.{index}.values", index))
        snapshots = [
            Snapshot(
                length,
                tuple(
                    (tensor(f"{name}.convolution", index), tensor(f"{name}.state", index))
                    if (name := f"snapshots.{place}.{index}") + ".state" in names
                    else None
                    for index in range(len(layers))
                ),
            )
            for place, length in enumerate(header["snapshots"])
        ]
        points = []
        for entry in header["points"]:
            anchor = _Anchor(**entry["anchor"] | {"cache": snapshots[entry["anchor"]["cache"]]})
            messages = tuple({**message, "content": tuple(message["content"])} for message in entry["messages"])
            points.append(
                _Point(**entry | {"cache": snapshots[entry["cache"]], "anchor": anchor, "messages": messages})
            )
        self.options = header["options"]
        self._ids = file.get_tensor("ids")
        *self._points, present = points
        self._return_to(present)


def _as_list(images: Any) -> list[Any]:
    """One picture or several, as a list."""
    one = isinstance(images, str | bytes | Path | Image.Image | dict)
    if isinstance(images, np.ndarray | Tensor):
        one = images.ndim < 4
    return [images] if one else list(images)


def _block(kind: str, source: Any) -> dict[str, Any]:
    """A content block with the path or URL of its source; not with one that is the picture itself, as `data:` URLs."""
    named = isinstance(source, Path) or (isinstance(source, str) and len(source) < 4096 and source[:5] != "data:")
    return {"type": kind, "path": str(source)} if named else {"type": kind}


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"{name} is no option of a session; there are {', '.join(OPTIONS)}")


def _as_number(value: Any) -> Any:
    """A number of numpy as JSON knows it."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"an option of the session is a {type(value).__name__}, which cannot be saved")


def _fingerprint(model: Any) -> dict[str, Any]:
    """What decides whether a cache belongs to a model: sizes, and a checksum over a few numbers of every weight."""
    config = model.config
    parts: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
        ("", config, CONFIG_KEYS),
        ("text_config.", config.text_config, TEXT_KEYS),
        ("vision_config.", config.vision_config, VISION_KEYS),
    )
    found = {prefix + key: getattr(part, key) for prefix, part, keys in parts for key in keys}
    checksum = 0
    for weight in model.parameters():
        if not weight.is_meta:
            checksum = zlib.crc32(weight.detach().flatten()[:8].float().cpu().numpy().tobytes(), checksum)
    return found | {"checksum of the weights": checksum}


def _check_header(path: str | Path, header: dict[str, Any], model: Any) -> None:
    if header["format"] != FORMAT:
        raise ValueError(f"{path} is a session of format {header['format']}, but this version reads format {FORMAT}")
    if header["dtype"] != str(model.dtype):
        raise ValueError(f"{path} was read in {header['dtype']}, but the model is {model.dtype}")
    own = _fingerprint(model)
    for name, value in header["config"].items():
        if own.get(name) != value:
            raise ValueError(f"{path} is of another model: its {name} is {value}, that of this model {own.get(name)}")


__all__ = ["LongLlavaSession", "Watched"]
