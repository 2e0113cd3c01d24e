"""The model: equality with stock CLIP and Jamba, the cache, pictures of different sizes, training, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel, CompileConfig, DynamicCache, JambaForCausalLM, StaticCache
from transformers.models.jamba.modeling_jamba import JambaMambaMixer

from longllava.modeling_longllava import LongLlavaConfig, LongLlavaForConditionalGeneration

IMAGE = 3
TEXT = slice(4, 260)  # ids that are neither special nor the image token


def row(length: int, pictures: list[tuple[int, int]], seed: int = 0) -> Tensor:
    """(1, length) ids: text, with `tokens` image tokens from position `start` for each (start, tokens)."""
    ids = torch.randint(TEXT.start, TEXT.stop, (1, length), generator=torch.Generator().manual_seed(seed))
    for start, tokens in pictures:
        ids[:, start : start + tokens] = IMAGE
    return ids


def pixels(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


def example() -> dict[str, Tensor]:
    """One row of 60 tokens with three pictures of 4, 1 and 16 tokens."""
    return {
        "input_ids": row(60, [(5, 4), (20, 1), (30, 16)]),
        "pixel_values": pixels(3),
        "image_grid_hw": torch.tensor([[2, 2], [1, 1], [4, 4]]),
    }


def left_padded(*examples: dict[str, Tensor]) -> dict[str, Tensor]:
    length = max(e["input_ids"].shape[1] for e in examples)
    pads = [length - e["input_ids"].shape[1] for e in examples]
    ids = [F.pad(e["input_ids"], (pad, 0), value=0) for e, pad in zip(examples, pads, strict=True)]
    batch = {
        "input_ids": torch.cat(ids),
        "attention_mask": torch.stack([(torch.arange(length) >= pad).long() for pad in pads]),
    }
    with_pictures = [e for e in examples if "pixel_values" in e]
    for key in ("pixel_values", "image_grid_hw"):
        batch[key] = torch.cat([e[key] for e in with_pictures])
    return batch


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = (actual - expected).abs().max() / expected.std()
    assert error < tolerance, f"differs by {error:.1e} of a standard deviation"


class Stock(nn.Module):
    """Stock CLIP and stock Jamba of transformers, put together by hand with the weights of `model`."""

    def __init__(self, model: LongLlavaForConditionalGeneration):
        super().__init__()
        config, weights = model.config, model.state_dict()

        def part(prefix: str, target: str = "") -> dict[str, Tensor]:
            return {
                target + key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)
            }

        self.tower = CLIPVisionModel(config.vision_config)
        self.tower.load_state_dict(part("model.vision_tower."))
        self.jamba = JambaForCausalLM(config.text_config)
        head = {"lm_head.weight": weights["lm_head.weight"]}
        self.jamba.load_state_dict(part("model.language_model.", "model.") | head)
        self.projector = part("model.multi_modal_projector.")
        self.eval()

    def features(self, pixel_values: Tensor, grid: Tensor) -> Tensor:
        """(tokens of all pictures, hidden size)"""
        hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        side = round(hidden.shape[1] ** 0.5)
        pooled = [
            F.adaptive_avg_pool2d(h.T.view(1, -1, side, side), tuple(hw)).flatten(2)[0].T
            for h, hw in zip(hidden, grid.tolist(), strict=True)
        ]
        w = self.projector
        inner = F.gelu(F.linear(torch.cat(pooled), w["linear_1.weight"], w["linear_1.bias"]))
        return F.linear(inner, w["linear_2.weight"], w["linear_2.bias"])

    def embeddings(self, input_ids: Tensor, pixel_values: Tensor, image_grid_hw: Tensor) -> Tensor:
        embeds = self.jamba.get_input_embeddings()(input_ids)
        embeds[input_ids == IMAGE] = self.features(pixel_values, image_grid_hw)
        return embeds


@pytest.mark.parametrize("num_experts", [1, 4])
@torch.no_grad()
def test_equals_stock_clip_and_stock_jamba(tiny_model, num_experts):
    model, inputs = tiny_model(num_experts=num_experts), example()
    stock = Stock(model)
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_hw"]).pooler_output
    assert [len(f) for f in features] == [4, 1, 16]
    assert_close(torch.cat(features), stock.features(inputs["pixel_values"], inputs["image_grid_hw"]))
    embeds = stock.embeddings(**inputs)
    assert_close(model(**inputs).logits, stock.jamba(inputs_embeds=embeds).logits)
    # transformers' cache is right for one new token at a time, which is what greedy generation does.
    greedy = {"max_new_tokens": 12, "do_sample": False}
    tokens = model.generate(**inputs, **greedy)[:, 60:]
    assert tokens.tolist() == stock.jamba.generate(inputs_embeds=embeds, **greedy).tolist()


@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("piece", [1, 7, 64])
@torch.no_grad()
def test_cached_pieces_equal_the_whole(tiny_model, piece, num_experts):
    model = tiny_model(num_experts=num_experts)
    ids = row(150, [])
    whole = model(ids).logits
    cache, logits = DynamicCache(config=model.config.get_text_config()), []
    for start in range(0, 150, piece):
        logits.append(model(ids[:, start : start + piece], past_key_values=cache).logits)
    assert_close(torch.cat(logits, 1), whole)


@torch.no_grad()
def test_pieces_bring_their_own_pictures(tiny_model):
    model, inputs = tiny_model(), example()
    whole = model(**inputs).logits
    cache, logits = DynamicCache(config=model.config.get_text_config()), []
    for steps, pictures in ((slice(0, 12), slice(0, 1)), (slice(12, 60), slice(1, 3))):
        outputs = model(
            inputs["input_ids"][:, steps],
            pixel_values=inputs["pixel_values"][pictures],
            image_grid_hw=inputs["image_grid_hw"][pictures],
            past_key_values=cache,
        )
        logits.append(outputs.logits)
    assert_close(torch.cat(logits, 1), whole)


def mixed_batch() -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Three rows with three, one and no pictures, alone and as a left-padded batch."""
    alone = [
        example(),
        {"input_ids": row(33, [(2, 4)], 1), "pixel_values": pixels(1, 7), "image_grid_hw": torch.tensor([[2, 2]])},
        {"input_ids": row(21, [], 2)},
    ]
    return alone, left_padded(*alone)


