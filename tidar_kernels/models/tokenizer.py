"""A byte-level tokenizer: every UTF-8 byte is a token, and two ids beyond them mean MASK and end of text."""

from __future__ import annotations

import codecs
import operator
from collections.abc import Iterable

__all__ = ["EOS_ID", "MASK_ID", "VOCAB_SIZE", "ByteTokenizer", "StreamDecoder"]

MASK_ID = 256
EOS_ID = 257
VOCAB_SIZE = 258


class StreamDecoder:
    """Tokens in, text out, as they come: bytes of an unfinished character wait for the rest of it."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, tokens: Iterable[int]) -> str:
        """The text that `tokens` complete; MASK and EOS add nothing.

        Raises:
            TypeError: these are no ids. ValueError: a token outside the vocabulary.
        """
        return self._utf8.decode(_to_bytes(tokens))

    def finish(self) -> str:
        """What is left: U+FFFD if the text ended inside a character, else the empty string."""
        return self._utf8.decode(b"", final=True)


class ByteTokenizer:
    """Ids 0..255 are bytes, 256 is MASK, 257 ends a text."""

    vocab_size = VOCAB_SIZE
    mask_token_id = MASK_ID
    eos_token_id = EOS_ID

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes of `text`; lone surrogates become "?".

        Raises:
            TypeError: `text` is not a str.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str, got {type(text).__name__}")
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of `tokens`; MASK and EOS are dropped, invalid UTF-8 becomes U+FFFD.

        Raises:
            TypeError: these are no ids. ValueError: a token outside the vocabulary.
        """
        return _to_bytes(tokens).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        """A fresh incremental decoder."""
        return StreamDecoder()


def _to_bytes(tokens: Iterable[int]) -> bytes:
    try:
        ids = iter(tokens)
    except TypeError:
        raise TypeError(f"tokens: expected ids, got {type(tokens).__name__}") from None
    kept = bytearray()
    for one in ids:
        try:
            token = operator.index(one)
        except (TypeError, ValueError, RuntimeError):  # the last two of tensors that are no number
            raise TypeError(f"tokens: expected ids, got {type(one).__name__}") from None
        if not 0 <= token < VOCAB_SIZE:
            raise ValueError(f"tokens: expected ids in [0, {VOCAB_SIZE}), got {token}")
        if token < 256:
            kept.append(token)
    return bytes(kept)
