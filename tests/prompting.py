"""Small random conditioners, and tokenizers for them that need no network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tiny import fill
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from semanticodec.conditioners.config import (
    CLAPConfig,
    PhonemeConfig,
    PromptConfig,
    SequenceConfig,
    T5Config,
)
from semanticodec.conditioners.prompts import PromptConditioner

WORDS = ["a", "dog", "barks", "twice", "while", "rain", "falls", "on", "tin", "roofs", "and", "bells", "ring"]
CLAP = CLAPConfig(
    audio_base=8,
    audio_depths=(1, 1, 2, 1),
    audio_heads=(1, 2, 2, 4),
    text_dim=16,
    text_depth=2,
    text_heads=2,
    text_hidden=24,
    vocabulary=4 + len(WORDS),
    positions=20,
    dim=12,
    max_tokens=16,
)
T5 = T5Config(dim=16, head_dim=8, heads=2, hidden=24, depth=2, vocabulary=4 + len(WORDS), max_tokens=9)
SEQUENCE = SequenceConfig(inputs=(12, 16), count=3, dim=16, depth=2, heads=2, positions=40, rows=4)
PHONEMES = PhonemeConfig(dim=16, hidden=24, heads=2, depth=2, length=30)
SYSTEMS = {
    "film": PromptConfig(clap=CLAP, film=True),
    "t5": PromptConfig(clap=CLAP, t5=T5, contexts=("t5",)),
    "sequence": PromptConfig(clap=CLAP, t5=T5, sequence=SEQUENCE, contexts=("sequence", "t5")),
    "speech": PromptConfig(
        clap=CLAP, phonemes=PHONEMES, sequence=replace(SEQUENCE, positions=60), contexts=("sequence",)
    ),
}


def save_tokenizer(folder: Path, kind: str) -> str:
    """Write a tokenizer of whole words with RoBERTa's or T5's special tokens; return its folder."""
    roberta = kind == "roberta"
    special = ["<s>", "<pad>", "</s>", "<unk>"] if roberta else ["<pad>", "</s>", "<unk>", "<extra>"]
    words = Words(WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    ids = [(token, special.index(token)) for token in special]
    words.post_processor = TemplateProcessing("<s> $A </s>" if roberta else "$A </s>", special_tokens=ids)
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return str(folder)


def conditioner(system: str, folder: Path) -> PromptConditioner:
    """Return a small random conditioner whose tokenizers lie in ``folder``."""
    config = SYSTEMS[system]
    clap = replace(config.clap, tokenizer=save_tokenizer(folder / "roberta", "roberta"))
    t5 = config.t5 and replace(config.t5, tokenizer=save_tokenizer(folder / "t5", "t5"))
    module = PromptConditioner(replace(config, clap=clap, t5=t5))
    fill(module)
    return module.requires_grad_(False).eval()
