"""Long inputs in pieces: the same numbers, and no more memory or pictures at a time than one piece needs."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from longllava.modeling_longllava.attention import Visible, longllava_sdpa

IMAGE = 3


def row(length: int, pictures: list[tuple[int, int]], seed: int = 0) -> Tensor:
    ids = torch.randint(4, 260, (1, length), generator=torch.Generator().manual_seed(seed))
    for start, tokens in pictures:
        ids[:, start : start + tokens] = IMAGE
    return ids


def prompt(pictures: int = 10, seed: int = 0) -> dict[str, Tensor]:
    """(1, 7 n + 5) ids with n pictures of 4 or 1 tokens in turn, and the pictures."""
    grids = torch.tensor([[2, 2] if index % 2 == 0 else [1, 1] for index in range(pictures)])
    places = [(7 * index + 2, int(grid.prod())) for index, grid in enumerate(grids)]
    pixels = torch.randn(pictures, 3, 56, 56, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": row(7 * pictures + 5, places, seed), "pixel_values": pixels, "image_grid_hw": grids}


class Recorder:
    """A sequence of pictures that remembers what was asked of it."""

    def __init__(self, pixels: Tensor, given: list[int] | None = None):
        self.pixels, self.given = pixels, [] if given is None else given

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, indices: list[int]) -> "Recorder":
        return Recorder(self.pixels[indices], self.given)

    def __iter__(self) -> Iterator[Tensor]:
        for index, picture in enumerate(self.pixels):
            self.given.append(index)
            yield picture


class LargestTensor(TorchDispatchMode):
    """The most numbers of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize("size", [1, 4, 7, 64])
@torch.no_grad()
def test_pieces_give_the_same_logits_and_tokens(tiny_model, size) -> None:
    """Pieces of 1 and 4 tokens cut pictures in two."""
    model, inputs = tiny_model(), prompt()
    whole = model(**inputs, use_cache=True)
    pieces = model(**inputs, use_cache=True, prefill_chunk_size=size)
    assert torch.allclose(pieces.logits, whole.logits, atol=1e-4)
    assert len(whole.image_hidden_states) == 10 and (size > 75 or pieces.image_hidden_states is None)
    tokens = model.generate(**inputs, **GREEDY)
    assert model.generate(**inputs, **GREEDY, prefill_chunk_size=size).tolist() == tokens.tolist()
    model.config.prefill_chunk_size = size  # the threshold of plain `generate`
    assert model.generate(**inputs, **GREEDY).tolist() == tokens.tolist()


def batch() -> dict[str, Tensor]:
    """Three rows of 10, 3 and no pictures, left-padded."""
    rows = [prompt(10), prompt(3, 1), {"input_ids": row(12, [], 2)}]
    length = rows[0]["input_ids"].shape[1]
    pads = [length - r["input_ids"].shape[1] for r in rows]
    return {
        "input_ids": torch.cat([F.pad(r["input_ids"], (pad, 0)) for r, pad in zip(rows, pads, strict=True)]),
        "attention_mask": torch.stack([(torch.arange(length) >= pad).long() for pad in pads]),
        "pixel_values": torch.cat([r["pixel_values"] for r in rows[:2]]),
        "image_grid_hw": torch.cat([r["image_grid_hw"] for r in rows[:2]]),
    }


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("size", [5, 16])
@torch.no_grad()
def test_left_padded_batch_in_pieces(tiny_model, size, options) -> None:
    model, inputs = tiny_model(), batch()
    whole = model.generate(**inputs, **GREEDY, **options)
    assert model.generate(**inputs, **GREEDY, **options, prefill_chunk_size=size).tolist() == whole.tolist()


@torch.no_grad()
def test_pieces_for_other_attention_implementations(tiny_model) -> None:
    """`eager` has masks made by transformers; left padding must be right there too."""
    model, inputs = tiny_model(), batch()
    tokens = model.generate(**inputs, **GREEDY)
    model.set_attn_implementation("eager")
    assert model.generate(**inputs, **GREEDY, prefill_chunk_size=16).tolist() == tokens.tolist()


