"""Codes while the sound is being made, and sound while codes arrive.

Two layers.  :class:`Encoder` and :class:`Decoder` are pure: they take whole blocks of many rows and give back codes or
samples and a new state, which the caller keeps.  :class:`StreamEncoder` and :class:`StreamDecoder` hold one row's state
and take pieces of any length.  On the CPU both give, bit for bit, what the codec gives for the whole.
"""

from .decoder import Decoder
from .encoder import Encoder, Sliding
from .streams import StreamDecoder, StreamEncoder, agreement

__all__ = ["Decoder", "Encoder", "Sliding", "StreamDecoder", "StreamEncoder", "agreement"]
