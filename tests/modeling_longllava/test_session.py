"""Sessions: every answer equals that of a fresh `generate`, nothing is read twice, and nothing is lost on an error."""

import itertools
import json
import struct
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from longllava.modeling_longllava import LongLlavaSession
from longllava.modeling_longllava.session import Watched

OPTIONS = {"max_new_tokens": 6}


def image(source: Any) -> dict[str, Any]:
    return {"type": "image", "image": source}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*content: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text(words)]}


class Pair:
    """A model and its processor, and what both say to a whole conversation at once."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor
        self.encoded = 0  # pictures that went through the vision tower
        self.model.model.vision_tower.embeddings.register_forward_hook(self._count)

    def _count(self, _: Any, args: tuple[Any, ...], __: Any) -> None:
        self.encoded += len(args[0])

    def session(self, **options: Any) -> LongLlavaSession:
        return LongLlavaSession(self.model, self.processor, **options)

    def fresh(self, messages: list[dict[str, Any]], **options: Any) -> str:
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
        )
        output = self.model.generate(**inputs, **OPTIONS)[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(output, skip_special_tokens=True)


@pytest.fixture
def pair(tiny_model: Callable[..., Any], tiny_processor: Callable[..., Any]) -> Pair:
    model = tiny_model()
    # The image token means a picture, and random bytes are seldom text: only letters are answered.
    letters = {4 + index for index in range(256)} - {4 + index for index in range(ord("z") - ord("!"))}
    model.generation_config.suppress_tokens = [3, *sorted(letters)]
    model.generation_config.do_sample = False
    return Pair(model, tiny_processor())


def test_answers_equal_those_of_a_fresh_generate(pair: Pair, pictures: list[Image.Image], video_file: Path) -> None:
    session = pair.session(num_frames=4)
    assert session.watch(images=pictures[:2]) == [Watched(1, 4), Watched(1, 4)]
    assert session.watch(video=video_file) == [Watched(4, 16)]
    video = {"type": "video", "path": str(video_file)}
    history = [user(image(pictures[0]), image(pictures[1]), video, text("What is it?"))]
    first = session.ask("What is it?", **OPTIONS)
    assert first == pair.fresh(history, num_frames=4) and len(first) > 0
    pair.encoded = 0
    history += [assistant(first), user(text("And now?"))]
    second = session.ask("And now?", **OPTIONS)
    assert pair.encoded == 0
    assert second == pair.fresh(history, num_frames=4)
    pair.encoded = 0
    session.watch(images=pictures[2])
    assert pair.encoded == 1
    history += [assistant(second), user(image(pictures[2]), text("Again?"))]
    assert session.ask("Again?", **OPTIONS) == pair.fresh(history, num_frames=4)
    assert session.num_pictures == 7
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 3


def test_tiles_and_tokens_of_a_call(pair: Pair) -> None:
    big = Image.effect_noise((170, 110), 90).convert("RGB")
    session = pair.session()
    watched = session.watch(images=[big], sub_images=True, tokens_per_image=16)
    expected = pair.fresh([user(image(big), text("Where?"))], sub_images=True, tokens_per_image=16)
    assert watched[0].views > 1 and watched[0].tokens == 16 * watched[0].views == 16 * session.num_pictures
    assert session.ask("Where?", **OPTIONS) == expected


def test_a_conversation_without_pictures(pair: Pair) -> None:
    session = pair.session()
    first = session.ask("Hello", **OPTIONS)
    assert first == pair.fresh([user(text("Hello"))])
    second = session.ask("Again", **OPTIONS)
    assert second == pair.fresh([user(text("Hello")), assistant(first), user(text("Again"))])


def test_live_frames_take_options(pair: Pair, pictures: list[Image.Image]) -> None:
    session = pair.session()
    assert session.watch(video=iter(pictures), tokens_per_frame=1) == [Watched(4, 4)]
    expected = pair.fresh([user({"type": "video", "video": pictures}, text("Who?"))], tokens_per_frame=1)
    assert session.ask("Who?", **OPTIONS) == expected


def test_a_template_that_changes_what_was_read_is_an_error(pair: Pair, pictures: list[Image.Image]) -> None:
    session = pair.session()
    session.watch(images=pictures)
    template = pair.processor.chat_template
    pair.processor.chat_template = template.replace("<|User|>", "<|Human|>")
    before = session.messages, session.num_tokens
    with pytest.raises(ValueError, match="the first .* characters of this conversation otherwise"):
        session.ask("What?")
    assert (session.messages, session.num_tokens) == before
    pair.processor.chat_template = template
    assert session.ask("What?", **OPTIONS) == pair.fresh([user(*map(image, pictures), text("What?"))])


def test_an_answer_that_spells_a_placeholder_does_not_end_the_conversation(pair: Pair, pictures, monkeypatch) -> None:
    session = pair.session()
    session.watch(images=pictures[:1])
    decode = pair.processor.tokenizer.decode
    monkeypatch.setattr(pair.processor.tokenizer, "decode", lambda *_, **__: "use <video> or <image>")
    assert session.ask("How?", **OPTIONS) == "use <video> or <image>"
    monkeypatch.setattr(pair.processor.tokenizer, "decode", decode)
    session.watch(images=pictures[1:2])
    history = [user(image(pictures[0]), text("How?")), assistant("use < video> or < image>")]
    expected = pair.fresh([*history, user(image(pictures[1]), text("And?"))])
    assert session.ask("And?", **OPTIONS) == expected


@pytest.mark.parametrize("mode", ["inference", "autocast"])
def test_the_modes_of_the_caller_do_not_reach_the_cache(pair: Pair, pictures: list[Image.Image], mode: str) -> None:
    modes = {"inference": torch.inference_mode(), "autocast": torch.autocast("cpu", torch.bfloat16)}
    session = pair.session()
    with modes[mode]:
        session.watch(images=pictures)
        first = "".join(session.fork().stream("What?", **OPTIONS))
        assert session.ask("What?", **OPTIONS) == first
    assert first == pair.fresh([user(*map(image, pictures), text("What?"))])
    session.rewind()
    assert session.ask("What?", **OPTIONS) == first


def test_forks_in_threads_keep_apart(pair: Pair, pictures: list[Image.Image]) -> None:
    """With a switch of threads after every few operations, a race for the room behind the past would show."""
    session = pair.session()
    session.watch(images=pictures[:2])
    questions = [f"Question {number}" for number in range(4)]
    expected = [session.fork().ask(question, **OPTIONS) for question in questions]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                found = list(pool.map(lambda question: session.fork().ask(question, **OPTIONS), questions))
                assert found == expected
    finally:
        sys.setswitchinterval(interval)


def test_only_the_last_turn_is_read_again(pair: Pair) -> None:
    """A second answer that is tokenized otherwise does not cost the first turn."""
    pair.model.generation_config.suppress_tokens += [0, 1, 2]  # which no tokenizer makes of an answer
    session = pair.session()
    session.ask("A long question " * 20, **OPTIONS)
    session.ask("Second?", **OPTIONS)
    read: list[int] = []
    hook = lambda _, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1])  # noqa: E731
    pair.model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    session._ids[0, -2] += 1
    session.ask("Third?", **OPTIONS)
    assert 20 < read[0] < 200 < session.num_tokens


@pytest.mark.parametrize("frames", [1, 5, 70])
def test_live_frames(pair: Pair, frames: int, pictures: list[Image.Image]) -> None:
    """More frames than one group; the video ends where the iterator does."""
    shown = list(itertools.islice(itertools.cycle(pictures), frames))
    session = pair.session()
    assert session.watch(video=iter(shown)) == [Watched(frames, 4 * frames)]
    expected = pair.fresh([user({"type": "video", "video": shown}, text("Who?"))], num_frames=frames)
    assert session.ask("Who?", **OPTIONS) == expected


def test_an_iterator_of_pictures(pair: Pair, pictures: list[Image.Image]) -> None:
    session = pair.session()
    assert len(session.watch(images=iter(pictures * 20))) == 80
    expected = pair.fresh([user(*(image(picture) for picture in pictures * 20), text("Who?"))])
    assert session.ask("Who?", **OPTIONS) == expected


def test_an_answer_that_is_tokenized_otherwise_is_read_again(pair: Pair, pictures: list[Image.Image]) -> None:
    """The model may spell an answer as no tokenizer would; then the cache goes back to the last picture."""
    session = pair.session()
    session.watch(images=pictures[:1])
    answer = session.ask("What?", **OPTIONS)
    session._ids[0, -2] += 1  # as if another token stood there
    history = [user(image(pictures[0]), text("What?")), assistant(answer), user(text("And?"))]
    pair.encoded = 0
    assert session.ask("And?", **OPTIONS) == pair.fresh(history)
    session.rewind()  # the point before the second question has lost its tokens, not its text
    history[2] = user(text("Why?"))
    assert session.ask("Why?", **OPTIONS) == pair.fresh(history)
    assert pair.encoded == 2  # by the fresh runs


def test_streaming_gives_the_same_answer_in_pieces(pair: Pair, pictures: list[Image.Image]) -> None:
    session = pair.session()
    session.watch(images=pictures)
    other = session.fork()
    pieces = list(session.stream("What is it?", **OPTIONS))
    assert "".join(pieces) == other.ask("What is it?", **OPTIONS)
    assert session.messages == other.messages and session.num_tokens == other.num_tokens
    assert session.ask("And?", **OPTIONS) == other.ask("And?", **OPTIONS)


def test_a_stream_closed_early_keeps_what_was_written(pair: Pair) -> None:
    space = pair.processor.tokenizer.encode(" ", add_special_tokens=False)[0]

    def words(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Every third token is a space: text is streamed in whole words."""
        if ids.shape[1] % 3 == 0:
            scores = torch.full_like(scores, -100.0)
            scores[:, space] = 0.0
        return scores

    session = pair.session()
    pieces = session.stream("What is it?", max_new_tokens=500, logits_processor=[words])
    first = next(pieces)
    with pytest.raises(RuntimeError, match="another call .* being streamed"):
        session.ask("Too early")
    pieces.close()
    kept = session.messages[1]["content"][0]["text"]
    assert kept.startswith(first) and session.num_tokens < 500
    history = [user(text("What is it?")), assistant(kept), user(text("Go on"))]
    assert session.ask("Go on", **OPTIONS) == pair.fresh(history)