@torch.no_grad()
def test_from_embeddings_in_pieces(tiny_model) -> None:
    model, inputs = tiny_model(), prompt()
    tokens = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    pieces = model.generate(inputs_embeds=embeds, **inputs, **GREEDY, prefill_chunk_size=9)
    assert pieces.tolist() == tokens.tolist()


@torch.no_grad()
def test_pictures_are_read_as_their_piece_comes(tiny_model) -> None:
    """Before a piece of two pictures is run, no third one has been read."""
    model, inputs = tiny_model(), prompt()
    pictures = Recorder(inputs["pixel_values"])
    read: list[int] = []
    model.model.language_model.register_forward_pre_hook(lambda *_: read.append(len(pictures.given)))
    expected = model(**inputs, use_cache=True).logits[:, -1]
    read.clear()
    outputs = model(**inputs | {"pixel_values": pictures}, use_cache=True, prefill_chunk_size=14, logits_to_keep=1)
    assert read == [2, 4, 6, 8, 10, 10] and pictures.given == list(range(10))
    assert torch.allclose(outputs.logits[:, -1], expected, atol=1e-4) and outputs.logits.shape[1] == 1


@pytest.mark.parametrize("with_grids", [True, False])
@torch.no_grad()
def test_an_iterator_of_pictures(tiny_model, with_grids) -> None:
    model, inputs = tiny_model(), prompt()
    if not with_grids:  # then all have the 4 tokens of the configuration
        places = [(7 * index + 2, 4) for index in range(10)]
        inputs = {"input_ids": row(75, places), "pixel_values": inputs["pixel_values"]}
    whole = model.generate(**inputs, **GREEDY)
    inputs["pixel_values"] = iter(list(inputs["pixel_values"]))
    assert model.generate(**inputs, **GREEDY, prefill_chunk_size=8).tolist() == whole.tolist()


@torch.no_grad()
def test_an_iterator_that_ends_early_says_how_much_is_missing(tiny_model) -> None:
    model, inputs = tiny_model(), prompt()
    inputs["pixel_values"] = iter(list(inputs["pixel_values"][:7]))
    with pytest.raises(ValueError, match="ended 3 pictures before"):
        model.generate(**inputs, **GREEDY)


@torch.no_grad()
def test_an_iterator_that_goes_on_is_an_error(tiny_model) -> None:
    model, inputs = tiny_model(), prompt()
    pixels = list(inputs["pixel_values"])
    with pytest.raises(ValueError, match="goes on behind the 10 pictures"):
        model.generate(**inputs | {"pixel_values": iter([*pixels, pixels[0]])}, **GREEDY)
    with pytest.raises(ValueError, match="without a cache"):
        model.generate(**inputs | {"pixel_values": iter(pixels)}, **GREEDY, use_cache=False)


@torch.no_grad()
def test_a_mask_of_another_length_is_named(tiny_model) -> None:
    model, ids = tiny_model(), row(20, [])
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="attention_mask has 3 columns, but there are 20 cached tokens and 3 new"):
        model(ids[:, :3], attention_mask=torch.ones(1, 3, dtype=torch.long), past_key_values=cache)


@torch.no_grad()
def test_hidden_states_are_those_of_the_whole(tiny_model) -> None:
    model, inputs = tiny_model(), prompt()
    model.config.text_config.output_hidden_states = True
    outputs = model(**inputs, use_cache=True, prefill_chunk_size=16)
    assert outputs.hidden_states[-1].shape[1] == inputs["input_ids"].shape[1]


@torch.no_grad()
def test_an_iterator_cannot_serve_beams_or_several_rows_in_pieces(tiny_model) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="pixel_values is a list_iterator.*beams"):
        model.generate(**prompt() | {"pixel_values": iter(list(prompt()["pixel_values"]))}, **GREEDY, num_beams=2)
    inputs = batch()
    inputs["pixel_values"] = iter(list(inputs["pixel_values"]))
    with pytest.raises(ValueError, match="several rows in pieces"):
        model.generate(**inputs, **GREEDY, prefill_chunk_size=8)


