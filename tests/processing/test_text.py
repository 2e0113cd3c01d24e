"""Prompts, ids, labels: the protocol, and every way to give placeholders and pictures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaImageProcessor, PreTrainedTokenizerFast

from longllava.processing import LongLlavaProcessor

ROLES = {"human": "user", "gpt": "assistant"}
NAMES = ["text", "one_image", "two_images", "interleaved", "multi_turn", "video", "sub_images_2x3"]
IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def shades(count: int, size: tuple[int, int] = (56, 56)) -> list[Image.Image]:
    """Pictures of one grey each, rising: a picture's place shows in its first pixel."""
    return [Image.new("RGB", size, (10 * index,) * 3) for index in range(1, count + 1)]


def order(processor: LongLlavaProcessor, pixel_values: torch.Tensor) -> list[int]:
    """Which of `shades` (1, 2, ...) each of the pixel values (N, 3, S, S) came from."""
    mean, std = processor.image_processor.image_mean[0], processor.image_processor.image_std[0]
    return [round((value * std + mean) * 255 / 10) for value in pixel_values[:, 0, 28, 28].tolist()]


@pytest.fixture(scope="module")
def jamba_processor(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> LongLlavaProcessor:
    """With the tokenizer of the released checkpoints, its piece 516 renamed to `<image>`."""
    source = shared / "jamba_tokenizer"
    if not source.is_dir():
        pytest.skip("no ../shared/jamba_tokenizer: ids of the released checkpoints cannot be checked")
    folder = tmp_path_factory.mktemp("jamba_tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text((source / name).read_text().replace("<|reserved_0|>", "<image>"))
    # Not AutoTokenizer: it would take the file for a Llama tokenizer and build the handling of spaces anew.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    image_processor = LlavaImageProcessor(
        do_pad=True, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    return LongLlavaProcessor(image_processor, tokenizer)


@pytest.fixture
def case(reference: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    cases = json.loads((reference / "text_protocol.json").read_text())
    return next(entry for entry in cases if entry["name"] == request.param)


def messages_of(case: dict[str, Any]) -> tuple[list[dict[str, str]], list[Image.Image] | None]:
    messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in case["conversations"]]
    return messages, shades(sum(turn["content"].count("<image>") for turn in messages)) or None


def as_original(ids: torch.Tensor, processor: LongLlavaProcessor) -> list[int]:
    return [-200 if token == processor.image_token_id else token for token in ids.tolist()]


@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_reference_prompt_ids_and_labels(case: dict[str, Any], jamba_processor: LongLlavaProcessor) -> None:
    messages, images = messages_of(case)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "images": images, "tokens_per_image": 1}

    assert jamba_processor.apply_chat_template(messages[:-1], add_generation_prompt=True) == case["prompt"]
    prompt = jamba_processor.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
    assert as_original(prompt["input_ids"][0], jamba_processor) == case["prompt_ids"]

    row = jamba_processor.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
    assert as_original(row["input_ids"][0], jamba_processor) == case["train_input_ids"]
    assert jamba_processor.build_labels(row["input_ids"], row["assistant_masks"])[0].tolist() == case["train_labels"]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_reference_labels_in_a_batch_with_expanded_pictures(
    reference: Path, jamba_processor: LongLlavaProcessor, padding_side: str
) -> None:
    """All seven at once, 36 tokens per picture: labels without their -100 are those of the reference."""
    cases = json.loads((reference / "text_protocol.json").read_text())
    batch = [messages_of(case) for case in cases]
    row = jamba_processor.apply_chat_template(
        [messages for messages, _ in batch],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        images=[images or [] for _, images in batch],
        tokens_per_image=36,
        padding_side=padding_side,
    )
    labels = jamba_processor.build_labels(row["input_ids"], row["assistant_masks"])
    for case, found, ids in zip(cases, labels, row["input_ids"], strict=True):
        assert [label for label in found.tolist() if label != -100] == [
            label for label in case["train_labels"] if label != -100
        ]
        pictures = case["train_input_ids"].count(-200)
        assert (ids == jamba_processor.image_token_id).sum() == 36 * pictures


@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        ("two_images", [IMAGE, IMAGE, text("Which one is larger?")]),
        ("interleaved", [text("Look at "), IMAGE, text(" and then at "), IMAGE, text(". What changed?")]),
        ("one_image", [IMAGE, text("\nWhat does the picture show?")]),
    ],
    indirect=["case"],
)
def test_blocks_give_the_reference_prompt(case: dict[str, Any], blocks: list, tiny_processor: Callable) -> None:
    processor = tiny_processor()
    messages = [{"role": "user", "content": blocks}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == case["prompt"]


@pytest.mark.parametrize("case", ["video"], indirect=True)
def test_video_block_gives_the_reference_prompt(case: dict[str, Any], tiny_processor: Callable) -> None:
    processor = tiny_processor()
    content = [{"type": "video", "video": shades(4)}, text("What happens?")]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        tokens_per_image=1,
    )
    assert processor.decode(inputs["input_ids"][0]) == case["prompt"]
    assert order(processor, inputs["pixel_values"]) == [1, 2, 3, 4]


