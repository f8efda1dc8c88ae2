"""What the trainer of students computes, against plain loops over rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from hymba_tune.checkpoint import load_tokenizer, load_weights
from hymba_tune.config import SFTConfig
from hymba_tune.config.distill import Stage
from hymba_tune.distill.matching import HiddenMatch, HiddenStateLoss, Layers
from hymba_tune.distill.pair import TokenizerPair, make_pair
from hymba_tune.distill.rows import AlignedData, alignment, read_rows
from hymba_tune.distill.run import token_bytes
from hymba_tune.distill.tables import count_first_tokens
from hymba_tune.distill.target_maker import TargetMaker
from hymba_tune.distill.targets import Targets
from hymba_tune.distill.teacher import ModelTeacher, find_teacher
from hymba_tune.distill.teacher_signals import LossParameters, OnlineTeacher, RowSpan, TeacherSignals
from hymba_tune.distill.trainer import DistillTrainer
from hymba_tune.registry import resolve_model
from tests.distill.inputs import quiet
from tests.distill.teachers import random_model, save_teacher
from tests.runs import one_plain_step
from tests.tolerances import FLOAT32, FLOAT32_GRADIENT

CPU = torch.device("cpu")
ALPHA, TEMPERATURE, TAU, BETA, TOP_K, ROWS = 0.6, 2.0, 10.0, 0.3, 8, 6
LOSSES: dict[str, dict[str, float]] = {"ce": {"ce": 1.0}, "projection": {"projection": 1.0}, "alm": {"alm": 1.0}}
LOSSES |= {"mix": {"kl": 0.8, "alm": 0.5}, "projection and alm": {"projection": 0.8, "alm": 0.5}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> ModelTeacher:
    return find_teacher(str(save_teacher(tmp_path_factory.mktemp("teacher")))).load(CPU, torch.float32)


@pytest.fixture(scope="module")
def pair(small_model: Path, teacher: ModelTeacher) -> TokenizerPair:
    return make_pair(load_tokenizer(small_model), teacher.tokenizer)


@pytest.fixture(scope="module")
def alike(small_model: Path) -> ModelTeacher:
    """A teacher with the student's tokenizer."""
    return ModelTeacher(random_model("llama", 4096), load_tokenizer(small_model), "alike")


@pytest.fixture(scope="module")
def options(questions: Path, tmp_path_factory: pytest.TempPathFactory) -> SFTConfig:
    """Questions, and an answer with tokens that begin within one of the teacher's and go on into its next."""
    across = tmp_path_factory.mktemp("data") / "across.jsonl"
    across.write_text(json.dumps({"prompt": "What do I see?", "completion": "You see clever answers."}) + "\n")
    return SFTConfig(data=[str(across), str(questions)], caps=[1, ROWS - 1], eval_split=0, max_length=64)


@pytest.fixture(scope="module")
def data(options: SFTConfig, pair: TokenizerPair) -> AlignedData:
    return read_rows(options, pair, context=None, seed=0, prompts=1, working=quiet)


