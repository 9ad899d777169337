"""The word-level tokenizer of the demonstration language, as a stock ``tokenizers`` folder.

Words and punctuation marks are tokens of their own, so a context and its continuation never
share one. A document is encoded with a leading BOS; unknown words become ``<unk>``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from bundled_model.vocabulary import BOS, EOS, PAD, UNK, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def build_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    """The tokenizer, with ids in the order of :func:`vocabulary.tokens`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(tokens())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # WordPiece only for its joining with spaces and its cleaning of " ." to ".", not of " :"
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=True), decoders.Replace(" :", ":")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``."""
    build_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 names a class here that transformers 4 does not know; both know this one
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
