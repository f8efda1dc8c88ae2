"""Targets from a teacher's pass: its whole softmax projected and cut to the likeliest; how likely its spans are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hymba_tune.data import Conversation, Message
from hymba_tune.distill import chunks
from hymba_tune.distill.alignment import Alignment, align
from hymba_tune.distill.losses import sparse_projection_kl
from hymba_tune.distill.pair import TokenizerPair, make_pair
from hymba_tune.distill.projection import Projection, find_places
from hymba_tune.distill.tables import build_tables, count_first_tokens
from hymba_tune.distill.target_maker import CaptureStats, TargetBatch, TargetMaker
from hymba_tune.distill.teacher import ModelTeacher
from tests.distill.teachers import random_model, tokenizer_size
from tests.distill.tokenizers import ALL
from tests.tolerances import FLOAT32

TEXTS = ["Natalia sold 48 clips in April, naïve 🙂.", "The answer is 42\n\n    and that is all", "42"]
PAIRS = [("hymba", "llama3"), ("llama3", "hymba"), ("llama3", "llama3"), ("unigram", "chatml")]


def aligned(pair: TokenizerPair) -> list[Alignment]:
    talks = [Conversation((Message("user", "What?"), Message("assistant", text))) for text in TEXTS]
    rows = align(talks, pair)
    assert all(isinstance(row, Alignment) for row in rows), rows
    return [row for row in rows if isinstance(row, Alignment)]


def maker_of(
    pair: TokenizerPair, rows: list[Alignment], folder: Path, *, top_k: int, temperature: float = 1.0
) -> TargetMaker:
    teacher = pair.teacher.tokenizer
    return TargetMaker.of(
        ModelTeacher(random_model("llama", tokenizer_size(teacher) + 2), teacher, "it"),
        pair,
        count_first_tokens(rows),
        vocabulary=len(pair.student.spelling) + 3,
        top_k=top_k,
        temperature=temperature,
        device=torch.device("cpu"),
        tables_dir=folder,
    )


def taught(pair: TokenizerPair, rows: list[Alignment], folder: Path, **settings: Any) -> list[TargetBatch]:
    found = dict(maker_of(pair, rows, folder, **settings)(rows))
    return [found[index] for index in range(len(rows))]


def logits_of(pair: TokenizerPair, row: Alignment) -> Tensor:
    size = tokenizer_size(pair.teacher.tokenizer)
    return random_model("llama", size + 2)(input_ids=torch.tensor([row.teacher_ids])).logits[0, :, :size]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("names", PAIRS)
def test_targets_are_the_whole_projection_cut(
    names: tuple[str, str], temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(*(ALL[name] for name in names))
    rows, tables, vocabulary = aligned(pair), build_tables(pair), len(pair.student.spelling) + 3
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 5 * 4 * (len(tables.first) + vocabulary))  # a row takes several chunks
    projection = Projection(tables, count_first_tokens(rows), vocabulary=vocabulary)
    for row, one in zip(rows, taught(pair, rows, tmp_path, top_k=4, temperature=temperature), strict=True):
        whole = projection((logits_of(pair, row) / temperature).softmax(-1), find_places(row, tables))
        expected = torch.cat([whole.probs, whole.rest_mass[:, None]], 1)[whole.known]
        got, top = torch.zeros_like(expected), one.targets.top
        got.scatter_(1, top.student_tokens, top.log_probs.exp())
        assert one.targets.at.tolist() == row.student[whole.known.numpy()].tolist()
        FLOAT32.check(top.log_probs.exp(), expected[:, :-1].topk(4).values, "most likely tokens")
        FLOAT32.check(top.rest_mass.exp(), 1 - got.sum(-1), "rest_mass")
        FLOAT32.check(got[:, :-1], torch.where(got[:, :-1] > 0, expected[:, :-1], 0), "which tokens")


@pytest.mark.parametrize("names", PAIRS)
def test_spans_are_as_likely_as_the_teachers_tokens(names: tuple[str, str], tmp_path: Path) -> None:
    pair = make_pair(*(ALL[name] for name in names))
    rows = aligned(pair)
    for row, one in zip(rows, taught(pair, rows, tmp_path, top_k=4, temperature=3.0), strict=True):
        log_probs = logits_of(pair, row).double().log_softmax(-1)
        own = log_probs[:-1].gather(1, torch.tensor(row.teacher_ids[1:])[:, None]).squeeze(1)
        sums = [own[begin - 1 : end - 1].sum() for *_, begin, end in row.spans.tolist()]
        FLOAT32.check(one.targets.span_log_likelihoods, torch.stack(sums), "spans")
        assert one.targets.spans.tolist() == row.spans[:, :2].tolist()
        answer = torch.cat([own[begin - 1 : end - 1] for *_, begin, end in row.spans.tolist()])
        assert one.stats.tokens == len(answer)
        FLOAT32.check(torch.tensor(one.stats.own), answer.exp().sum().float(), "probability of its own tokens")


def test_one_tokenizers_targets_are_the_teachers_likeliest_tokens(tmp_path: Path) -> None:
    pair = make_pair(ALL["llama3"], ALL["llama3"])
    rows = aligned(pair)
    for row, one in zip(rows, taught(pair, rows, tmp_path, top_k=8), strict=True):
        likeliest = logits_of(pair, row).log_softmax(-1)[torch.from_numpy(row.student) - 1].topk(8)
        assert one.targets.at.tolist() == row.student.tolist()
        assert torch.equal(one.targets.top.student_tokens, likeliest.indices)
        FLOAT32.check(one.targets.top.log_probs, likeliest.values)
        FLOAT32.check(one.targets.top.rest_mass.exp(), 1 - likeliest.values.exp().sum(-1))
        assert one.stats.known == one.stats.shared == one.stats.places == len(row.student)
        assert one.stats.mass == pytest.approx(one.stats.places, rel=1e-4)


class Launches(TorchDispatchMode):
    """Counts the operators that compute or copy something, each of which is a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = [returned.alias_info for returned in func._schema.returns]
        self.count += not all(view is not None and not view.is_write for view in views)
        return func(*args, **(kwargs or {}))