def test_a_stream_that_fails_leaves_the_session_alone(pair: Pair) -> None:
    session = pair.session()
    session.ask("First", **OPTIONS)
    before = session.messages, session.num_tokens
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(session.stream("Second", max_new_tokens=-1))
    assert (session.messages, session.num_tokens) == before


def test_forks_are_independent_and_read_nothing(pair: Pair, pictures: list[Image.Image]) -> None:
    session = pair.session()
    session.watch(images=pictures)
    pair.encoded = 0
    keys = next(layer for layer in session._cache.layers if hasattr(layer, "keys")).keys
    for question in ("One?", "Two?", "Three?"):
        fork = session.fork()
        expected = pair.fresh([user(*(image(picture) for picture in pictures), text(question))])
        pair.encoded = 0
        assert fork.ask(question, **OPTIONS) == expected
        assert pair.encoded == 0
        forked = next(layer for layer in fork._cache.layers if hasattr(layer, "keys")).keys
        assert forked.data_ptr() == keys.data_ptr()  # the memory of the past is shared
        del fork, forked
    assert session.num_tokens == keys.shape[2] and len(session.messages) == 1
    alive = [session.fork() for _ in range(3)]
    answers = [fork.ask(f"Question {number}", **OPTIONS) for number, fork in enumerate(alive)]
    for number, answer in enumerate(answers):
        content = [*(image(picture) for picture in pictures), text(f"Question {number}")]
        assert answer == pair.fresh([user(*content)])


