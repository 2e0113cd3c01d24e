"""The growing cache: nothing is copied that need not be, forks and snapshots are exact, transformers' uses work."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from longllava.modeling_longllava import LongLlavaCache
from longllava.modeling_longllava.cache import GROWTH, SPARE, GrowingLayer


def layer_with(length: int, rows: int = 1) -> GrowingLayer:
    layer = GrowingLayer()
    layer.update(*pair(length, rows))
    return layer


def pair(length: int, rows: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, 2, length, 4, generator=generator)
    return keys, values


def ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(4, 260, (1, length), generator=torch.Generator().manual_seed(seed))


def test_it_holds_what_was_appended() -> None:
    layer, pieces = GrowingLayer(), [pair(length, seed=length) for length in (3, 1, 200, 1, 1)]
    for piece in pieces:
        keys, values = layer.update(*piece)
    assert torch.equal(keys, torch.cat([k for k, _ in pieces], 2)) and keys.shape[2] == 206
    assert torch.equal(values, torch.cat([v for _, v in pieces], 2))


def test_growing_copies_each_token_a_few_times_only() -> None:
    """Token by token to 2,000: transformers' layer would move 2,000 times."""
    layer, addresses = GrowingLayer(), set()
    for _ in range(2000):
        keys, _ = layer.update(*pair(1))
        addresses.add(keys.data_ptr())
    assert len(addresses) < 30
    room = layer._buffer.keys.shape[2]
    assert 2000 <= room <= max(2000 * GROWTH, 2000 + SPARE) + 1


def test_reserved_room_is_taken_once() -> None:
    layer = GrowingLayer()
    layer.reserved = 5000
    address = layer.update(*pair(10))[0].data_ptr()
    for _ in range(9):
        assert layer.update(*pair(500))[0].data_ptr() == address


def test_a_fork_shares_memory_until_it_would_write_over_the_other() -> None:
    layer = layer_with(10)
    fork = layer.share()
    before = layer.keys.clone()
    first, second = pair(2, seed=1), pair(3, seed=2)
    layer.update(*first)  # behind the tokens of both: in place
    assert fork.keys.data_ptr() == layer.keys.data_ptr()
    fork.update(*second)  # there the other layer has written: moves
    assert fork.keys.data_ptr() != layer.keys.data_ptr()
    assert torch.equal(layer.keys, torch.cat([before, first[0]], 2))
    assert torch.equal(fork.keys, torch.cat([before, second[0]], 2))


def test_forks_one_after_the_other_never_copy() -> None:
    """A hundred questions about one past: each fork is gone before the next writes to the same place."""
    layer = layer_with(10)
    address = layer.keys.data_ptr()
    for question in range(100):
        fork = layer.share()
        assert fork.update(*pair(5, seed=question))[0].data_ptr() == address
        del fork
    assert layer.update(*pair(1))[0].data_ptr() == address


def test_a_truncated_layer_does_not_write_over_its_fork() -> None:
    layer = layer_with(10)
    fork = layer.share()
    expected = fork.keys.clone()
    layer.truncate(4)
    layer.update(*pair(3, seed=1))
    assert torch.equal(fork.keys, expected)
    assert torch.equal(layer.keys[:, :, :4], expected[:, :, :4])


def test_beams_reorder_and_go_on() -> None:
    layer = layer_with(6, rows=3)
    expected = layer.keys[[2, 0, 0]]
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    new = pair(1, rows=3, seed=1)
    keys, _ = layer.update(*new)
    assert torch.equal(keys, torch.cat([expected, new[0]], 2))


def test_offloaded_layer_leaves_nothing_behind_and_goes_on() -> None:
    layer = layer_with(6)
    expected = layer.keys.clone()
    layer.offload()
    assert layer._buffer is None
    layer.prefetch()
    assert torch.equal(layer.update(*pair(1))[0][:, :, :6], expected)


def test_a_deep_copy_is_independent() -> None:
    layer = layer_with(6)
    other = copy.deepcopy(layer)
    expected = layer.keys.clone()
    other.update(*pair(4, seed=3))
    layer.update(*pair(2, seed=4))
    assert torch.equal(layer.keys[:, :, :6], expected) and torch.equal(other.keys[:, :, :6], expected)