@pytest.mark.parametrize("case", ["sub_images_2x3"], indirect=True)
@pytest.mark.parametrize("content", ["<img><image></img>\nRead the sign.", [IMAGE, text("Read the sign.")]])
def test_tiles_give_the_reference_prompt(case: dict[str, Any], content: Any, tiny_processor: Callable) -> None:
    processor = tiny_processor()
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        images=[Image.new("RGB", (3 * 56, 2 * 56))],
        tokens_per_image=1,
        sub_images=True,
    )
    assert processor.decode(inputs["input_ids"][0]) == case["prompt"]
    assert inputs["image_grid_hw"].tolist() == [[1, 1]] * 7


def test_thousand_pictures_take_their_tokens(tiny_processor: Callable) -> None:
    processor = tiny_processor(tokens_per_image=16)
    images = shades(4) * 250
    inputs = processor(text="<img><image></img>" * 1000 + "How many?", images=images)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 16000
    assert inputs["pixel_values"].shape == (1000, 3, 56, 56)
    assert inputs["pixel_values"].dtype == torch.float32
    assert inputs["image_grid_hw"].tolist() == [[4, 4]] * 1000
    assert inputs["input_ids"].dtype == inputs["image_grid_hw"].dtype == torch.int64


def test_pictures_and_videos_come_in_prompt_order(tiny_processor: Callable) -> None:
    """Image, video, image in one prompt and video, image in the next, with own token counts for both kinds."""
    processor = tiny_processor()
    one, two, three, four, five, six, seven = shades(7)
    inputs = processor(
        text=["a<image>b<video>c<image>", "<video><image>d"],
        images=[[one, four], [seven]],
        videos=[[[two, three]], [[five, six]]],
        tokens_per_image=4,
        tokens_per_frame=1,
    )
    assert order(processor, inputs["pixel_values"]) == [1, 2, 3, 4, 5, 6, 7]
    assert inputs["image_grid_hw"].tolist() == [[2, 2], [1, 1], [1, 1], [2, 2], [1, 1], [1, 1], [2, 2]]
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [10, 6]
    assert inputs["attention_mask"].sum(1).tolist() == [
        len("ab<vid><img></img><t><img></img></vid>c") + 10,
        len("<vid><img></img><t><img></img></vid>d") + 6,
    ]


def test_frames_follow_the_tokens_of_pictures(tiny_processor: Callable) -> None:
    """A count of the call for pictures holds for frames too, unless the checkpoint has one for frames."""
    frames = shades(2)
    assert (
        tiny_processor()(text="<video>", videos=frames, tokens_per_image=1)["image_grid_hw"].tolist() == [[1, 1]] * 2
    )
    kept = tiny_processor(tokens_per_frame=16)(text="<video>", videos=frames, tokens_per_image=1)
    assert kept["image_grid_hw"].tolist() == [[4, 4]] * 2