@torch.no_grad()
def test_left_padded_mixed_batch_equals_one_by_one(tiny_model):
    model = tiny_model()
    alone, batch = mixed_batch()
    greedy = {"max_new_tokens": 8, "do_sample": False}
    logits, tokens = model(**batch).logits, model.generate(**batch, **greedy)[:, 60:]
    for index, inputs in enumerate(alone):
        length = inputs["input_ids"].shape[1]
        assert_close(logits[index, -length:], model(**inputs).logits[0])
        assert tokens[index].tolist() == model.generate(**inputs, **greedy)[0, length:].tolist()


@torch.no_grad()
def test_left_padded_batch_in_pieces(tiny_model):
    """Padding that reaches into the second piece must not touch the states either."""
    model = tiny_model()
    ids = torch.cat([F.pad(row(20, []), (20, 0)), row(40, [], 1)])
    mask = torch.stack([(torch.arange(40) >= 20).long(), torch.ones(40, dtype=torch.long)])
    whole = model(ids, attention_mask=mask).logits
    cache, logits = DynamicCache(config=model.config.get_text_config()), []
    for start in range(0, 40, 16):
        stop = start + 16
        logits.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits)
    pieces = torch.cat(logits, 1)
    assert_close(pieces[0, 20:], whole[0, 20:])
    assert_close(pieces[1], whole[1])


@pytest.mark.parametrize("new_pictures", [0, 2])
@torch.no_grad()
def test_second_turn_on_a_kept_cache_equals_a_fresh_run(tiny_model, new_pictures):
    """The whole conversation is handed in again; pictures that the cache holds are not encoded again."""
    model, first = tiny_model(), example()
    greedy = {"max_new_tokens": 6, "do_sample": False}
    turn = model.generate(**first, **greedy, return_dict_in_generate=True)
    question = row(25, [(3, 4), (12, 4)][:new_pictures], seed=5)
    second = {
        "input_ids": torch.cat([turn.sequences, question], 1),
        "pixel_values": torch.cat([first["pixel_values"], pixels(new_pictures, 9)]),
        "image_grid_hw": torch.cat([first["image_grid_hw"], torch.full((new_pictures, 2), 2)]),
    }
    encoded = []
    model.model.vision_tower.embeddings.register_forward_hook(lambda _, args, out: encoded.append(len(args[0])))
    fresh = model.generate(**second, **greedy)
    assert sum(encoded) == 3 + new_pictures
    encoded.clear()
    continued = model.generate(**second, **greedy, past_key_values=turn.past_key_values)
    assert continued.tolist() == fresh.tolist()
    assert sum(encoded) == new_pictures


