"""LongLLaVA (arXiv 2409.02889): CLIP tower, 2d pooling, projector, and Jamba with Mamba layers that carry their state.

Key to the shapes:

    B  rows of the batch            L  tokens of a row           H  hidden size of the language model
    N  pictures of the whole batch, in the order of their placeholders, row by row
    P  patches along one side of a picture (24)                  V  hidden size of the vision tower
    C  inner channels of a Mamba layer                           K  width of its convolution (4)
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.models.jamba.modeling_jamba import (
    JambaMambaDecoderLayer,
    JambaMambaMixer,
    load_balancing_loss_func,
)
from transformers.utils import can_return_tuple

from .attention import NAME as LONGLLAVA_SDPA
from .attention import Visible
from .cache import LongLlavaCache
from .causal_conv import causal_conv1d
from .configuration_longllava import LongLlavaConfig
from .selective_scan import selective_scan, selective_state_update


@dataclass
class LongLlavaModelOutputWithPast(MoeModelOutputWithPast):
    """Output of [`LongLlavaModel`].

    `image_hidden_states` is a tuple of N tensors `(rows * columns, H)`; None where the input was taken in pieces,
    since each forgets its pictures.
    """

    image_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class LongLlavaCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """Output of [`LongLlavaForConditionalGeneration`]; the pictures as in [`LongLlavaModelOutputWithPast`]."""

    image_hidden_states: tuple[Tensor, ...] | None = None


def pool_patches(patches: Tensor, rows: int, columns: int, pooling: str = "2d") -> Tensor:
    """Average patch features over equal areas (paper, section 3.1).

    Args:
        patches (`Tensor` of shape `(N, P * P, V)`): features of square pictures, row by row.
        rows, columns (`int`): the grid of tokens that is left.
        pooling (`str`): `"2d"` averages areas of the grid, `"1d"` stretches of the flat sequence, `"none"` nothing.

    Returns:
        `Tensor` of shape `(N, rows * columns, V)`.

    Raises:
        ValueError: if the grid of tokens does not divide the grid of patches.
    """
    count, sequence, width = patches.shape
    side = round(sequence**0.5)
    if rows < 1 or columns < 1:
        raise ValueError(f"A picture cannot have {rows} x {columns} tokens")
    if pooling == "2d" and side % rows == 0 and side % columns == 0:
        areas = patches.view(count, rows, side // rows, columns, side // columns, width)
        return areas.mean(dim=(2, 4)).flatten(1, 2)
    if pooling == "1d" and sequence % (rows * columns) == 0:
        return patches.view(count, rows * columns, -1, width).mean(dim=2)
    if pooling == "none" and rows * columns == sequence:
        return patches
    raise ValueError(f"{side} x {side} patches cannot be pooled to {rows} x {columns} tokens with pooling {pooling!r}")


def pictures_by_row(is_image: Tensor, tokens: list[int]) -> list[list[int]]:
    """Which pictures belong to which row of a batch.

    Args:
        is_image (`Tensor` of shape `(B, L)`): where the image tokens are.
        tokens (`list` of N `int`): tokens of each picture, in the order of the placeholders, row by row.

    Returns:
        For every row the indices of its pictures.

    Raises:
        ValueError: if a row's image tokens are not those of a whole number of the pictures, or pictures are left over.
    """
    by_row, first = [], 0
    for row, wanted in enumerate(is_image.sum(1).tolist()):
        stop, got = first, 0
        while got < wanted and stop < len(tokens):
            got += tokens[stop]
            stop += 1
        if got != wanted:
            raise ValueError(f"Row {row} has {wanted} image tokens, but its {stop - first} pictures give {got}")
        by_row.append(list(range(first, stop)))
        first = stop
    if first < len(tokens):
        raise ValueError(f"There are {len(tokens)} pictures, but the input has image tokens of {first}")
    return by_row


def select_pictures(pictures: Tensor | Iterable[Tensor], indices: list[int]) -> Tensor | Iterable[Tensor]:
    """The pictures at `indices`: of a tensor (N, 3, S, S), of a sequence, or of an iterator in rising order.

    Raises:
        ValueError: if an iterator would have to give a picture twice or go back.
    """
    if isinstance(pictures, list | tuple):
        return [pictures[index] for index in indices]
    if hasattr(pictures, "__getitem__"):
        return pictures[indices]
    if any(b <= a for a, b in zip(indices, indices[1:], strict=False)):
        raise ValueError(
            f"pixel_values is a {type(pictures).__name__}, which gives every picture once and in order; several rows "
            "in pieces, beams and several answers need a tensor or a sequence"
        )
    wanted = set(indices)
    return (picture for index, picture in enumerate(pictures) if index in wanted)


class PictureFeed:
    """Hands out pictures in order: `feed(n)` is the next n, fewer at the end, as a tensor (n, 3, S, S).

    Of a tensor these are views; what comes picture by picture is copied at once, since it may be gone after that.
    """

    def __init__(self, pictures: Tensor | Iterable[Tensor]):
        self.whole = pictures if isinstance(pictures, Tensor) else None
        self.pictures = iter(()) if isinstance(pictures, Tensor) else iter(pictures)
        self.given = 0

    def __call__(self, count: int) -> Tensor:
        self.given += count
        if self.whole is not None:
            return self.whole[self.given - count : self.given]
        group, filled = torch.empty(0), 0
        for picture in islice(self.pictures, count):
            group = group if filled else picture.new_empty(count, *picture.shape)
            group[filled] = picture
            filled += 1
        return group[:filled]


class LongLlavaMultiModalProjector(nn.Module):
    """Linear, activation, linear: from the width of the vision tower to that of the language model."""

    def __init__(self, config: LongLlavaConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class CausalConv1d(nn.Conv1d):
    """[`causal_conv1d`] as a module, with the parameters of `nn.Conv1d`."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        """(B, L, C) after (B, K - 1, C) -> (B, L, C)"""
        return causal_conv1d(x, self.weight.squeeze(1), self.bias, context)


class TimeStepProjection(nn.Linear):
    """Linear layer whose bias is added in float32: it is near -5, where bfloat16 would move the time step by 1 %."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).float() + self.bias.float()