def test_another_dtype_or_number_of_rows_is_an_error_and_changes_nothing() -> None:
    layer = layer_with(6)
    with pytest.raises(ValueError, match="1 rows of torch.float32.* 1 rows of torch.bfloat16"):
        layer.update(*(tensor.bfloat16() for tensor in pair(1)))
    with pytest.raises(ValueError, match="1 rows.* 2 rows"):
        layer.update(*pair(1, rows=2))
    assert layer.get_seq_length() == 6


def test_rows_that_were_left_out_do_not_come_back() -> None:
    layer = layer_with(6, rows=3)
    layer.keys, layer.values = layer.keys[:1], layer.values[:1]
    assert layer.update(*pair(1))[0].shape[0] == 1


def test_gradients_flow_through_cached_keys() -> None:
    layer = GrowingLayer()
    first, second = (pair(3, seed=seed)[0].requires_grad_() for seed in (0, 1))
    layer.update(first, first)
    keys, _ = layer.update(second, second)
    keys.sum().backward()
    assert first.grad is not None and second.grad is not None


@torch.no_grad()
def test_generate_uses_it_and_a_step_copies_nothing(tiny_model) -> None:
    model = tiny_model()
    output = model.generate(ids(50), max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    cache = output.past_key_values
    assert isinstance(cache, LongLlavaCache) and isinstance(cache, DynamicCache)
    address = cache.layers[2].keys.data_ptr()
    length = cache.get_seq_length()
    model(output.sequences[:, -1:], past_key_values=cache)
    assert cache.get_seq_length() == length + 1 and cache.layers[2].keys.data_ptr() == address


@pytest.mark.parametrize("options", [{"cache_implementation": "offloaded"}, {"num_beams": 3}])
@torch.no_grad()
def test_generate_equals_transformers_own_cache(tiny_model, options) -> None:
    if "cache_implementation" in options and not torch.cuda.is_available():
        pytest.skip("no GPU here: transformers offloads from a GPU only")
    model, settings = tiny_model(), {"max_new_tokens": 8, "do_sample": False}
    own = model.generate(ids(30), **settings, **options)
    options.pop("cache_implementation", None)
    stock = DynamicCache(config=model.config.get_text_config())
    assert own.tolist() == model.generate(ids(30), **settings, **options, past_key_values=stock).tolist()


@torch.no_grad()
def test_snapshot_and_restore(tiny_model) -> None:
    model = tiny_model()
    cache = LongLlavaCache(model.config)
    start = cache.snapshot()
    model(ids(20), past_key_values=cache)
    point = cache.snapshot()
    expected = model(ids(5, 1), past_key_values=cache).logits
    model(ids(30, 2), past_key_values=cache)
    cache.restore(point)
    assert cache.get_seq_length() == 20
    assert torch.equal(model(ids(5, 1), past_key_values=cache).logits, expected)
    cache.restore(start)
    assert cache.get_seq_length() == 0
    fresh = LongLlavaCache(model.config)
    assert torch.equal(model(ids(5), past_key_values=cache).logits, model(ids(5), past_key_values=fresh).logits)
    with pytest.raises(ValueError, match="20 tokens .* cache of 5"):
        cache.restore(point)


@torch.no_grad()
def test_forks_go_their_own_ways(tiny_model) -> None:
    model = tiny_model()
    cache = LongLlavaCache(model.config)
    model(ids(20), past_key_values=cache)
    fork = cache.fork()
    assert fork.layers[2].keys.data_ptr() == cache.layers[2].keys.data_ptr()
    for own, seed in ((cache, 1), (fork, 2), (cache, 3), (fork, 4)):
        model(ids(7, seed), past_key_values=own)
    for own, seeds in ((cache, (1, 3)), (fork, (2, 4))):
        whole = torch.cat([ids(20), *(ids(7, seed) for seed in seeds), ids(1, 9)], 1)
        ours = model(ids(1, 9), past_key_values=own).logits[:, -1]
        assert torch.allclose(ours, model(whole).logits[:, -1], atol=1e-5)
