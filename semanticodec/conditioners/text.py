"""FLAN-T5: one vector per token of a text.  B batch, L tokens, D channels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .config import T5Config
from .hub import Tokenizer, transformers
from .sequence import Context


class T5(nn.Module):
    """Encodes texts; the model is the encoder of transformers' ``T5EncoderModel``.

    Built by the caller under ``torch.device("meta")``, then filled (:func:`semanticodec.conditioners.keys.fill`).

    Source: behaves as the FLAN-T5 conditioner of AudioLDM 2 (spec 4.2): at most 128 tokens, padded to the longest.
    """

    def __init__(self, config: T5Config, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer or Tokenizer(config.tokenizer, config.max_tokens)
        library = transformers()
        whole = library.T5EncoderModel(
            library.T5Config(
                vocab_size=config.vocabulary,
                d_model=config.dim,
                d_kv=config.head_dim,
                d_ff=config.hidden,
                num_layers=config.depth,
                num_heads=config.heads,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        )
        self.model = whole.encoder

    def text(self, texts: Sequence[str]) -> Context:
        """Encode texts.

        Returns:
            States ``[B, L, D]``, padded to the longest text, and the mask ``[B, L]``.

        Raises:
            CheckpointError: the tokenizer's files cannot be found.
        """
        return self.tokens(*self.tokenizer(texts))

    def tokens(self, ids: Tensor, mask: Tensor) -> Context:
        """Encode tokenized texts: int64 ids ``[B, L]`` and their mask ``[B, L]``."""
        device = self.model.final_layer_norm.weight.device
        ids, mask = ids.to(device), mask.to(device)
        states: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states, mask.to(states.dtype)

    def unconditional(self, batch: int) -> Context:
        """Return the encoding of the empty text, one token long, which stands for no condition."""
        states, mask = self.text([""])
        return states.expand(batch, -1, -1), mask.expand(batch, -1)