@pytest.mark.parametrize(
    "images",
    [
        lambda a, b, c: [a, b, c],
        lambda a, b, c: [[a], [b, c]],
        lambda a, b, c: torch.stack([torch.tensor(list(x.tobytes())).reshape(56, 56, 3) for x in (a, b, c)]),
    ],
    ids=["flat", "nested", "one tensor"],
)
def test_layouts_of_images(images: Callable, tiny_processor: Callable) -> None:
    processor = tiny_processor()
    inputs = processor(text=["<image>", "<image><image>"], images=images(*shades(3)))
    assert order(processor, inputs["pixel_values"]) == [1, 2, 3]


def test_rows_of_a_batch_equal_single_rows(tiny_processor: Callable) -> None:
    """Left padding, different numbers of pictures, one row with tiles: each row is what it is alone."""
    processor = tiny_processor()
    texts, images = ["<image>?", "none", "<image>, <image>!"], [shades(1, (100, 56)), [], shades(2)]
    batch = processor(text=texts, images=images, sub_images=[True, False, False])
    seen = 0
    for index, (prompt, own) in enumerate(zip(texts, images, strict=True)):
        single = processor(text=prompt, images=own, sub_images=index == 0)
        length = single["input_ids"].shape[1]
        assert batch["input_ids"][index, -length:].equal(single["input_ids"][0])
        assert batch["attention_mask"][index].tolist() == [0] * (batch["input_ids"].shape[1] - length) + [1] * length
        if own:
            count = len(single["pixel_values"])
            assert batch["pixel_values"][seen : seen + count].equal(single["pixel_values"])
            seen += count
    assert seen == len(batch["pixel_values"]) == 5


def test_text_alone_and_pictures_alone(tiny_processor: Callable) -> None:
    processor = tiny_processor()
    assert set(processor(text="hello")) == {"input_ids", "attention_mask"}
    assert set(processor(text="hello", images=[], videos=[])) == {"input_ids", "attention_mask"}
    inputs = processor(images=shades(2))
    assert set(inputs) == {"pixel_values", "image_grid_hw"} and len(inputs["pixel_values"]) == 2


def test_padding_truncation_and_start_token(tiny_processor: Callable) -> None:
    processor = tiny_processor()
    assert processor(text="abc", padding="max_length", max_length=6)["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1]]
    assert processor(text="abc", pad_to_multiple_of=8, padding_side="right")["input_ids"].shape == (1, 8)
    assert processor(text=["a", "bcd"], padding=False, return_tensors=None)["attention_mask"] == [[1], [1, 1, 1]]
    assert processor(text="abcdef", truncation=True, max_length=4)["input_ids"].shape == (1, 4)
    for prompt in ("a", "<|startoftext|>a"):
        ids = processor(text=prompt, add_special_tokens=True)["input_ids"]
        assert processor.decode(ids[0]) == "<|startoftext|>a"
    cut = processor(text="<image>abcdef", images=shades(1), truncation=True, max_length=6)
    assert processor.decode(cut["input_ids"][0]) == "<image>" * 4 + "ab"


def test_marks_of_picture_tokens_and_positions(tiny_processor: Callable) -> None:
    """Offsets lie in the text that was given, also behind and inside what a placeholder became."""
    processor = tiny_processor()
    prompt = "a<video>b<image><image>c"
    inputs = processor(
        text=prompt,
        images=shades(2),
        videos=shades(3),
        return_mm_token_type_ids=True,
        return_offsets_mapping=True,
    )
    assert inputs["mm_token_type_ids"].equal((inputs["input_ids"] == processor.image_token_id).long())
    offsets = inputs["offset_mapping"][0].tolist()
    assert {
        prompt[start:end] for (start, end), kind in zip(offsets, inputs["mm_token_type_ids"][0], strict=True) if kind
    } <= {
        "<image>",
        *(prompt[i:j] for i in range(1, 9) for j in range(i, 9)),
    }
    letters = [inputs["input_ids"][0].tolist().index(processor.tokenizer.convert_tokens_to_ids(c)) for c in "abc"]
    assert offsets[letters[0]] == [0, 1]
    assert offsets[-1] == [prompt.index("c"), len(prompt)]
    assert offsets[-5:-1] == [[prompt.rindex("<image>"), len(prompt) - 1]] * 4


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]


