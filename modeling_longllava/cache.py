"""The hybrid cache: keys and values that grow in place, Mamba states that do not grow, and cheap ways back and aside.

Of L cached tokens an attention layer keeps keys and values (batch, heads, L, head size) and a Mamba layer the last
inputs of its convolution and one state, whatever L is. For the 9B that is 16 KB per token in bfloat16 and 15 MB.
"""

from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionLayer

GROWTH = 1.25  # a longer buffer is this many times the tokens it must hold: each token is copied about four times
SPARE = 64  # and at least so many tokens longer


class _Buffer:
    """Room for the keys and values of one layer. Several layers may look at it, each at its own first tokens."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values
        self.layers: WeakSet[GrowingLayer] = WeakSet()
        self.lock = Lock()  # forks may be asked in threads of their own


class GrowingLayer(DynamicLayer):
    """Keys and values of an attention layer, in a buffer with room: a new token is written behind the others.

    transformers' own layer copies all of them for every token. `keys` and `values` are views of the first tokens of
    the buffer. A layer made by [`share`] looks at the same buffer; only the longest of the layers may write behind
    itself, since what follows belongs to it. Another one moves to a buffer of its own when it is written to.
    """

    keys: Any
    values: Any
    is_initialized: bool

    def __init__(self) -> None:
        super().__init__()
        self.reserved = 0  # tokens to make room for when the buffer has to move anyway
        self._buffer: _Buffer | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (batch, heads, new, head size) and return those of all tokens.

        Raises:
            ValueError: if the new ones have another dtype or batch size than the cached ones.
        """
        if torch.is_grad_enabled() and key_states.requires_grad:
            self._leave()  # gradients do not survive writing in place
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        if length > 0 and (self.keys.dtype, self.keys.shape[0]) != (key_states.dtype, key_states.shape[0]):
            raise ValueError(
                f"the cache holds {self.keys.shape[0]} rows of {self.keys.dtype}, but the new keys are "
                f"{key_states.shape[0]} rows of {key_states.dtype}"
            )
        total = length + key_states.shape[-2]
        buffer = self._buffer
        if buffer is None or not self._claim(buffer, length, total):
            buffer = self._move(key_states, value_states, length, total)
        buffer.keys[:, :, length:total] = key_states
        buffer.values[:, :, length:total] = value_states
        return self.keys, self.values

    def _claim(self, buffer: _Buffer, length: int, total: int) -> bool:
        """Whether the buffer has room for `total` tokens, where nobody else has written; if so, it is taken."""
        # Reordering beams, offloading and the like replace `keys` by a tensor outside of the buffer.
        inside = length == 0 or self.keys.data_ptr() == buffer.keys.data_ptr()
        if not inside or buffer.keys.shape[2] < total or (length > 0 and self.keys.shape[0] != buffer.keys.shape[0]):
            return False
        with buffer.lock:
            if any(layer is not self and layer.get_seq_length() > length for layer in buffer.layers):
                return False
            self.keys, self.values = buffer.keys[:, :, :total], buffer.values[:, :, :total]
        return True

    def _move(self, key_states: Tensor, value_states: Tensor, length: int, total: int) -> _Buffer:
        room = max(self.reserved, int(total * GROWTH), total + SPARE)
        moved = []
        for old, new in ((self.keys, key_states), (self.values, value_states)):
            tensor = new.new_empty(*new.shape[:2], room, new.shape[-1])
            if length > 0:
                tensor[:, :, :length] = old
            moved.append(tensor)
        self._leave()
        buffer = self._buffer = _Buffer(*moved)
        buffer.layers.add(self)
        self.keys, self.values = buffer.keys[:, :, :total], buffer.values[:, :, :total]
        return buffer

    def _leave(self) -> None:
        if self._buffer is not None:
            with self._buffer.lock:
                self._buffer.layers.discard(self)
            self._buffer = None

    def share(self) -> "GrowingLayer":
        """A second layer with the same past and no memory of its own until one of the two is written to."""
        other = GrowingLayer()
        other.__dict__.update(self.__dict__)
        if self._buffer is not None:
            with self._buffer.lock:
                self._buffer.layers.add(other)
        return other

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens; with none the layer is as new."""
        if length == 0:
            self.reset()
        elif self.is_initialized:
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]

    def offload(self) -> None:
        super().offload()
        self._leave()  # or the buffer would stay on the device

    def reset(self) -> None:
        self._leave()
        self.keys = self.values = None
        self.is_initialized = False

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the buffer and whoever else looks at it."""
        return self.__dict__ | {"_buffer": None}