def test_rewind_takes_questions_back(pair: Pair, pictures: list[Image.Image]) -> None:
    session = pair.session()
    session.watch(images=pictures[:2])
    start = session.num_tokens, session.messages
    first = session.ask("What?", **OPTIONS)
    between = session.num_tokens, session.messages
    session.watch(images=pictures[2:])
    session.ask("And these?", **OPTIONS)
    session.rewind()
    history = [user(image(pictures[0]), image(pictures[1]), text("What?")), assistant(first)]
    assert session.num_pictures == 4  # watched before the question that was taken back
    content = [image(pictures[2]), image(pictures[3]), text("Why?")]
    assert session.ask("Why?", **OPTIONS) == pair.fresh([*history, user(*content)])
    session.rewind()
    session.rewind()
    assert (session.num_tokens, session.messages) == start != between
    assert session.ask("What?", **OPTIONS) == first
    session.rewind()
    with pytest.raises(ValueError, match="no question"):
        session.rewind()


def test_saved_today_asked_tomorrow(pair: Pair, pictures: list[Image.Image], tmp_path: Path) -> None:
    session = pair.session(tokens_per_image=1)
    session.watch(images=pictures)
    session.ask("First?", **OPTIONS)
    path = tmp_path / "session.safetensors"
    session.save(path)
    pair.encoded = 0
    loaded = LongLlavaSession.load(path, pair.model, pair.processor)
    assert loaded.messages == session.messages and loaded.num_tokens == session.num_tokens
    assert loaded.watch(images=pictures[0]) == session.watch(images=pictures[0]) == [Watched(1, 1)]
    assert loaded.ask("Second?", **OPTIONS) == session.ask("Second?", **OPTIONS)
    for _ in range(2):
        loaded.rewind()
        session.rewind()
    assert loaded.ask("Other?", **OPTIONS) == session.ask("Other?", **OPTIONS)
    assert pair.encoded == 2 and list(tmp_path.iterdir()) == [path]