def labelled_text(processor: LongLlavaProcessor, messages: list, **options: Any) -> list[str]:
    row = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        **options,
    )
    labels = processor.build_labels(row["input_ids"], row["assistant_masks"])
    return processor.batch_decode([[label for label in line if label != -100] for line in labels.tolist()])


def test_labels_are_the_answers_whatever_they_say(tiny_processor: Callable) -> None:
    """Newlines in answers, an empty line, the strings of the roles in the user's text, pictures before and between."""
    processor = tiny_processor()
    messages = turns(
        "<image> say:\n<|startoftext|><|Assistant|>\nno",
        "one\n\ntwo\n",
        "<|Assistant|>\n<image>?",
        "three\n<|User|>\nfour",
    )
    end = "<|endoftext|>"
    expected = f"one\n\ntwo\n{end}three\n<|User|>\nfour{end}"
    assert labelled_text(processor, messages, images=shades(2)) == [expected]
    video = [{"type": "video", "video": shades(3)}, text("what?")]
    longer = [{"role": "user", "content": video}, *turns("", "yes")[1:]]
    assert labelled_text(processor, [longer, turns("q", "a")]) == [f"yes{end}", f"a{end}"]


def test_pictures_in_answers_are_not_taught(tiny_processor: Callable) -> None:
    """Four tokens of a picture in each answer have no label; the tags around it, which are text, have."""
    processor = tiny_processor()
    messages = turns("Draw.", "<img><image></img> so", "Again.", "<image>")
    taught = labelled_text(processor, messages, images=shades(2))
    assert taught == ["<img></img> so<|endoftext|><|endoftext|>"]


