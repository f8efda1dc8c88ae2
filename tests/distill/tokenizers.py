"""Small tokenizers in addition to those of the data's tests."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.data.small_tokenizers import BUILDERS, CORPUS, MISTRAL

SPECIAL = ["<unk>", "<s>", "</s>"]


def unigram(template: str | None = None) -> PreTrainedTokenizerFast:
    """As T5's and XLM-R's, with bytes for what is not in the vocabulary."""
    words = sorted({f"▁{word}" for text in CORPUS for word in text.split()} | set("".join(CORPUS)) | {"▁", "▁▁"})
    pieces = [(piece, 0.0) for piece in SPECIAL] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [(word, -1.0 - len(word) / 9) for word in words if not word.isspace()]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(special_tokens=["[UNK]"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[UNK]")


ALL: dict[str, PreTrainedTokenizerBase] = {name: build() for name, build in BUILDERS.items()}
ALL["unigram"] = unigram(MISTRAL)
"""One of each kind, with chat templates of several."""
