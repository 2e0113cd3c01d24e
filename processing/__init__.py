"""Pictures, video and chat to tensors."""

from .processing_longllava import LongLlavaProcessor

__all__ = ["LongLlavaProcessor"]
