"""Answer several prompts in one batch, with the log-probability of every token.

python generate.py --model hymba-nano "Who are you?" "What does textwrap.dedent do?"
"""

import argparse

from hymba_tune.config import ChatConfig
from hymba_tune.data import Conversation, Message, encode_prompt
from hymba_tune.generate import Generation, Sampling, find_model, generate_texts


def main() -> None:
    """Print each answer as soon as it is finished, whatever the order of the prompts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="*", default=["Who are you?", "What does textwrap.dedent do?", "Hello!"])
    parser.add_argument("--model", default="hymba-nano", help="anything that hymba-tune chat takes, such as a run")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    options = parser.parse_args()

    found = find_model(options.model, ChatConfig(dtype="float32"))  # no weights are loaded yet
    tokenizer, model = found.tokenizer, found.load()
    generations = [
        Generation(
            prompt=encode_prompt(Conversation((Message("user", prompt),)), tokenizer),
            max_new_tokens=options.max_new_tokens,
            sampling=Sampling(temperature=options.temperature, seed=number),
            top=3,  # record the score of each token, and the three likeliest ones
            number=number,
        )
        for number, prompt in enumerate(options.prompts)
    ]
    for one in generate_texts(model, tokenizer, generations, batch_size=8):
        log_prob = sum(score.log_prob for score in one.scores)
        print(f"\n{options.prompts[one.number]}\n  {one.text(tokenizer).strip()}")
        print(f"  {len(one.ids)} tokens, log-probability {log_prob:.2f}, ended by {one.finish_reason}")
        first = ", ".join(f"{tokenizer.decode([token])!r} {value:.2f}" for token, value in one.scores[0].top)
        print(f"  likeliest first tokens: {first}")


if __name__ == "__main__":
    main()