def test_system_message_opens_the_user_turn(tiny_processor: Callable) -> None:
    processor = tiny_processor()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [IMAGE, text("What?")]}]
    assert processor.apply_chat_template(messages) == "<|startoftext|><|User|>\nBe brief.\n<img><image></img>\nWhat?\n"
    with pytest.raises(Exception, match="followed by a user message"):
        processor.apply_chat_template(messages[:1])
    with pytest.raises(Exception, match="not 'tool'"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])
    with pytest.raises(Exception, match="not 'audio'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}])


def test_answer_can_be_continued(tiny_processor: Callable) -> None:
    prompt = tiny_processor().apply_chat_template(turns("q", "It is"), continue_final_message=True)
    assert prompt == "<|startoftext|><|User|>\nq\n<|startoftext|><|Assistant|>\nIt is"


def test_messages_are_left_as_they_are(tiny_processor: Callable) -> None:
    """Keys that hold None, as tables have them, and picture blocks of the OpenAI kind; nothing is written back."""
    block = {"type": "image_url", "image_url": {"url": "missing.png"}, "text": None}
    messages = [{"role": "user", "content": [block, {"type": "text", "text": "What?", "image": None}]}]
    before = json.dumps(messages)
    assert "<img><image></img>\nWhat?" in tiny_processor().apply_chat_template(messages)
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        tiny_processor().apply_chat_template(messages, tokenize=True)
    assert json.dumps(messages) == before


def test_tokens_are_counted_before_there_are_pictures(tiny_processor: Callable) -> None:
    processor = tiny_processor()
    sizes = [(56, 56), (112, 168), (1000, 10)]
    for options in ({}, {"sub_images": True}, {"sub_images": True, "max_tiles": 4, "tokens_per_image": 16}):
        data = processor._get_num_multimodal_tokens(image_sizes=sizes, **options)
        for (height, width), tokens, patches in zip(sizes, data.num_image_tokens, data.num_image_patches, strict=True):
            inputs = processor(text="<image>", images=Image.new("RGB", (width, height)), **options)
            assert (inputs["input_ids"] == processor.image_token_id).sum() == tokens
            assert len(inputs["pixel_values"]) == patches
    assert processor._get_num_multimodal_tokens(video_sizes=[(5, 8, 8)], tokens_per_frame=1).num_video_tokens == [5]
    for wrong in ({"tokens_per_image": 5}, {"tokens_per_frame": 5}, {"max_tiles": 0}):
        with pytest.raises(ValueError) as expected:
            processor(text="x", **wrong)
        with pytest.raises(ValueError) as found:
            processor._get_num_multimodal_tokens(image_sizes=sizes, video_sizes=[(5, 8, 8)], **wrong)
        assert str(found.value) == str(expected.value)


def test_whole_numbers_of_tokens_may_be_floats(tiny_processor: Callable) -> None:
    """As JSON and sliders give them."""
    inputs = tiny_processor()(text="<image>", images=shades(1), tokens_per_image=16.0)
    assert inputs["image_grid_hw"].tolist() == [[4, 4]]
    assert inputs["image_grid_hw"].dtype == torch.int64


def test_answers_are_decoded_without_special_tokens(tiny_processor: Callable) -> None:
    processor = tiny_processor()
    ids = processor(text=["<image>yes<|endoftext|>", "no"], images=shades(1))["input_ids"]
    assert processor.post_process_image_text_to_text(ids) == ["yes", "no"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["yes", "no"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"text": "<image><image>", "images": shades(3)}, "the prompt has 2 <image> placeholders, but 3 images"),
        ({"text": "<image><image>"}, "the prompt has 2 <image> placeholders, but 0 images"),
        ({"text": "none", "images": shades(1)}, "the prompt has 0 <image> placeholders, but 1 images"),
        ({"text": ["<image>", "<image>"], "images": shades(3)}, "2 prompts have 2 <image> placeholders, but 3 images"),
        ({"text": ["<image>", ""], "images": [[], shades(1)]}, "prompt 0 has 1 <image> placeholders, but 0 images"),
        ({"text": ["<image>"], "images": [shades(1), shades(1)]}, "2 lists of images are given for 1 prompts"),
        ({"text": "<video>", "videos": []}, "the prompt has 1 <video> placeholders, but 0 videos"),
        ({"text": "none", "videos": ["a.mp4"]}, "the prompt has 0 <video> placeholders, but 1 videos"),
        (
            {"text": "<image>", "images": shades(1), "tokens_per_image": 5},
            r"tokens_per_image=5 is not the square of a divisor of .* 4 x 4 patches; usable: \[1, 4, 16\]",
        ),
        (
            {"text": "<image>", "images": shades(1), "tokens_per_image": 9},
            r"tokens_per_image=9 is not the square of a divisor of .* 4 x 4 patches",
        ),
        ({"text": "x", "tokens_per_frame": 0}, r"tokens_per_frame=0 .* usable: \[1, 4, 16\]"),
        ({"text": "x", "tokens_per_image": 4.5}, r"tokens_per_image=4\.5 .* usable: \[1, 4, 16\]"),
        (
            {"text": "ab<image>", "images": shades(1), "truncation": True, "max_length": 4},
            "6 tokens, 4 of them of pictures; .*=4 .* 2",
        ),
        ({"text": "x", "num_frames": 2, "fps": 1.0}, "num_frames=2 and fps=1.0"),
        ({"text": "x", "num_frames": 0}, "num_frames must be above 0, not 0"),
        ({"text": "x", "max_tiles": -1}, "max_tiles must be above 0, not -1"),
        ({"text": ["a", "bc"], "padding": False}, r"\[1, 2\] tokens make no tensor"),
        ({"text": "x", "padding": "max_length"}, "needs max_length"),
        ({"text": "x", "padding": "left"}, "not 'left'"),
        ({"text": ["x"], "sub_images": [True, True]}, "2 choices of sub_images are given for 1 prompts"),
        ({}, "give text, or pictures alone"),
        ({"text": []}, "0 prompts are given"),
        ({"text": "x", "audio": [1]}, "no audio"),
    ],
)
def test_wrong_calls_say_both_numbers(call: dict[str, Any], message: str, tiny_processor: Callable) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_processor()(**call)


