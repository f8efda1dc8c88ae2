"""Train the teacher: a small Llama with a byte-level tokenizer of its own, in data/teacher."""

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 400  # 256 bytes, 2 special tokens and the 142 most useful merges
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, which can spell any text, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.chat_template = TEMPLATE
    return fast


def train_model(rows: list[list[int]], steps: int, batch_size: int) -> LlamaForCausalLM:
    """A Llama of 1.2M parameters, trained on all tokens of the rows."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    rng = random.Random(0)
    for step in range(1, steps + 1):
        batch = rng.sample(rows, min(batch_size, len(rows)))
        longest = max(map(len, batch))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits.float()
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            print(f"step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.inference_mode()
def count_right(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, talks: list[list[dict]]) -> int:
    """The number of last answers that the teacher writes word for word."""
    prompts = [
        tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=False) for talk in talks
    ]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    output = model.generate(input_ids=ids, attention_mask=(ids > 0).long(), max_new_tokens=64, do_sample=False)
    answers = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return sum(answer.strip() == talk[-1]["content"] for answer, talk in zip(answers, talks, strict=True))


def read_talks(name: str) -> list[list[dict]]:
    """The conversations of a file of data/."""
    path = Path("data", f"{name}.jsonl")
    if not path.is_file():
        raise SystemExit(f"There is no {path} here. Run make_data.py first, in this folder.")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def main() -> None:
    """Read data/teacher.jsonl, and write the tokenizer and the model to data/teacher."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, help="a file for the count of right answers")
    options = parser.parse_args()

    torch.manual_seed(0)
    talks, held_out = read_talks("teacher"), read_talks("eval")
    tokenizer = train_tokenizer([message["content"] for talk in talks for message in talk])
    rows = [tokenizer.apply_chat_template(talk, return_dict=False) for talk in talks]
    print(f"{len(rows)} conversations, {sum(map(len, rows)):,} tokens of {VOCABULARY} kinds")
    model = train_model(rows, options.steps, options.batch_size)
    tokenizer.save_pretrained("data/teacher")
    model.save_pretrained("data/teacher")
    right = {"parameters": model.num_parameters(), "questions": len(held_out)}
    right["right"] = count_right(model, tokenizer, held_out)
    print(f"{right['right']} of {right['questions']} held-out questions answered word for word")
    if options.out:
        options.out.write_text(json.dumps(right, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
