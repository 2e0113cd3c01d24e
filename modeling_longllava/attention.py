"""Causal attention of new tokens over a cache, without a mask of their size times that of the cache.

Registered with transformers as `"longllava_sdpa"`; the language model uses it wherever `"sdpa"` is asked for. No
tensor of queries x keys is made, and keys and values are not repeated for the query heads that share them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "longllava_sdpa"


class Visible(NamedTuple):
    """What the new tokens may see: stands in for a mask.

    Attributes:
        length: tokens of the cache that are filled, the new ones included; a static cache has more room than that.
        first: for each row of the batch the first token that is not padding; None where no row has padding.
    """

    length: int
    first: tuple[int, ...] | None


def longllava_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Visible | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        query (`Tensor` of shape `(B, heads, L, D)`): of the new tokens, which are the last of the keys.
        key, value (`Tensor` of shape `(B, key heads, S, D)`): of all tokens; each is used by `heads / key heads`
            query heads.
        attention_mask (`Tensor` of shape `(B, 1, L, S)`, [`Visible`], *optional*): None if all S tokens are filled
            and none is padding.

    Returns:
        `Tensor` of shape `(B, L, heads, D)`, and None for the weights. At padding it holds anything finite.
    """
    if isinstance(attention_mask, Tensor) and query.shape[2] > 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    first = None
    if isinstance(attention_mask, Visible):
        key, value = key[:, :, : attention_mask.length], value[:, :, : attention_mask.length]
        first, attention_mask = attention_mask.first, None
    if query.shape[2] == 1:
        if first is not None:
            positions = torch.arange(key.shape[2], device=key.device)
            attention_mask = positions >= torch.tensor(first, device=key.device)[:, None, None, None]
        output = _one_query(query, key, value, attention_mask, dropout, scaling)
    elif first is None:
        output = _causal(query, key, value, dropout, scaling)
    else:
        output = torch.zeros_like(query)
        past = key.shape[2] - query.shape[2]
        for row, start in enumerate(first):
            new = max(start - past, 0)  # padding among the new tokens
            if new < query.shape[2]:
                one = slice(row, row + 1)
                output[one, :, new:] = _causal(
                    query[one, :, new:], key[one, :, start:], value[one, :, start:], dropout, scaling
                )
    return output.transpose(1, 2).contiguous(), None


def _one_query(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """One token sees all: the query heads that share a key head are queries of one head."""
    batch, heads, _, size = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], size)
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return output.reshape(batch, heads, 1, size)


def _causal(query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
    """(B, heads, L, D) over S >= L keys, of which the last L are those of the queries themselves."""
    length, past = query.shape[2], key.shape[2] - query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if past == 0:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    if query.device.type != "cpu" or dropout > 0 or (torch.is_grad_enabled() and query.requires_grad):
        # FlashAttention knows a causal mask that ends in the lower right corner; PyTorch's CPU kernel does not.
        mask = causal_lower_right(length, length + past)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )
    # Two softmaxes, over the past, which every new token sees in full, and over the new tokens, joined by their sums.
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    before, sum_before = attend(query, key[:, :, :past], value[:, :, :past], scale=scaling)
    among, sum_among = attend(query, key[:, :, past:], value[:, :, past:], is_causal=True, scale=scaling)
    weight = torch.sigmoid(sum_before - sum_among)[..., None].to(query.dtype)  # (B, heads, L, 1)
    return torch.lerp(among, before, weight)


AttentionInterface.register(NAME, longllava_sdpa)
# Where transformers makes a mask for it after all: for a static cache, and for padding in the middle of a row.
AttentionMaskInterface.register(NAME, sdpa_mask)

__all__ = ["NAME", "Visible", "longllava_sdpa"]
