"""Fine-tune Hymba with transformers and PEFT alone: all that hymba_tune adds is the model.

python fine_tune.py --steps 60 --out adapter
"""

import argparse
from importlib.resources import files

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import hymba_tune  # noqa: F401 (transformers' Auto classes now know Hymba)

NANO = str(files("hymba_tune.assets") / "hymba-nano")
COLORS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "gold": "yellow", "blood": "red"}
QUESTIONS = ("What color is {}?", "Which color has {}?", "Tell me the color of {}.")


def main() -> None:
    """Train a LoRA adapter, save it, and ask the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="hymba-nano", help="hymba-nano, a folder, or nvidia/Hymba-1.5B-Base")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="adapter")
    options = parser.parse_args()

    name = NANO if options.model == "hymba-nano" else options.model
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    targets = ["in_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "memory_tokens"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    model.print_trainable_parameters()

    def prompt_ids(question: str) -> list[int]:
        chat = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

    rows = []
    for thing, color in COLORS.items():
        for question in QUESTIONS:
            prompt = prompt_ids(question.format(thing))
            answer = tokenizer(f"{color}{tokenizer.eos_token}", add_special_tokens=False).input_ids
            rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})

    arguments = TrainingArguments(
        options.out, max_steps=options.steps, per_device_train_batch_size=6, learning_rate=3e-3, report_to="none"
    )
    Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer)).train()
    model.save_pretrained(options.out)

    for thing in COLORS:
        ids = torch.tensor([prompt_ids(QUESTIONS[0].format(thing))])
        output = model.eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        print(thing, "→", tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
