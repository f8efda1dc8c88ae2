"""Tokenizers as they come in the wild, small enough to build on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hymba_tune.data import HYMBA_TEMPLATE, Message

CORPUS = [
    "System User Assistant Tool: what is the answer to the question? The answer is 42, and that is all.\n",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.\n",
    "[INST] [/INST] <extra_id_0> <extra_id_1> <tool> </tool> <context> </context> user assistant system\n",
] * 3

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message.role == 'system' %}{% set ns.system = message.content + '\n\n' %}"
    "{% elif message.role == 'user' %}{{ '[INST] ' + ns.system + message.content + ' [/INST]' }}"
    "{% set ns.system = '' %}"
    "{% elif message.role == 'assistant' %}"
    "{% generation %}{{ ' ' + message.content | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('Only user and assistant turns, please') }}{% endif %}{% endfor %}"
)


def without_markers(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def sentencepiece_like(template: str | None, *, add_bos: bool = True, add_eos: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2's and Hymba's: a space before every text, bytes for what is not in the vocabulary."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # as SentencePiece: no token crosses words
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token in model["vocab"] if token != "\n"]
    merges = [tuple(pair) for pair in model["merges"] if "\n" not in "".join(pair)]
    known = {token for token in tokens if "\n" not in token}
    tokenizer = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(p for p in tokens if p in known)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    single = ("<s> " if add_bos else "") + "$A" + (" </s>" if add_eos else "")
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def byte_level(
    template: str, specials: list[str], eos: str, bos: str | None = None, *, trim_offsets: bool = False
) -> PreTrainedTokenizerFast:
    """As GPT-2's and its heirs: words of bytes, no space of its own, special tokens for the chat."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=template)


LLAMA3_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
BUILDERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "hymba": lambda: sentencepiece_like(HYMBA_TEMPLATE),
    "chatml": lambda: byte_level(CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "llama3": lambda: byte_level(LLAMA3, LLAMA3_TOKENS, "<|eot_id|>", "<|begin_of_text|>"),
    "mistral": lambda: sentencepiece_like(MISTRAL),
}


def turns(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    """Messages that alternate between user and assistant."""
    first = [Message("system", system)] if system is not None else []
    roles = ("user", "assistant")
    return (*first, *(Message(roles[index % 2], content) for index, content in enumerate(contents)))