@torch.no_grad()
def test_a_cache_that_ends_inside_a_picture_is_an_error(tiny_model):
    model, inputs = tiny_model(), example()
    cache = DynamicCache(config=model.config.get_text_config())
    embeds = model.get_input_embeddings()(inputs["input_ids"][:, :8])  # 3 of the 4 tokens of the first picture
    embeds[:, 5:] = 0.0
    model(inputs_embeds=embeds, past_key_values=cache)
    with pytest.raises(ValueError, match=r"inside picture 0 of row 0: it holds 3 of 4 tokens"):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=1)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
@torch.no_grad()
def test_beams_reorder_every_state(tiny_model, options):
    """With and without a cache: a state that is not reordered, or a picture in a wrong row, gives other tokens."""
    model = tiny_model()
    _, batch = mixed_batch()
    settings = {"max_new_tokens": 8, "do_sample": False, **options}
    cached, uncached = (model.generate(**batch, **settings, use_cache=use) for use in (True, False))
    assert cached.tolist() == uncached.tolist()
    greedy = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert cached.shape[0] == 3 * options.get("num_return_sequences", 1)
    assert cached[:: options.get("num_return_sequences", 1)].tolist() != greedy.tolist()  # beams really did something


@torch.no_grad()
def test_static_cache_gives_the_same_tokens(tiny_model):
    model = tiny_model()
    for inputs in (example(), mixed_batch()[1]):
        dynamic, static = (
            model.generate(**inputs, max_new_tokens=8, do_sample=False, cache_implementation=kind)
            for kind in ("dynamic", "static")
        )
        assert static.tolist() == dynamic.tolist()


@torch.no_grad()
def test_a_decode_step_is_one_graph(tiny_model):
    """On a GPU `generate` compiles the step of a static cache without breaks; the graph is traced here, not built."""
    model, ids = tiny_model(), row(11, [])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=16)
    model(ids[:, :10], past_key_values=cache)
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    seen = (torch.arange(16) <= 10).view(1, 1, 1, 16)
    outputs = step(
        input_ids=ids[:, 10:],
        past_key_values=cache,
        attention_mask={"full_attention": seen, "linear_attention": None},
        position_ids=torch.tensor([[10]]),
    )
    assert_close(outputs.logits, model(ids).logits[:, -1:])


