import pytest

from hymba_tune.adapters import add_adapter, count_parameters, describe, lora_config, short_count
from hymba_tune.config import MetaTokens, Method
from tests.adapters.small import METHODS, adapted_model
from tests.tiny import tiny_model


def test_tied_parameters_count_once() -> None:
    model = tiny_model()
    numbers = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert count_parameters(model) == (sum(numbers.values()), sum(numbers.values()))


def test_only_the_adapter_is_trainable() -> None:
    # x_proj.0 maps 48 to 4 + 3 + 3.
    model = tiny_model()
    total = sum(parameter.numel() for parameter in model.parameters())
    config = lora_config(
        model,
        targets=["x_proj.0"],
        method=Method.lora,
        rank=2,
        alpha=None,
        dropout=0.0,
        rslora=False,
        meta_tokens=MetaTokens.frozen,
    )
    trainable = 4 * 2 * (48 + 10)
    adapted = add_adapter(model, config, ["x_proj.0"])
    assert count_parameters(adapted) == (trainable, total + trainable)
    share = f"{100 * trainable / (total + trainable):.1f} %"
    assert (
        describe(adapted, ["x_proj.0"]) == f"LoRA r2 on x_proj.0 (1 kind × 4 layers) · {trainable} trainable, {share}"
    )


@pytest.mark.parametrize(
    ("method", "meta", "expected"),
    [
        ("lora", "lora", "LoRA r4 on all (7 kinds × 4 layers) + meta tokens · "),
        ("dora", "full", "DoRA r4 on all (7 kinds × 4 layers) + full meta tokens · "),
        ("rslora", "frozen", "rsLoRA r4 on all (7 kinds × 4 layers) · "),
    ],
)
def test_line_names_the_method_and_the_targets(method: str, meta: str, expected: str) -> None:
    assert describe(adapted_model("all", meta, **METHODS[method]), ["all"]).startswith(expected)


def test_full_training_is_described_as_every_weight() -> None:
    assert describe(tiny_model(), ["all"]).startswith("every weight · ")
    assert describe(tiny_model(), ["all"]).endswith("trainable, 100 %")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (912, "912"), (999_499, "999k"), (999_500, "1M"), (21_432_000, "21.4M"), (1_522_797_824, "1.52B")],
)
def test_large_numbers_have_three_digits_and_a_unit(count: int, text: str) -> None:
    assert short_count(count) == text
