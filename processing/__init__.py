"""Pictures, video and chat to tensors."""

from .picture_stream_longllava import PictureStream
from .processing_longllava import LongLlavaProcessor

__all__ = ["LongLlavaProcessor", "PictureStream"]