@pytest.fixture(scope="module")
def made(
    data: AlignedData, pair: TokenizerPair, teacher: ModelTeacher, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Targets, and what made them."""
    rows = list(map(alignment, data.rows))
    maker = TargetMaker.of(
        teacher,
        pair,
        count_first_tokens(rows),
        vocabulary=4096,
        top_k=TOP_K,
        temperature=TEMPERATURE,
        device=CPU,
        tables_dir=tmp_path_factory.mktemp("tables"),
    )
    made = {index: taught.targets for index, taught in maker(rows)}
    return [made[index] for index in range(len(rows))], maker


@pytest.fixture(scope="module")
def targets(made: tuple[list[Targets], TargetMaker]) -> list[Targets]:
    return made[0]


@pytest.fixture
def trainer(
    small_model: Path, data: AlignedData, pair: TokenizerPair, targets: Sequence[Targets], tmp_path: Path
) -> Callable[..., DistillTrainer]:
    def make(
        *,
        losses: dict[str, float],
        batch_size: int = ROWS,
        grad_accum: int = 1,
        signals: TeacherSignals | None = None,
        hidden_loss: HiddenStateLoss | None = None,
        **changes: Any,
    ) -> DistillTrainer:
        return DistillTrainer(
            signals=signals or TeacherSignals(LossParameters(TEMPERATURE, TAU, BETA), CPU, targets),
            stages=[Stage(1.0, losses, ALPHA, 0.0)],
            token_bytes=token_bytes(pair.student),
            hidden_loss=hidden_loss,
            model=load_weights(resolve_model(str(small_model)), dtype=torch.float32, device=CPU),
            args=one_plain_step(tmp_path, batch_size=batch_size, grad_accum=grad_accum, **changes),
            train_dataset=data.train,
            eval_dataset=data.train,
            processing_class=load_tokenizer(small_model),
        )

    return make


def sparse_kl(log_probs: Tensor, student_tokens: Tensor, target: Tensor, rest_mass: Tensor) -> Tensor:
    """One token's divergence from its target, term by term."""
    kept = [(int(token), value) for token, value in zip(student_tokens, target, strict=True) if value > -math.inf]
    total = sum(value.exp() * (value - log_probs[token]) for token, value in kept)
    others = torch.ones(len(log_probs), dtype=torch.bool)
    others[[token for token, _ in kept]] = False
    if rest_mass > -math.inf:
        total = total + rest_mass.exp() * (rest_mass - log_probs[others].exp().sum().log())
    return torch.as_tensor(total)


def loop(
    model: torch.nn.Module, data: AlignedData, targets: Sequence[Targets], losses: dict[str, float]
) -> dict[str, Any]:
    """Sums over the rows, each passed alone, of the loss and its parts."""
    sums: dict[str, Any] = {"total": torch.zeros(()), "ce": 0.0, "kd": 0.0, "alm": 0.0, "tokens": 0}
    weight = losses.get("projection", 0.0) + losses.get("kl", 0.0)
    alpha = 0.0 if losses == {"ce": 1.0} else ALPHA
    for row, target in zip(data.rows, targets, strict=True):
        labels = row["labels"]
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        log_probs, hot = logits.log_softmax(-1), (logits / TEMPERATURE).log_softmax(-1)
        covered = [
            (range(*span), known)
            for span, known in zip(target.spans.tolist(), target.span_log_likelihoods, strict=True)
            if "alm" in losses and not ("projection" in losses and set(range(*span)) <= set(target.at.tolist()))
        ]
        for place in (place for place, label in enumerate(labels) if label != -100):
            data_loss = -log_probs[place - 1, labels[place]]
            taught: Any = 0.0
            if weight and place in target.at.tolist():
                number = target.at.tolist().index(place)
                value = TEMPERATURE**2 * sparse_kl(hot[place - 1], *(part[number] for part in target.top))
                sums["kd"] += value.item()
                taught = weight * value
            elif not any(place in span for span, _ in covered):
                taught = data_loss
            sums["total"] = sums["total"] + (1 - alpha) * data_loss + alpha * taught
            sums["ce"] += data_loss.item()
            sums["tokens"] += 1
        for span, known in covered:
            q = (sum(log_probs[place - 1, labels[place]] for place in span).clamp(max=-1e-6) / TAU).exp()
            p = (known.clamp(max=-1e-6) / TAU).exp()
            value = -TAU * (p * q.log() + (1 - p) * (1 - q).log())
            sums["alm"] += value.item()
            sums["total"] = sums["total"] + alpha * losses["alm"] * value
    return sums


LAYOUTS: dict[str, dict[str, Any]] = {
    "one_batch": {},
    "accumulated": {"batch_size": 2, "grad_accum": 3},
    "packed": {"packing": True, "batch_size": 1, "grad_accum": 8},
    "packed_together": {"packing": True, "batch_size": 8},
}


@pytest.mark.parametrize(
    ("layout", "losses"),
    [("one_batch", name) for name in LOSSES] + [(layout, "mix") for layout in LAYOUTS if layout != "one_batch"],
)
def test_first_step_is_that_of_a_plain_loop(
    layout: str,
    losses: str,
    trainer: Callable[..., DistillTrainer],
    data: AlignedData,
    targets: Sequence[Targets],
) -> None:
    """However rows are batched, padded, packed and accumulated; SGD's step is the gradient."""
    fit = trainer(losses=LOSSES[losses], **LAYOUTS[layout])
    before = {name: parameter.detach().clone() for name, parameter in fit.model.named_parameters()}
    sums = loop(fit.model, data, targets, LOSSES[losses])
    count = sums["tokens"]
    assert (sums["alm"] > 0) == ("alm" in LOSSES[losses])  # with projection, only of tokens without a projected target
    (sums["total"] / count).backward()
    gradients = {name: parameter.grad for name, parameter in fit.model.named_parameters() if parameter.grad is not None}
    fit.model.zero_grad()
    fit.train()
    first = next(row for row in fit.state.log_history if "loss" in row)
    FLOAT32.check(torch.tensor(first["loss"]), (sums["total"] / count).detach(), "loss")
    after = dict(fit.model.named_parameters())
    FLOAT32_GRADIENT.check_all({name: before[name] - after[name].detach() for name in gradients}, gradients)
    assert first["more/cross_entropy"] == pytest.approx(sums["ce"] / count, rel=1e-4)
    assert first.get("more/distillation", 0.0) == pytest.approx(sums["kd"] / count, rel=1e-4)
    assert first.get("more/chunk_likelihood", 0.0) == pytest.approx(sums["alm"] / count, rel=1e-4)


@pytest.mark.parametrize("layout", ["accumulated", "packed_together"])
def test_evaluation_is_of_all_learned_tokens(
    layout: str,
    trainer: Callable[..., DistillTrainer],
    data: AlignedData,
    pair: TokenizerPair,
    targets: Sequence[Targets],
) -> None:
    fit = trainer(losses=LOSSES["mix"], **LAYOUTS[layout])
    fit.held_out_sources = {"first": 1, "others": len(data.rows) - 1}
    with torch.no_grad():
        sums = loop(fit.model, data, targets, LOSSES["mix"])
    answers = [row["labels"][at] for row in data.rows for at in row["at"]]
    text = sum(
        len(pair.student.spelling.tokens[token]) for token in answers if token != pair.student.tokenizer.eos_token_id
    )
    found = fit.evaluate()
    assert found["eval_loss"] == pytest.approx(sums["ce"] / sums["tokens"], rel=1e-5)
    first = len(data.rows[0]["at"])
    both = first * found["eval_loss/first"] + (sums["tokens"] - first) * found["eval_loss/others"]
    assert found["eval_loss"] == pytest.approx(float(both / sums["tokens"]), rel=1e-6)
    assert found["eval_more/distillation"] == pytest.approx(sums["kd"] / sums["tokens"], rel=1e-4)
    assert found["eval_more/bits_per_byte"] == pytest.approx(sums["ce"] / math.log(2) / text, rel=1e-5)
    assert fit.stage.losses == LOSSES["mix"]


def test_online_teacher_equals_its_cached_targets(
    trainer: Callable[..., DistillTrainer], data: AlignedData, made: tuple[list[Targets], TargetMaker]
) -> None:
    """An online teacher and cached targets give the same terms."""
    shape = LossParameters(TEMPERATURE, TAU, BETA)
    kept = trainer(losses=LOSSES["projection and alm"])
    online = trainer(
        losses=LOSSES["projection and alm"], signals=TeacherSignals(shape, CPU, None, OnlineTeacher(made[1], data.rows))
    )
    found, known = online.evaluate(), kept.evaluate()
    names = [name for name in known if name.startswith(("eval_loss", "eval_more"))]
    assert len(names) == 4
    assert {name: found[name] for name in names} == pytest.approx({name: known[name] for name in names}, rel=1e-5)


@pytest.mark.parametrize("loss", ["projection", "uld", "alm"])
def test_rollouts_have_the_teachers_loss_only(
    loss: str, trainer: Callable[..., DistillTrainer], data: AlignedData, made: tuple[list[Targets], TargetMaker]
) -> None:
    """No cross-entropy on rollouts, not even where the teacher has no term."""
    signals = TeacherSignals(LossParameters(TEMPERATURE, TAU, BETA), CPU, None, OnlineTeacher(made[1], data.rows))
    fit = trainer(losses={loss: 1.0}, signals=signals)
    rows = [{name: data.rows[number][name] for name in ("input_ids", "labels", "row")} for number in (0, 1)]
    known = fit._losses(fit.model, fit.data_collator(rows))
    fit._own = [alignment(data.rows[1])]
    rows[1] |= {"row": [-1] * len(rows[1]["row"])}
    mixed = fit._losses(fit.model, fit.data_collator(rows))
    alone = fit._losses(fit.model, fit.data_collator(rows[:1]))
    name = "alm" if loss == "alm" else "kd"
    judged = mixed.parts[name] - alone.parts[name]
    FLOAT32.check(mixed.total - alone.total, judged, "loss")
    FLOAT32.check(mixed.parts[name], known.parts[name], "part")
    shared = int((fit._own[0].spelled == 0).sum())
    assert mixed.tokens - alone.tokens == (shared if loss == "uld" else len(fit._own[0].student))


def test_losses_of_the_teacher_in_memory_need_it() -> None:
    signals = TeacherSignals(LossParameters(TEMPERATURE, TAU, BETA), CPU)
    with pytest.raises(ValueError, match="uld: these losses need the teacher in memory"):
        signals.terms([RowSpan(0, 0)], Stage(1.0, {"uld": 1.0}, ALPHA, 0.0))


@pytest.fixture
def one_tokenizer(
    options: SFTConfig, alike: ModelTeacher, tmp_path: Path
) -> Callable[[float], tuple[Dataset, TeacherSignals]]:
    """Rows that both sides read with one tokenizer, and the teacher in memory, at a temperature."""

    def make(temperature: float) -> tuple[Dataset, TeacherSignals]:
        pair = make_pair(alike.tokenizer, alike.tokenizer)
        rows = read_rows(options, pair, context=None, seed=0, prompts=1, working=quiet).rows
        maker = TargetMaker.of(
            alike, pair, None, vocabulary=4096, top_k=4, temperature=temperature, device=CPU, tables_dir=tmp_path
        )
        return rows, TeacherSignals(LossParameters(temperature, TAU, BETA), CPU, None, OnlineTeacher(maker, rows))

    return make


def p_and_q(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return (teacher / TEMPERATURE).softmax(-1), (student / TEMPERATURE).softmax(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def jsd(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = p_and_q(student, teacher)
    middle = BETA * p + (1 - BETA) * q
    return BETA * kl(p, middle) + (1 - BETA) * kl(q, middle)


WHOLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": lambda student, teacher: kl(*p_and_q(student, teacher)),
    "reverse-kl": lambda student, teacher: kl(*reversed(p_and_q(student, teacher))),
    "jsd": jsd,
    "uld": lambda student, teacher: (
        sum(side.sort(-1).values * sign for side, sign in zip(p_and_q(student, teacher), (1, -1), strict=True))
        .abs()
        .sum(-1)
    ),
}


@pytest.mark.parametrize("losses", [["kl"], ["reverse-kl"], ["jsd"], ["uld"], ["kl", "uld"]], ids="+".join)
def test_whole_vocabularies_are_compared(
    losses: list[str],
    trainer: Callable[..., DistillTrainer],
    one_tokenizer: Callable[[float], tuple[Dataset, TeacherSignals]],
) -> None:
    """With one tokenizer every learned token has the teacher's at the same place."""
    rows, signals = one_tokenizer(TEMPERATURE)
    fit = trainer(losses=dict.fromkeys(losses, 0.5), signals=signals)
    total, count, model = torch.zeros(()), 0, fit.model
    teacher = random_model("llama", 4096)
    for row in rows:
        ids, learned = torch.tensor(row["input_ids"]), torch.tensor(row["labels"]) != -100
        logits, theirs = (one(input_ids=ids[None]).logits[0, :-1][learned[1:]] for one in (model, teacher))
        data_loss = torch.nn.functional.cross_entropy(logits, ids[learned], reduction="sum")
        taught = sum(0.5 * TEMPERATURE**2 * WHOLE[name](logits, theirs).sum() for name in losses)
        total, count = total + (1 - ALPHA) * data_loss + ALPHA * taught, count + int(learned.sum())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    (total / count).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    fit.train()
    first = next(row for row in fit.state.log_history if "loss" in row)
    FLOAT32.check(torch.tensor(first["loss"]), (total / count).detach(), "loss")
    after = dict(fit.model.named_parameters())
    FLOAT32_GRADIENT.check_all({name: before[name] - after[name].detach() for name in gradients}, gradients)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_hidden_state_loss_is_that_of_a_plain_loop(
    kind: Any,
    trainer: Callable[..., DistillTrainer],
    one_tokenizer: Callable[[float], tuple[Dataset, TeacherSignals]],
    alike: ModelTeacher,
) -> None:
    """Layer by layer, each token's state that predicts it; against a loop over rows."""
    match = HiddenMatch(Layers(32, 3), Layers(24, 2), kind)
    assert match.layers == [(1, 1), (2, 1), (3, 2)]
    rows, signals = one_tokenizer(1.0)
    assert signals.online is not None
    hidden_loss = HiddenStateLoss(match, signals.online, 0.5)
    fit = trainer(losses=LOSSES["ce"], signals=signals, hidden_loss=hidden_loss)
    batch = fit.data_collator([{name: row[name] for name in ("input_ids", "labels", "row")} for row in rows])
    found = fit._losses(fit.model, batch)
    total, distance = torch.zeros(()), torch.zeros(())
    for row in rows:
        ids, learned = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:] != -100
        ours, theirs = (model(input_ids=ids, output_hidden_states=True) for model in (fit.model, alike.model))
        total = total + torch.nn.functional.cross_entropy(
            ours.logits[0, :-1][learned], ids[0, 1:][learned], reduction="sum"
        )
        for projection, (mine, its) in zip(match.maps, match.layers, strict=True):
            a = ours.hidden_states[mine][0, :-1][learned] @ projection.weight.T  # type: ignore[operator]
            b = theirs.hidden_states[its][0, :-1][learned]
            cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
            distance = distance + ((1 - cosine) if kind == "cosine" else ((a - b) ** 2).mean(-1)).sum() / 3
    FLOAT32.check(found.total, total + 0.5 * distance, "loss")
    FLOAT32.check(found.parts["hidden"].float(), distance, "part")
    trained = [*fit.model.parameters(), *match.parameters()]
    wanted = torch.autograd.grad(total + 0.5 * distance, trained, allow_unused=True)
    for got, expected in zip(torch.autograd.grad(found.total, trained, allow_unused=True), wanted, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            FLOAT32_GRADIENT.check(got, expected, "gradient")


def test_stages_follow_each_other_by_their_shares(trainer: Callable[..., DistillTrainer]) -> None:
    fit = trainer(losses=LOSSES["ce"])
    fit._stages = [Stage(0.3, LOSSES["ce"], ALPHA, 0.0), Stage(0.7, LOSSES["alm"], ALPHA, 0.0)]
    fit.args.max_steps = 10
    seen = []
    for step in range(10):
        fit.state.global_step = step
        seen.append("ce" in fit.stage.losses)
    assert seen == [True] * 3 + [False] * 7
