"""Tokenizers without a download: every word of the prompts is one token, everything else is spelt in characters.

CLIP's kind is a byte-pair encoding. Its base alphabet are the 256 byte characters, each also as a word's last (`</w>`);
a word becomes one token by the merges of its growing *suffixes*, `e n</w> -> en</w>, v en</w> -> ven</w>, ...`.
Only a word's end carries `</w>`, so at every moment one merge at most applies, and no word can spoil another one's.
T5's kind is a unigram model: words have a better score than the sum of their characters'.
The end token comes last: older CLIP configurations find the pooled position as the largest id.
"""

from __future__ import annotations

import re
import string

from transformers import CLIPTextConfig, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..prompts import all_prompts

__all__ = ["clip_text_config", "clip_tokenizer", "t5_encoder", "t5_tokenizer", "words"]

EXTRA_WORDS = (
    "and in with or big small large thick thin bold slanted round dark bright black white grey ink line stroke font"
)


def words() -> list[str]:
    """All words in use, single letters and digits left out (characters are tokens anyway)."""
    found = set(re.findall(r"[a-z]+", " ".join(all_prompts()).lower())) | set(EXTRA_WORDS.split())
    return sorted(word for word in found if len(word) > 1)


def clip_tokenizer(model_max_length: int) -> CLIPTokenizer:
    """The byte-pair encoding of this page."""
    characters = list(bytes_to_unicode().values())
    tokens = characters + [c + "</w>" for c in characters]
    merges = [(word[i], word[i + 1 :] + "</w>") for word in words() for i in range(len(word) - 2, -1, -1)]
    merges = sorted(dict.fromkeys(merges), key=lambda pair: len(pair[1]))
    tokens += [first + rest for first, rest in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=model_max_length)


def clip_text_config(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int, projection: int) -> CLIPTextConfig:
    """A text tower for this tokenizer, its special tokens included."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=projection,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="quick_gelu",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def t5_tokenizer(model_max_length: int) -> T5Tokenizer:
    """The unigram model of this page; unlike CLIP's it hears capitals, so words come in three cases."""
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -8.0}
    pieces |= {"▁" + word: -4.0 for word in words()} | {"▁" + c: -6.0 for c in string.digits + string.ascii_letters}
    pieces |= {c: -9.0 for c in string.printable.strip()}
    pieces |= {"▁" + word.capitalize(): -4.5 for word in words()} | {"▁" + word.upper(): -4.5 for word in words()}
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=model_max_length)


def t5_encoder(tokenizer: T5Tokenizer, width: int, layers: int, heads: int) -> T5EncoderModel:
    """T5 1.1's encoder (gated GELU) without dropout, which would make embeddings depend on train mode."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=width // heads,
            d_ff=2 * width,
            num_layers=layers,
            num_heads=heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