@torch.no_grad()
def test_generation_with_a_compiled_step_gives_the_same_tokens(tiny_model, monkeypatch):
    """`generate` compiles by itself on a GPU only; here it is told to, with a backend that builds nothing."""
    model = tiny_model()
    inputs, settings = mixed_batch()[1], {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    monkeypatch.setattr(model, "_valid_auto_compile_criteria", lambda *_: True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = model.generate(
        **inputs,
        **settings,
        cache_implementation="static",
        compile_config=CompileConfig(backend="aot_eager", mode=None, fullgraph=True, dynamic=False),
    )
    assert compiled.tolist() == expected.tolist()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_padding_behind_text_is_an_error(tiny_model):
    """A row that ended early has pads in the cache of its batch, and the states of its Mamba layers ran over them."""
    model = tiny_model()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:9] = 0
    with pytest.raises(ValueError, match="Row 1 has padding behind its first 7 tokens"):
        model.generate(torch.cat([row(12, []), row(12, [], 1)]), attention_mask=mask, max_new_tokens=1)


@torch.no_grad()
def test_generation_from_embeddings(tiny_model):
    model, inputs = tiny_model(), example()
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    settings = {"max_new_tokens": 6, "do_sample": False}
    for beams in (1, 3):
        expected = model.generate(**example(), **settings, num_beams=beams)[:, 60:]
        assert (
            model.generate(inputs_embeds=embeds, **inputs, **settings, num_beams=beams).tolist() == expected.tolist()
        )


def test_image_tokens_in_the_wrong_row_are_an_error(tiny_model):
    """The sum over the batch is right, but a picture would be cut between two rows."""
    ids = torch.cat([row(20, [(2, 5)]), row(20, [(2, 3)], 1)])
    with pytest.raises(ValueError, match="Row 0 has 5 image tokens, but its 2 pictures give 8"):
        tiny_model()(ids, pixel_values=pixels(2))


@torch.no_grad()
def test_generation_with_router_logits(tiny_model):
    model, (_, batch) = tiny_model(), mixed_batch()
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert (
        model.generate(**batch, **settings, output_router_logits=True).tolist()
        == model.generate(**batch, **settings).tolist()
    )


@torch.no_grad()
def test_several_samples_of_one_prompt_keep_its_pictures(tiny_model):
    """`num_return_sequences` repeats the rows: the pictures of a row must follow it as a block."""
    model = tiny_model()
    inputs = example()
    ids, expanded = model._expand_inputs_for_generation(expand_size=2, **inputs)
    alone = model(**inputs).logits
    assert_close(model(ids, **expanded).logits, alone.expand(2, -1, -1))


@torch.no_grad()
def test_vision_tower_runs_in_bounded_groups(tiny_model):
    model, images = tiny_model(), pixels(7)
    whole = model.get_image_features(images).pooler_output
    sizes = []
    model.model.vision_tower.embeddings.register_forward_hook(lambda _, args, out: sizes.append(len(args[0])))
    model.config.vision_batch_size = 3
    groups = model.get_image_features(images).pooler_output
    assert sizes == [3, 3, 1]
    assert_close(torch.stack(groups), torch.stack(whole))


@pytest.mark.parametrize("pooling, tokens", [("2d", 4), ("1d", 8), ("none", 16)])
@torch.no_grad()
def test_pooling(tiny_model, pooling, tokens):
    model = tiny_model(pooling=pooling, tokens_per_image=tokens)
    patches = torch.randn(2, 16, 32)
    projector = model.model.multi_modal_projector
    expected = {
        "2d": lambda p: F.avg_pool2d(p.transpose(1, 2).view(2, 32, 4, 4), 2).flatten(2).transpose(1, 2),
        "1d": lambda p: F.avg_pool1d(p.transpose(1, 2), 2).transpose(1, 2),
        "none": lambda p: p,
    }[pooling](patches)
    model.model._encode = lambda pixel_values: patches
    features = model.get_image_features(pixels(2)).pooler_output
    assert [len(f) for f in features] == [tokens, tokens]
    assert_close(torch.stack(features), projector(expected))


@torch.no_grad()
def test_attention_implementations_agree(tiny_model):
    model, (_, batch) = tiny_model(), mixed_batch()
    results = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert model.model.language_model.config._attn_implementation == implementation
        assert model.model.vision_tower.config._attn_implementation == implementation
        results.append(model(**batch).logits[batch["attention_mask"].bool()])
    assert_close(*results)


@torch.no_grad()
def test_logits_to_keep(tiny_model):
    model, inputs = tiny_model(), example()
    whole = model(**inputs).logits
    assert model(**inputs, logits_to_keep=1).logits.shape == (1, 1, 260)
    assert_close(model(**inputs, logits_to_keep=3).logits, whole[:, -3:])
    positions = torch.tensor([0, 17, 59])
    assert_close(model(**inputs, logits_to_keep=positions).logits, whole[:, positions])


@pytest.mark.parametrize("num_experts", [1, 4])
def test_a_training_step_moves_exactly_what_it_should(tiny_model, num_experts):
    model, inputs = tiny_model(num_experts=num_experts), example()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.train()
    model(**inputs, labels=inputs["input_ids"], output_router_logits=True).loss.backward()
    optimizer.step()
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    # hidden_states[-2] is read: the last layer of the tower and its last norm have no part in the result.
    unread = {n for n in before if n.startswith(("model.vision_tower.encoder.layers.2.", "model.vision_tower.post_"))}
    # Softmax does not change when a constant is added to all scores, which is what a key's bias does.
    constant = {n for n in before if "vision_tower" in n and n.endswith("k_proj.bias")}
    assert unread <= still <= unread | constant


def test_gradient_checkpointing_changes_nothing(tiny_model):
    model, inputs = tiny_model(), example()
    gradients = []
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        outputs = model(**inputs, labels=inputs["input_ids"])
        assert outputs.past_key_values is None
        outputs.loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, atol=1e-6), name