class Snapshot(NamedTuple):
    """Where a cache was: its tokens, and for each Mamba layer what the convolution and the state held (or None)."""

    length: int
    states: tuple[tuple[Tensor, Tensor] | None, ...]


class LongLlavaCache(DynamicCache):
    """transformers' `DynamicCache` for a hybrid model, growing in place, with snapshots and forks.

    Args:
        config: configuration of the model, or of its language model.
        offloading (`bool`, *optional*): keep the layers on the CPU while they are not needed, as in `DynamicCache`.
    """

    layers: list[Any]

    def __init__(self, config: Any, offloading: bool = False):
        super().__init__(config=config.get_text_config(decoder=True), offloading=offloading)
        self.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens at once when a buffer next has to move: no growing in steps on the way."""
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.reserved = tokens

    def snapshot(self) -> Snapshot:
        """Remember the present point. Costs a copy of the Mamba states; keys and values stay where they are."""
        states = tuple(_copy_states(layer) if _is_mamba(layer) else None for layer in self.layers)
        return Snapshot(self.get_seq_length(), states)

    @staticmethod
    def on_cpu(snapshot: Snapshot) -> Snapshot:
        """The snapshot with its states on the CPU, for keeping."""
        states = (None if pair is None else (pair[0].cpu(), pair[1].cpu()) for pair in snapshot.states)
        return Snapshot(snapshot.length, tuple(states))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this cache, or of the one that it was forked from.

        Raises:
            ValueError: if the cache has fewer tokens than the snapshot.
        """
        if snapshot.length > self.get_seq_length():
            raise ValueError(
                f"a snapshot of {snapshot.length} tokens cannot be restored in a cache of {self.get_seq_length()}"
            )
        for index, (layer, states) in enumerate(zip(self.layers, snapshot.states, strict=True)):
            if isinstance(layer, GrowingLayer):
                layer.truncate(snapshot.length)
            else:
                if states is None:
                    self.layers[index] = LinearAttentionLayer()
                _set_states(self.layers[index], states)

    def fork(self) -> "LongLlavaCache":
        """A second cache with the same past; keys and values are shared until one of the two writes over the other."""
        other = object.__new__(LongLlavaCache)
        other.__dict__.update(self.__dict__)
        other.layers = []
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                other.layers.append(layer.share())
            else:
                other.layers.append(LinearAttentionLayer())
                _set_states(other.layers[-1], _copy_states(layer))
        return other


def _is_mamba(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionLayer)


def _copy_states(layer: LinearAttentionLayer) -> tuple[Tensor, Tensor] | None:
    """Inputs of the convolution (batch, channels, width) and state (batch, channels, states); None if unused."""
    if not layer.has_previous_state[0]:
        return None
    return layer.conv_states[0].clone(), layer.recurrent_states[0].clone()


def _set_states(layer: LinearAttentionLayer, states: tuple[Tensor, Tensor] | None) -> None:
    if states is None:
        return
    conv, recurrent = states
    if layer.device is not None:  # a snapshot may lie on the CPU
        conv, recurrent = conv.to(layer.device), recurrent.to(layer.device)
    layer.update_conv_state(conv)  # makes room, if there is none; of what it joined to the old ones only `conv` stays
    layer.update_recurrent_state(recurrent)


__all__ = ["LongLlavaCache", "Snapshot"]