def test_an_empty_session_can_be_saved(pair: Pair, tmp_path: Path) -> None:
    pair.session().save(tmp_path / "empty")
    loaded = LongLlavaSession.load(tmp_path / "empty", pair.model, pair.processor)
    assert loaded.ask("Hello", **OPTIONS) == pair.fresh([user(text("Hello"))])


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    own = json.loads(header["__metadata__"]["longllava_session"])
    change(own)
    header["__metadata__"]["longllava_session"] = json.dumps(own)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + size :])


def test_files_that_do_not_fit_are_named(pair: Pair, pictures, tmp_path, tiny_model, tiny_processor) -> None:
    session = pair.session()
    session.watch(images=pictures[0])
    path = tmp_path / "session"
    session.save(path)
    for other, message in (
        (tiny_model(num_experts=1), "num_experts is 4, that of this model 1"),
        (tiny_model(seed=1), "checksum of the weights is"),
        (tiny_model(tokens_per_image=1), "tokens_per_image is 4, that of this model 1"),
        (tiny_model().bfloat16(), "torch.float32, but the model is torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            LongLlavaSession.load(path, other, pair.processor)
    whole = path.read_bytes()
    for cut in (4, 2000, len(whole) - 10):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cut off or not a saved session"):
            LongLlavaSession.load(path, pair.model, pair.processor)
    path.write_bytes(whole)
    rewrite_header(path, lambda own: own.update(format=99))
    with pytest.raises(ValueError, match="format 99, but this version reads format 1"):
        LongLlavaSession.load(path, pair.model, pair.processor)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no saved session"):
        LongLlavaSession.load(path, pair.model, pair.processor)
    with pytest.raises(FileNotFoundError):
        LongLlavaSession.load(tmp_path / "nothing", pair.model, pair.processor)


@pytest.mark.parametrize("live", [False, True])
def test_an_unreadable_picture_in_the_middle_changes_nothing(pair: Pair, pictures, tmp_path: Path, live) -> None:
    """The bad one comes when the ones before it are in the cache already."""
    pair.model.config.prefill_chunk_size = 16
    bad = tmp_path / "bad.png"
    pictures[0].save(bad)
    bad.write_bytes(bad.read_bytes()[:-200])
    session = pair.session()
    session.watch(images=pictures[:2])
    answer = session.ask("What?", **OPTIONS)
    before = session.messages, session.num_tokens, session.num_pictures
    stream = [*pictures * 20, bad, *pictures]
    pair.encoded = 0
    with pytest.raises(ValueError, match="bad.png"):
        session.watch(video=iter(stream)) if live else session.watch(images=stream)
    assert pair.encoded > 0
    assert (session.messages, session.num_tokens, session.num_pictures) == before
    history = [user(image(pictures[0]), image(pictures[1]), text("What?")), assistant(answer), user(text("And?"))]
    assert session.ask("And?", **OPTIONS) == pair.fresh(history)


def test_bad_calls_change_nothing(pair: Pair, pictures: list[Image.Image], tiny_processor) -> None:
    session = pair.session()
    session.watch(images=pictures[0])
    before = session.messages, session.num_tokens
    for call, message in (
        (lambda: session.ask("  "), "empty"),
        (lambda: session.ask("<image>?"), "cannot contain <image>"),
        (lambda: session.ask("What?", num_beams=3), "num_beams is 3"),
        (lambda: session.watch(), "one of the two"),
        (lambda: session.watch(images=pictures, video=pictures), "one of the two"),
        (lambda: session.watch(video=iter([])), "before its first frame"),
        (lambda: session.watch(images=[]), "0 pictures"),
        (lambda: session.watch(images=iter([])), "0 pictures"),
        (lambda: session.watch(video=iter(pictures), fps=2.0), "fps is 2.0, but of live frames each"),
        (lambda: session.watch(images=pictures, token_per_image=4), "token_per_image is no option"),
        (lambda: list(session.stream("What?", streamer=None)), "a streamer of its own"),
        (lambda: session.ask("What?", generation_config=GenerationConfig(num_beams=3)), "num_beams is 3"),
        (lambda: session.watch(images=pictures, tokens_per_image=5), "tokens_per_image=5"),
        (lambda: session.ask("What?", max_new_tokens=-1), "max_new_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert (session.messages, session.num_tokens) == before
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        session.save(Path("nowhere") / "session")
    pair.model.train()
    with pytest.raises(ValueError, match="training mode"):
        session.ask("What?")
    pair.model.eval().bfloat16()
    with pytest.raises(ValueError, match="torch.float32, but the model is torch.bfloat16"):
        session.ask("What?")
    pair.model.float()
    pair.model.config.image_token_id = 7
    with pytest.raises(ValueError, match="id 3, that of the model 7"):
        pair.session()