def test_router_logits_and_their_loss(tiny_model):
    inputs = example()
    model = tiny_model(num_experts=4)
    plain = model(**inputs, labels=inputs["input_ids"])
    routed = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    assert plain.router_logits is None and len(routed.router_logits) == 2  # layers 1 and 3 of 4
    expected = plain.loss + model.config.text_config.router_aux_loss_coef * routed.aux_loss
    assert torch.allclose(routed.loss, expected) and routed.aux_loss > 0
    dense = tiny_model(num_experts=1)(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    assert dense.aux_loss is None and torch.isfinite(dense.loss)


@torch.no_grad()
def test_bfloat16_keeps_float32_states(tiny_model):
    model, inputs = tiny_model().to(torch.bfloat16), example()
    outputs = model(**inputs, use_cache=True)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.past_key_values.layers[0].recurrent_states[0].dtype == torch.float32


@torch.no_grad()
def test_save_and_load(tiny_model, tmp_path):
    model, inputs = tiny_model(), example()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.suffix not in (".py", ".json")} == {"model.safetensors"}
    again, info = LongLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    assert_close(again(**inputs).logits, model(**inputs).logits)  # to the bit only with the same grouping of experts


@torch.no_grad()
def test_device_map_with_layers_offloaded(tiny_model, tmp_path):
    """Offloaded weights exist only while their module runs, so every weight must be used through its module."""
    pytest.importorskip("accelerate")
    model, inputs = tiny_model(), example()
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.language_model.{name}": "cpu" for name in ("embed_tokens", "final_layernorm")}
    device_map |= {f"model.language_model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    offloaded = LongLlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert offloaded.model.language_model.layers[1].mamba.in_proj.weight.is_meta
    assert offloaded.model.vision_tower.embeddings.patch_embedding.weight.is_meta
    assert_close(offloaded(**inputs).logits, model(**inputs).logits)


def test_time_steps_begin_where_a_state_lasts(tiny_model):
    """Mamba's own range at random initialisation; the native Jamba begins at softplus(0) = 0.7."""
    for module in tiny_model().modules():
        if isinstance(module, JambaMambaMixer):
            steps = F.softplus(module.dt_proj.bias)
            assert steps.min() > 0.0009 and steps.max() < 0.11


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"pixel_values": pixels(2), "image_grid_hw": torch.tensor([[2, 2], [1, 1]])},
            "21 image tokens.* 2 pictures give 5",
        ),
        ({"pixel_values": pixels(2)}, "image_grid_hw has 3 rows, but pixel_values has 2"),
        ({"pixel_values": None, "image_grid_hw": None}, "21 image tokens.* 0 pictures give 0"),
        ({"input_ids": row(10, [])}, "3 pictures, .* image tokens of 0"),
        ({"image_grid_hw": torch.tensor([[2, 2], [0, 1], [4, 4]])}, "0 x 1 tokens"),
        (
            {"input_ids": row(60, [(5, 6), (20, 17)]), "image_grid_hw": torch.tensor([[3, 2], [1, 1], [4, 4]])},
            "4 x 4 patches cannot be pooled to 3 x 2",
        ),
        ({"input_ids": None}, "input_ids and inputs_embeds"),
    ],
)
def test_errors_have_both_numbers(tiny_model, change, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**example() | change)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tokens_per_image": 5}, "tokens_per_image is 5.* 4 x 4"),
        ({"tokens_per_image": 9}, "tokens_per_image is 9.* 4 x 4"),
        ({"tokens_per_image": 5, "pooling": "1d"}, "tokens_per_image is 5.* 16 patches"),
        ({"tokens_per_image": 4, "pooling": "none"}, "tokens_per_image is 4.* 16 tokens"),
        ({"pooling": "3d"}, "pooling is '3d'"),
        ({"image_token_id": 260}, "image_token_id is 260.* 260 tokens"),
        ({"vision_feature_layer": -5}, "vision_feature_layer is -5.* 3 layers"),
        ({"vision_batch_size": 0}, "vision_batch_size is 0"),
    ],
)
def test_config_is_checked(tiny_config, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


def test_default_config_is_the_53b():
    config = LongLlavaConfig()
    assert config.image_grid == (12, 12) and config.patches_per_side == 24
    assert (config.text_config.num_hidden_layers, config.text_config.num_experts) == (32, 16)
    again = LongLlavaConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