def launches(maker: TargetMaker, rows: list[Alignment], read: list[Any]) -> int:
    with Launches() as counted:
        maker.teach(rows, read)
    return counted.count


@pytest.mark.parametrize("names", [("hymba", "llama3"), ("llama3", "llama3")])
def test_many_rows_take_as_many_launches_as_one(names: tuple[str, str], tmp_path: Path) -> None:
    pair = make_pair(*(ALL[name] for name in names))
    rows = aligned(pair) * 20
    maker = maker_of(pair, rows, tmp_path, top_k=4)
    read = maker.teacher.full_vocabulary([row.teacher_ids for row in rows])
    assert launches(maker, rows, read) <= launches(maker, rows[:1], read[:1]) + 5


@pytest.mark.parametrize("step", [5, 40, 10_000])
@pytest.mark.parametrize("names", [("hymba", "llama3"), ("llama3", "hymba")])
def test_rows_together_have_the_targets_and_gradients_of_each_alone(
    names: tuple[str, str], step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the chunks, which rows share and which end within a row."""
    pair = make_pair(*(ALL[name] for name in names))
    rows = aligned(pair) * 2
    maker = maker_of(pair, rows, tmp_path, top_k=4)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", step * 4 * (len(maker.tables.first) + maker.projection.vocabulary))
    read = maker.teacher.full_vocabulary([row.teacher_ids for row in rows])
    together = maker.teach(rows, read)
    alone = [maker.teach([row], [one])[0] for row, one in zip(rows, read, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.targets.at, other.targets.at)
        assert torch.equal(one.targets.spans, other.targets.spans)
        FLOAT32.check(one.targets.span_log_likelihoods, other.targets.span_log_likelihoods, "spans")
        assert vars(one.stats) == pytest.approx(vars(other.stats), rel=1e-5)
        for found, expected, what in zip(
            *(learned(part, pair) for part in (one, other)), ("loss", "gradient"), strict=True
        ):
            FLOAT32.check(found, expected, what)


def learned(one: TargetBatch, pair: TokenizerPair) -> tuple[Tensor, Tensor]:
    """Those of a student whose logits are always the same."""
    vocabulary = len(pair.student.spelling) + 3
    logits = torch.linspace(-1, 1, len(one.targets.at) * vocabulary).reshape(-1, vocabulary).sin().requires_grad_()
    loss = sparse_projection_kl(logits, one.targets.top)
    return loss, torch.autograd.grad(loss.sum(), logits)[0]


def test_statistics_of_rows_are_summed() -> None:
    kept = CaptureStats(places=30, known=29, shared=10, mass=6.0, tokens=4, own=1.0, ends=1, end=0.5)
    kept.add(CaptureStats(places=30, known=30, shared=10, mass=10.0, tokens=4, own=3.0, ends=1, end=0.75))
    sums = {"places": 60, "known": 59, "shared": 20, "mass": 16.0, "tokens": 8, "own": 4.0, "ends": 2, "end": 1.25}
    assert vars(kept) == sums
    assert (kept.mean_mass, kept.mean_own, kept.mean_end) == (0.8, 0.5, 0.625)
    assert (CaptureStats().mean_mass, CaptureStats().mean_own, CaptureStats().mean_end) == (0.0, 0.0, 0.0)