@torch.no_grad()
def test_only_pictures_that_the_cache_lacks_are_read(tiny_model) -> None:
    model, inputs = tiny_model(), prompt()
    turn = model.generate(**prompt(4), **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([turn.sequences, inputs["input_ids"][:, 28:]], 1)
    inputs = {**inputs, "input_ids": ids}
    inputs["pixel_values"] = torch.cat([prompt(4)["pixel_values"], inputs["pixel_values"][4:]])
    fresh = model.generate(**inputs, **GREEDY)
    pictures = Recorder(inputs["pixel_values"])
    continued = model.generate(
        **inputs | {"pixel_values": pictures}, **GREEDY, past_key_values=turn.past_key_values, prefill_chunk_size=8
    )
    assert continued.tolist() == fresh.tolist() and len(pictures.given) == 6


@torch.no_grad()
def test_no_tensor_of_piece_times_context(tiny_model) -> None:
    """At 4,000 cached tokens a piece of 200 makes nothing as large as 200 x 4,000, be the batch padded or not."""
    model = tiny_model(num_experts=1)
    # One key head of one number: keys and values of the whole context are smaller than a mask would be.
    for rows, pad in ((1, 0), (2, 50)):
        cache = DynamicCache(config=model.config.get_text_config())
        ids = row(4000 * rows, []).view(rows, -1)
        mask = torch.ones_like(ids)
        mask[0, :pad] = 0
        model(ids, attention_mask=mask, past_key_values=cache, prefill_chunk_size=500)
        mask = F.pad(mask, (0, 200), value=1)
        with LargestTensor() as largest:
            model(ids[:, :200], attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        keys = cache.layers[2].keys.numel()
        assert largest.numbers < 200 * 4000 and largest.numbers <= max(keys, 200 * 200 * rows * 4)


@pytest.mark.parametrize("new", [1, 5, 30])
@pytest.mark.parametrize("heads", [2, 6])
def test_attention_equals_the_one_with_a_mask(new, heads) -> None:
    """Padding, room that is not filled yet, shared key heads; against plain softmax over a dense mask."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads, new, 8, generator=generator)
    key, value = torch.randn(2, 3, 2, 45, 8, generator=generator)
    length, first = 40, (0, 7, 38)
    position = torch.arange(45)
    for starts in (None, first):
        output, _ = longllava_sdpa(None, query, key, value, Visible(length, starts), scaling=0.3)
        seen = position <= torch.arange(length - new, length)[:, None]
        mask = seen.expand(3, 1, new, 45) & (position >= torch.tensor(starts or (0, 0, 0)).view(3, 1, 1, 1))
        repeated = (tensor.repeat_interleave(heads // 2, 1) for tensor in (key, value))
        expected = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3).transpose(1, 2)
        text = torch.arange(length - new, length) >= torch.tensor(starts or (0, 0, 0))[:, None]
        assert torch.allclose(output[text], expected[text], atol=1e-6)
        assert output.isfinite().all()


@torch.no_grad()
def test_padding_between_text_falls_back_to_a_mask(tiny_model) -> None:
    model = tiny_model(text={"attn_layer_period": 1, "attn_layer_offset": 0})  # attention alone
    ids, mask = row(20, []), torch.ones(1, 20, dtype=torch.long)
    mask[:, 8:11] = 0
    own = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    assert torch.allclose(own, model(ids, attention_mask=mask).logits, atol=1e-4)


@torch.no_grad()
def test_static_cache_in_pieces_continues(tiny_model) -> None:
    model, ids = tiny_model(), row(50, [])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    logits = model(ids, past_key_values=cache, prefill_chunk_size=16).logits
    assert torch.allclose(logits, model(ids).logits, atol=1e-4)


def test_pieces_must_not_be_empty(tiny_model, tiny_config) -> None:
    with pytest.raises(ValueError, match="prefill_chunk_size is 0"):
        tiny_model()(row(5, []), prefill_chunk_size=0)
    with pytest.raises(ValueError, match="prefill_chunk_size is 0"):
        tiny_config(prefill_chunk_size=0)