def test_wrong_kinds_of_text_and_unknown_arguments(tiny_processor: Callable) -> None:
    with pytest.raises(TypeError, match="prompt 1 is a int"):
        tiny_processor()(text=["a", 1])
    with pytest.raises(TypeError, match="token_per_image"):
        tiny_processor()(text="a", token_per_image=4)
    for name in ("token_per_image", "image", "content", "token", "loop", "message"):
        with pytest.raises(TypeError, match=f"neither the processor nor its chat template takes '{name}'"):
            tiny_processor().apply_chat_template(turns("a"), **{name: 4})


def test_tools_and_documents_need_a_template_that_reads_them(tiny_processor: Callable) -> None:
    """This package's template reads neither; a template of one's own gets them, and other variables too."""
    processor = tiny_processor()
    found: dict[str, list] = {"tools": [{"type": "function"}], "documents": [{"title": "a", "text": "b"}]}
    for name, value in found.items():
        with pytest.raises(TypeError, match=f"takes '{name}'"):
            processor.apply_chat_template(turns("a"), **{name: value})
        assert processor.apply_chat_template(turns("a"), **{name: []}) == "<|startoftext|><|User|>\na\n"
    template = (
        "{% for tool in tools %}{{ tool.type }}{% endfor %}{{ documents[0].text }}{{ style }}"
        "{% for message in messages %}{%- generation -%}{{ message.content }}{%- endgeneration -%}{% endfor %}"
    )
    assert processor.apply_chat_template(turns("a"), chat_template=template, style="!", **found) == "functionb!a"
    with pytest.raises(TypeError, match="takes 'styles', 'tool'"):
        processor.apply_chat_template(turns("a"), chat_template=template, styles="!", tool=1)


@pytest.mark.parametrize(
    ("conversation", "error", "message"),
    [
        ([], ValueError, "there are 0 messages$"),
        ([turns("a"), []], ValueError, "there are 0 messages of conversation 1"),
        ([*turns("a"), {"role": "assistant"}], ValueError, "message 1 has content None"),
        (
            [turns("a"), [{"role": "user", "content": None}]],
            ValueError,
            "message 0 of conversation 1 has content None",
        ),
        ([{"role": "user", "content": 5}], ValueError, "message 0 has content 5"),
        ([{"role": "user", "content": [IMAGE, {"type": "text"}]}], ValueError, "block 1 of message 0 .* text None"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], ValueError, "block 0 of message 0 .* text 5"),
        ([{"role": "user", "content": ["a"]}], TypeError, "block 0 of message 0 is a str"),
        ("hello", TypeError, "message 0 is a str"),
    ],
)
def test_turns_that_would_be_empty_are_named(
    conversation: Any, error: type[Exception], message: str, tiny_processor: Callable
) -> None:
    with pytest.raises(error, match=message):
        tiny_processor().apply_chat_template(conversation)


def test_pictures_come_one_way(tiny_processor: Callable) -> None:
    messages = [{"role": "user", "content": [{"type": "image", "image": shades(1)[0]}]}]
    with pytest.raises(ValueError, match="1 images come in the messages and others through images="):
        tiny_processor().apply_chat_template(messages, tokenize=True, images=shades(1))
    with pytest.raises(ValueError, match="1 <video> placeholders, but 0 videos"):
        tiny_processor().apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_image": 144}, r"144 .* usable: \[1, 4, 16\]"),
        ({"tokens_per_frame": 2}, "tokens_per_frame=2"),
        ({"max_frames": 0}, "max_frames must be above 0, not 0"),
        ({"image_token": "<picture>"}, r"'<picture>' is not in the vocabulary of the tokenizer \(260 tokens\)"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str, tiny_processor: Callable) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_processor(**settings)