class LongLlavaMambaMixer(JambaMambaMixer):
    """Jamba's Mamba mixer (arXiv 2403.19887, section 3) that continues from a cache with any number of new tokens.

    Same parameters as the native mixer. All its weights are used through modules, so that adapters, quantisation and
    offloading, which replace or hook modules, reach each of them.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act is {config.hidden_act!r}, but the convolution of Jamba ends in 'silu'")
        channels, width = self.intermediate_size, self.conv_kernel_size
        self.conv1d = CausalConv1d(channels, channels, width, groups=channels, bias=self.use_conv_bias)
        self.dt_proj = TimeStepProjection(self.time_step_rank, channels)

    @torch.no_grad()
    def reset_time_steps(self) -> None:
        """Spread the time steps of a new layer over [0.001, 0.1], as Mamba does (section 3.6).

        The bias of zero that the native Jamba starts from means 0.7: such a state forgets within a few tokens.
        """
        bias = self.dt_proj.bias
        steps = torch.empty_like(bias).uniform_(math.log(0.001), math.log(0.1)).exp()
        bias.copy_(steps.expm1().log())  # softplus of this is `steps`

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """(B, L, H) -> (B, L, H); `attention_mask` (B, L) is 0 on padding, before the text or after all of it.

        Padding before the text leaves the state at zero. Behind text the state decays over it, and the convolution
        sees zeros: nothing may follow there.
        """
        mask = None if attention_mask is None else attention_mask[..., None].to(hidden_states.dtype)  # (B, L, 1)
        if mask is not None:
            hidden_states = hidden_states * mask
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (B, L, C) each

        if cache_params is not None and cache_params.has_previous_state(self.layer_idx):
            layer = cache_params.layers[self.layer_idx]
            context = layer.conv_states[0][..., 1:].transpose(1, 2)  # (B, K - 1, C)
            initial_state = layer.recurrent_states[0]  # (B, C, states)
        else:
            context = x.new_zeros(x.shape[0], self.conv_kernel_size - 1, x.shape[2])
            initial_state = None
        last = torch.cat([context, x[:, -self.conv_kernel_size :]], dim=1)[:, -self.conv_kernel_size :]
        x = self.conv1d(x, context)  # (B, L, C)
        if cache_params is not None:
            # The cache keeps the last K inputs, channels first, as the native mixer does. `context` is a view of it.
            cache_params.update_conv_state(last.transpose(1, 2), self.layer_idx)
        if mask is not None:
            x = x * mask

        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        dt, B, C = self.x_proj(x).split(sizes, dim=-1)
        dt = self.dt_proj(self.dt_layernorm(dt))  # (B, L, C)
        B, C = self.b_layernorm(B), self.c_layernorm(C)  # (B, L, states)
        A = -torch.exp(self.A_log.float())
        if initial_state is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            x, dt, B, C, z = (tensor[:, 0] for tensor in (x, dt, B, C, z))
            return self.out_proj(selective_state_update(initial_state, x, dt, A, B, C, D=self.D, z=z)[:, None])
        y, final_state = selective_scan(x, dt, A, B, C, D=self.D, z=z, initial_state=initial_state)
        if cache_params is not None:
            cache_params.update_recurrent_state(final_state, self.layer_idx)
        return self.out_proj(y)


class LongLlavaPreTrainedModel(PreTrainedModel):
    config_class = LongLlavaConfig
    config: LongLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPEncoderLayer", "JambaAttentionDecoderLayer", "JambaMambaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _is_stateful = True


class LongLlavaModel(LongLlavaPreTrainedModel):
    """Vision tower, projector and language model, without the head."""

    def __init__(self, config: LongLlavaConfig):
        super().__init__(config)
        if config.text_config._attn_implementation in (None, "sdpa"):  # None is transformers' "sdpa"
            config.text_config._attn_implementation = LONGLLAVA_SDPA
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LongLlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        for index, layer in enumerate(self.language_model.layers):
            if isinstance(layer, JambaMambaDecoderLayer):
                layer.mamba = LongLlavaMambaMixer(config.text_config, index)
        self.post_init()
        for module in self.modules():
            if isinstance(module, LongLlavaMambaMixer):
                module.reset_time_steps()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(
        self, pixel_values: Tensor | Iterable[Tensor], image_grid_hw: Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Encode, pool and project pictures, `config.vision_batch_size` of them at a time.

        Args:
            pixel_values (`Tensor` of shape `(N, 3, S, S)`, or iterable of N tensors `(3, S, S)`): pictures; they may
                lie on another device than the model.
            image_grid_hw (`Tensor` of shape `(N, 2)`, *optional*): rows and columns of tokens of each picture;
                `config.image_grid` for all where it is missing.

        Returns:
            `BaseModelOutputWithPooling` whose `pooler_output` is a tuple of N tensors `(rows * columns, H)`.

        Raises:
            ValueError: if there are not as many grids as pictures, or a grid does not divide the patches.
        """
        if image_grid_hw is None and not isinstance(pixel_values, Sized):
            pixel_values = torch.stack(list(pixel_values))
        grids = self._grids(pixel_values, image_grid_hw)
        return BaseModelOutputWithPooling(pooler_output=tuple(self._features(PictureFeed(pixel_values), grids)))

    def _grids(
        self, pixel_values: Tensor | Iterable[Tensor], image_grid_hw: Tensor | None, tokens: int = 0
    ) -> list[tuple[int, int]]:
        """Rows and columns of tokens of each picture; an iterator without grids has pictures for all `tokens`."""
        count = len(pixel_values) if isinstance(pixel_values, Sized) else None
        if image_grid_hw is None:
            rows, columns = self.config.image_grid
            return [(rows, columns)] * (-(-tokens // (rows * columns)) if count is None else count)
        if count not in (None, len(image_grid_hw)):
            raise ValueError(f"image_grid_hw has {len(image_grid_hw)} rows, but pixel_values has {count} pictures")
        grids = [(rows, columns) for rows, columns in image_grid_hw.tolist()]
        for rows, columns in grids:
            if rows < 1 or columns < 1:
                raise ValueError(f"A picture cannot have {rows} x {columns} tokens")
        return grids

    def _features(self, pictures: PictureFeed, grids: list[tuple[int, int]]) -> list[Tensor]:
        """Features (rows * columns, H) of the next `len(grids)` pictures."""
        features: list[Tensor] = []
        for start in range(0, len(grids), self.config.vision_batch_size):
            group = grids[start : start + self.config.vision_batch_size]
            pixels = pictures(len(group))
            if len(pixels) < len(group):
                raise ValueError(f"pixel_values ended {len(grids) - start - len(pixels)} pictures before the input")
            patches = self._encode(pixels)
            first = 0
            for (rows, columns), same in groupby(group):
                stop = first + len(list(same))
                pooled = pool_patches(patches[first:stop], rows, columns, self.config.pooling)
                features.extend(self.multi_modal_projector(pooled).unbind(0))
                first = stop
        return features

    def _encode(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, P * P, V). Only the layers that are read are run, and only one hidden state is held."""
        tower = self.vision_tower
        weight = tower.embeddings.patch_embedding.weight
        depth = self.config.vision_feature_layer
        if depth < 0:
            depth += len(tower.encoder.layers) + 1
        # The weights of an offloaded tower are on "meta" until it runs; accelerate then moves its inputs itself.
        device = pixel_values.device if weight.is_meta else weight.device
        hidden = tower.pre_layrnorm(tower.embeddings(pixel_values.to(device, weight.dtype)))
        for layer in tower.encoder.layers[:depth]:
            hidden = layer(hidden, attention_mask=None)
        return hidden[:, 1:]  # without the class token

    def is_image_token(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, L): where the placeholders of pictures are; in embeddings, wherever there is that of the image token."""
        token = self.config.image_token_id
        if inputs_embeds is not None:
            placeholder = self.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))
            return torch.eq(inputs_embeds, placeholder).all(-1)
        if input_ids is not None:
            return torch.eq(input_ids, token)
        raise ValueError("One of input_ids and inputs_embeds is needed")

    def _features_by_piece(
        self,
        pixel_values: Tensor | Iterable[Tensor],
        grids: list[tuple[int, int]],
        is_image: Tensor,
        pieces: list[slice],
    ) -> Iterator[list[Tensor]]:
        """For each piece of the rows the features of its image tokens (B, L), row by row; pictures are read just then.

        A picture that two pieces share is encoded once, with the first of them.
        """
        tokens = [rows * columns for rows, columns in grids]
        waiting = [list(reversed(row)) for row in pictures_by_row(is_image, tokens)]  # an error unless they fit
        counts = torch.stack([is_image[:, piece].sum(1) for piece in pieces]).tolist()  # (pieces, B)
        plans, left = [], [0] * len(waiting)  # tokens of the newest picture of a row that its last piece left over
        for piece in counts:
            plan: list[list[int]] = []
            for row, count in enumerate(piece):
                plan.append([])
                while left[row] < count:
                    plan[row].append(waiting[row].pop())
                    left[row] += tokens[plan[row][-1]]
                left[row] -= count
            plans.append(plan)
        order = [picture for plan in plans for row in plan for picture in row]
        in_order = order == list(range(len(order)))
        pictures = PictureFeed(pixel_values if in_order else select_pictures(pixel_values, order))
        rest: list[Tensor | None] = [None] * len(waiting)
        for plan, piece in zip(plans, counts, strict=True):
            new = iter(self._features(pictures, [grids[picture] for row in plan for picture in row]))
            merged: list[Tensor] = []
            for row, count in enumerate(piece):
                held = rest[row]
                own = [*([] if held is None else [held]), *(next(new) for _ in plan[row])]
                if len(pieces) > 1 and own:
                    joined = torch.cat(own)
                    own, rest[row] = [joined[:count]], joined[count:] if count < len(joined) else None
                merged += own
            yield merged
        if not isinstance(pixel_values, Sized) and len(pictures(1)) > 0:
            raise ValueError(f"pixel_values goes on behind the {len(order)} pictures of the input")

    def _pieces(self, length: int, size: int, cache: Cache | None, kwargs: dict) -> list[slice]:
        """The parts of an input of `length` tokens that are run one after the other."""
        text_config, wanted = self.config.text_config, False
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            given = kwargs.get(name)
            wanted = wanted or bool(getattr(text_config, name) if given is None else given)
        # Checkpointed layers keep no cache in training.
        no_cache = cache is None or (self.training and self.language_model.gradient_checkpointing)
        whole = no_cache or wanted or torch.is_grad_enabled()
        step = length if whole else size
        return [slice(start, min(start + step, length)) for start in range(0, length, step)]

    def _masks(self, attention_mask: Tensor | None, cache: Cache | None, new: int) -> Tensor | dict | None:
        """The mask of the next `new` tokens, in a form that does not grow with their number times that of the cache.

        Args:
            attention_mask (`Tensor` of shape `(B, cached + new)`, *optional*): 0 on padding.
        """
        text_config = self.config.text_config
        if text_config._attn_implementation != LONGLLAVA_SDPA:
            return attention_mask
        total = new + (0 if cache is None else int(cache.get_seq_length()))
        if attention_mask is not None and attention_mask.shape[1] != total:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, but there are {total - new} cached tokens and "
                f"{new} new ones"
            )
        if attention_mask is None or bool(attention_mask.all()):
            return {"full_attention": Visible(total, None), "linear_attention": None}
        seen = attention_mask.bool()
        first = seen.int().argmax(1)
        behind = torch.arange(total, device=seen.device) >= first[:, None]
        text = behind & seen
        last = total - text.flip(1).int().argmax(1)
        between = behind & (torch.arange(total, device=seen.device) < last[:, None]) & ~seen
        if between.any():
            return attention_mask  # padding between text: transformers makes a mask of all pairs
        # Padding behind all text needs no mask: a causal token never sees it.
        return {
            "full_attention": Visible(total, tuple(first.tolist())),
            "linear_attention": attention_mask[:, -new:],
        }

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | Iterable[Tensor] | None = None,
        image_grid_hw: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prefill_chunk_size: int | None = None,
        **kwargs,
    ) -> LongLlavaModelOutputWithPast:
        """Run the pictures and the text through the whole model.

        With a cache and without gradients a long input is taken in pieces: pictures are read and encoded, tokens
        embedded and run, and nothing but the cache is kept. The memory beside the cache is then that of one piece.

        Args:
            input_ids (`Tensor` of shape `(B, L)`): token ids; each picture's placeholder is already repeated.
            attention_mask (`Tensor` of shape `(B, cached + L)`, *optional*): 0 on padding.
            past_key_values (`Cache`, *optional*): what came before; any number of new tokens may follow.
            inputs_embeds (`Tensor` of shape `(B, L, H)`, *optional*): instead of `input_ids`, with the embedding of
                the image token where pictures belong.
            pixel_values (`Tensor` of shape `(N, 3, S, S)`, *optional*): the pictures of these L tokens, on any
                device; or a sequence of tensors `(3, S, S)` that reads each when it is asked for; or an iterator of
                them, for one row.
            image_grid_hw (`Tensor` of shape `(N, 2)`, *optional*): rows and columns of tokens of each picture.
            logits_to_keep (`int` or `Tensor`): a number above 0 keeps only the hidden states of so many last tokens.
            prefill_chunk_size (`int`, *optional*): tokens of a piece; `config.prefill_chunk_size` where it is missing.

        Raises:
            ValueError: if image tokens and features differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of input_ids and inputs_embeds is needed")
        size = self.config.prefill_chunk_size if prefill_chunk_size is None else prefill_chunk_size
        if size < 1:
            raise ValueError(f"prefill_chunk_size is {size}, but must be at least 1")
        source: Any = inputs_embeds if input_ids is None else input_ids
        length = source.shape[1]
        if use_cache is None:
            use_cache = self.config.text_config.use_cache
        if use_cache and past_key_values is None and not torch.is_grad_enabled():
            past_key_values = LongLlavaCache(self.config)

        pieces = self._pieces(length, size, None if isinstance(attention_mask, dict) else past_key_values, kwargs)
        if pixel_values is not None:
            is_image = self.is_image_token(input_ids, inputs_embeds)
            grids = self._grids(pixel_values, image_grid_hw, int(is_image.sum()))
            by_piece = self._features_by_piece(pixel_values, grids, is_image, pieces)
        elif input_ids is not None and length > 1:
            # An image token is an error. One token alone was sampled by the model itself, and may be anything.
            pictures_by_row(self.is_image_token(input_ids, None), [])
        if not isinstance(attention_mask, dict):
            # A number, not the counter of a static cache, which goes on while the pieces run.
            cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if len(pieces) > 1 and isinstance(past_key_values, LongLlavaCache):
            past_key_values.reserve(cached + length + length // 16)  # and an answer

        hidden: list[Tensor] = []
        features: list[Tensor] | None = None
        keep = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep > 0 else length
        for piece in pieces:
            embeds = source[:, piece] if input_ids is None else self.get_input_embeddings()(input_ids[:, piece])
            if pixel_values is not None:
                features = next(by_piece)
                if features:
                    merged = torch.cat(features).to(embeds.device, embeds.dtype)
                    embeds = embeds.masked_scatter(is_image[:, piece, None], merged)
            masks = attention_mask
            if not isinstance(attention_mask, dict):
                seen = None if attention_mask is None else attention_mask[:, : cached + piece.stop]
                masks = self._masks(seen, past_key_values, embeds.shape[1])
            outputs = self.language_model(
                inputs_embeds=embeds,
                attention_mask=masks,
                position_ids=None if position_ids is None else position_ids[..., piece],
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            first = max(length - keep - piece.start, 0)
            if first < embeds.shape[1]:
                hidden.append(outputs.last_hidden_state[:, first:])
        if pixel_values is not None:
            next(by_piece, None)  # an error if pictures are left
        if isinstance(past_key_values, LongLlavaCache):
            past_key_values.reserve(0)
        return LongLlavaModelOutputWithPast(
            last_hidden_state=hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            image_hidden_states=None if features is None or len(pieces) > 1 else tuple(features),
        )


def _check_padding(attention_mask: Tensor) -> None:
    """Raise unless the padding of every row (B, L) stands before its text."""
    behind = attention_mask.bool()[:, :-1] & ~attention_mask.bool()[:, 1:]  # text with padding after it
    if behind.any():
        row, position = behind.nonzero()[0].tolist()
        raise ValueError(
            f"Row {row} has padding behind its first {position + 1} tokens: pad on the left, and go on from the cache "
            "of a batch only where no row ended before the others"
        )


class LongLlavaForConditionalGeneration(LongLlavaPreTrainedModel, GenerationMixin):
    """LongLLaVA with its language model head: answers questions about text, pictures and video."""

    _auto_class = "AutoModelForImageTextToText"  # saving copies this file along, and what it imports from beside it
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: LongLlavaConfig):
        super().__init__(config)
        self.model = LongLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self, pixel_values: Tensor | Iterable[Tensor], image_grid_hw: Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """See [`LongLlavaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_grid_hw)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | Iterable[Tensor] | None = None,
        image_grid_hw: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> LongLlavaCausalLMOutputWithPast:
        """Arguments of [`LongLlavaModel.forward`], and:

        Args:
            labels (`Tensor` of shape `(B, L)`, *optional*): target ids, -100 where there is no loss; the model shifts.
            output_router_logits (`bool`, *optional*): return the router logits, and add the load balancing loss times
                `text_config.router_aux_loss_coef` to the loss.
            logits_to_keep (`int` or `Tensor`): compute the logits of the last positions, or of these positions, only;
                0 is all.
        """
        text_config = self.config.text_config
        if output_router_logits is None:
            output_router_logits = text_config.output_router_logits
        if labels is not None and use_cache is None:
            use_cache = False  # nothing continues from a training step
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_hw=image_grid_hw,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])

        loss, aux_loss = None, None
        if labels is not None:
            loss = self.loss_function(logits, labels, text_config.vocab_size, **kwargs)
        if output_router_logits and outputs.router_logits:  # a dense model has none
            # The mask of a cached step is as long as the cache, and a prepared one has no padding to leave out.
            tokens: Any = inputs_embeds if input_ids is None else input_ids
            length = tokens.shape[1]
            mask = attention_mask[:, -length:] if isinstance(attention_mask, Tensor) else None
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, text_config.num_experts, text_config.num_experts_per_tok, mask
            )
            if loss is not None:
                loss = loss + text_config.router_aux_loss_coef * aux_loss.to(loss.device)
        return LongLlavaCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            image_hidden_states=outputs.image_hidden_states,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | Iterable[Tensor] | None = None,
        image_grid_hw: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict:
        """Hand the pictures to the first forward pass only, and of those only the ones that are not in the cache.

        Raises:
            ValueError: if the cache ends inside a picture, pictures and image tokens differ in number, or there is
                padding behind text: the states of the Mamba layers would have run over it.
        """
        if is_first_iteration and attention_mask is not None and attention_mask.ndim == 2:
            _check_padding(attention_mask)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if pixel_values is None or not (is_first_iteration or kwargs.get("use_cache") is False):
            return inputs
        if kwargs.get("use_cache") is False and not isinstance(pixel_values, Sized):
            raise ValueError(
                f"pixel_values is a {type(pixel_values).__name__}, which gives every picture once, but without a "
                "cache each token needs them again: give a tensor or a sequence"
            )
        is_image = self.model.is_image_token(input_ids, inputs_embeds)
        if next_sequence_length is not None and next_sequence_length < is_image.shape[1]:
            tokens = self._picture_tokens(pixel_values, image_grid_hw, is_image)
            cached = is_image[:, :-next_sequence_length].sum(1).tolist()
            new = []
            for row, (pictures, seen) in enumerate(zip(pictures_by_row(is_image, tokens), cached, strict=True)):
                for picture in pictures:
                    if 0 < seen < tokens[picture]:
                        raise ValueError(
                            f"The cache ends inside picture {picture} of row {row}: it holds {seen} of "
                            f"{tokens[picture]} tokens"
                        )
                    if seen == 0:
                        new.append(picture)
                    seen = max(seen - tokens[picture], 0)
            if not new:
                return inputs
            pixel_values = select_pictures(pixel_values, new)
            image_grid_hw = None if image_grid_hw is None else image_grid_hw[new]
        return inputs | {"pixel_values": pixel_values, "image_grid_hw": image_grid_hw}

    def _picture_tokens(
        self, pixel_values: Tensor | Iterable[Tensor], image_grid_hw: Tensor | None, is_image: Tensor
    ) -> list[int]:
        """Tokens of each picture."""
        return [
            rows * columns for rows, columns in self.model._grids(pixel_values, image_grid_hw, int(is_image.sum()))
        ]

    @staticmethod
    def create_masks_for_generate(
        inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs
    ) -> Tensor | dict | None:
        """What `generate` hands to the forward pass beside a static cache: a mask prepared for one token only.

        That step is compiled. More tokens get their masks piece by piece in [`LongLlavaModel.forward`].
        """
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        return create_masks_for_generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, model_kwargs: dict, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None and type(cache) is DynamicCache and not cache.is_initialized:
            offloading = generation_config.cache_implementation == "offloaded"
            model_kwargs["past_key_values"] = LongLlavaCache(self.config, offloading=offloading)

    def _prefill(self, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict, *args, **kwargs):
        """`generate`'s own way of taking a prompt in pieces knows nothing of pictures: the forward pass does it."""
        size = generation_config.prefill_chunk_size
        if size is not None:
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
            model_kwargs = model_kwargs | {"prefill_chunk_size": size}
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **model_kwargs
    ) -> tuple[Tensor | None, dict]:
        """Repeat rows for beams or several answers; the pictures of a row stay together, in prompt order."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        image_grid_hw = model_kwargs.pop("image_grid_hw", None)
        if pixel_values is not None and expand_size > 1:
            is_image = self.model.is_image_token(input_ids, model_kwargs.get("inputs_embeds"))
            by_row = pictures_by_row(is_image, self._picture_tokens(pixel_values, image_grid_hw, is_image))
            order = [picture for pictures in by_row for _ in range(expand_size) for picture in pictures]
            pixel_values = select_pictures(pixel_values, order)
            image_grid_hw = None if image_grid_hw is None else image_grid_hw[order]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs |= {"pixel_values": pixel_values, "image_grid_hw": image_grid_hw}
        return input_ids, model_kwargs


__all__ = ["LongLlavaForConditionalGeneration", "LongLlavaModel", "LongLlavaPreTrainedModel"]
