"""The projected target against the formula enumerated, on small random tokenizers; and what it must keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from hymba_tune.data import Conversation, Message, Text
from hymba_tune.distill.alignment import Alignment, align
from hymba_tune.distill.chunks import Head, chunked_loss
from hymba_tune.distill.losses import cross_entropy, mix, projection_kl
from hymba_tune.distill.pair import TokenizerPair, make_pair
from hymba_tune.distill.projection import Places, Projection, find_places
from hymba_tune.distill.spelling import END
from hymba_tune.distill.tables import Tables, build_tables, count_first_tokens
from tests.distill.random_pairs import Drawn, drawn
from tests.distill.tokenizers import ALL
from tests.reference import naive_projection as naive
from tests.tolerances import FLOAT32, FLOAT64


def aligned(texts: list[str], pair: TokenizerPair) -> list[Alignment]:
    talks = [Conversation((Message("user", ""), Message("assistant", text))) for text in texts]
    rows = align([*map(Text, texts), *talks], pair)
    assert all(isinstance(row, Alignment) for row in rows), rows
    return [row for row in rows if isinstance(row, Alignment)]


def random_probs(rows: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, vocabulary, dtype=torch.float64).mul(2).softmax(-1).to(dtype)


def naive_first(
    pair: TokenizerPair, rows: list[Alignment], segment: naive.Segment
) -> Callable[[int], dict[int, float]]:
    """Shares of first tokens: once alone, and as often as the rows have them."""
    seen: dict[int, Counter[int]] = {}
    for row in rows:
        for student, teacher, spelled in zip(row.student, row.teacher, row.spelled, strict=True):
            if not spelled:
                seen.setdefault(row.teacher_ids[teacher], Counter())[row.student_ids[student]] += 1
    special = set(pair.teacher.tokenizer.all_special_ids)

    def first(token: int) -> dict[int, float]:
        spelled, counts = pair.teacher.spelling.tokens[token], Counter(seen.get(token, {}))
        if spelled == END:
            counts[pair.student.tokenizer.eos_token_id] += 1
        elif token not in special and (student_tokens := segment(spelled)):
            counts[student_tokens[0]] += 1
        return {student_token: count / counts.total() for student_token, count in counts.items()}

    return first


def float64(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def segment_of(one: Drawn) -> naive.Segment:
    """The twin's segmentation, blind to what ends a turn and to the names of special tokens."""
    names = {one.pair.teacher.spelling.tokens[token] for token in one.pair.teacher.tokenizer.all_special_ids}
    return lambda spelled: None if spelled in names else one.segment(spelled)


@settings(max_examples=40, deadline=None)
@given(one=drawn())
def test_mass_is_the_enumerated_formula(one: Drawn) -> None:
    assume(one.pair.student.spelling != one.pair.teacher.spelling)  # then special tokens count as well
    rows, tables = aligned(one.texts, one.pair), build_tables(one.pair)
    vocabulary, segment = len(one.pair.student.spelling), segment_of(one)
    projection = Projection(tables, count_first_tokens(rows), vocabulary=vocabulary, dtype=torch.float64)
    first = naive_first(one.pair, rows, segment)
    teacher, spell = one.pair.teacher.spelling.tokens, one.pair.student.spelling.tokens.__getitem__
    for row in rows:
        probs = random_probs(len(row.teacher_ids), len(teacher))
        places = find_places(row, tables)
        target = projection(probs, places)
        assert len(target.known) == len(row.student)
        for place, (at, spelled) in enumerate(zip(row.teacher.tolist(), row.spelled.tolist(), strict=True)):
            before = None if row.first[place] or at < 2 else probs[at - 2].tolist()
            u, previous = teacher[row.teacher_ids[at]][:spelled], row.teacher_ids[at - 1]
            mass, rest_mass = naive.mass(teacher, probs[at - 1].tolist(), before, previous, u, first, segment, spell)
            expected = torch.zeros(vocabulary, dtype=torch.float64)
            expected[list(mass)] = torch.tensor(list(mass.values()), dtype=torch.float64)
            total = sum(mass.values()) + rest_mass
            alone, rest = naive.mass(teacher, probs[at - 1].tolist(), None, previous, u, first, segment, spell)
            unwritable = [bytes_ != u and bytes_.startswith(u) and segment(bytes_) is None for bytes_ in teacher]
            unwritable = unwritable if u else [not first(token) for token in range(len(teacher))]
            covered = sum(alone.values()) + rest - float(probs[at - 1][torch.tensor(unwritable)].sum())
            FLOAT64.check(target.coverage[place], float64(covered), "coverage")
            relative = total / (before[previous] if before else 1)
            student_token = row.student_ids[row.student[place]]
            reached = mass.get(student_token, 0) > 0 or not row.crossing[place]
            assert target.known[place] == (relative > 1e-6 and reached)
            if total:
                FLOAT64.check(target.probs[place], expected / total, "probabilities")
                FLOAT64.check(target.rest_mass[place], float64(rest_mass / total), "rest_mass")


def projection_of(
    pair: TokenizerPair, rows: list[Alignment], dtype: torch.dtype = torch.float64
) -> tuple[Projection, Tables]:
    tables = build_tables(pair)
    vocabulary = len(pair.student.spelling)
    return Projection(tables, count_first_tokens(rows), vocabulary=vocabulary, dtype=dtype), tables


def talk(text: str, pair: TokenizerPair) -> Alignment:
    (row,) = align([Conversation((Message("user", "What?"), Message("assistant", text)))], pair)
    assert isinstance(row, Alignment), row
    return row


SAMPLE = "Natalia sold 42 clips in April,  and naïve 🙂 friends.\n\n  def f(x):\n        return 17"


@pytest.mark.parametrize("name", ["hymba", "llama3", "unigram"])
def test_same_tokenizer_is_the_identity(name: str) -> None:
    """Whatever the tokens before: there is nothing to give back."""
    pair = make_pair(ALL[name], ALL[name])
    row = talk(SAMPLE, pair)
    projection, tables = projection_of(pair, [row])
    probs = random_probs(len(row.teacher_ids), len(pair.teacher.spelling))
    places = find_places(row, tables)
    target = projection(probs, places)
    FLOAT64.check(target.probs, probs[row.teacher - 1])
    assert not target.rest_mass.any()
    assert target.known.all()


PAIR = make_pair(ALL["hymba"], ALL["llama3"])


@pytest.fixture(scope="module")
def sample() -> tuple[Alignment, Projection, Places, Tensor]:
    row = talk(SAMPLE, PAIR)
    projection, tables = projection_of(PAIR, [row])
    return row, projection, find_places(row, tables), random_probs(len(row.teacher_ids), len(PAIR.teacher.spelling))


Sample = tuple[Alignment, Projection, Places, Tensor]


def test_target_sums_to_one(sample: Sample) -> None:
    _, projection, places, probs = sample
    target = projection(probs, places)
    FLOAT64.check(target.probs.sum(-1) + target.rest_mass, torch.ones(len(places), dtype=torch.float64))
    assert target.rest_mass.any()
    assert target.known.any()


def test_chunks_of_places_are_the_whole(sample: Sample) -> None:
    _, projection, places, probs = sample
    whole, parts = (
        projection(probs, places),
        [projection(probs, places[at : at + 7]) for at in range(0, len(places), 7)],
    )
    for name in ("probs", "rest_mass", "known", "coverage"):
        FLOAT64.check(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name), name)


def test_places_move_between_devices(sample: Sample) -> None:
    places = sample[2].to(torch.device("meta"))
    assert {getattr(places, name).device.type for name in Places.__slots__} == {"meta"}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_from_hidden_states_as_from_probabilities(sample: Sample, temperature: float) -> None:
    """Each output's softmax is computed once, of those that the places ask for."""
    row, projection, places, _ = sample
    vocabulary = len(projection._begins)
    hidden, weight = torch.randn(len(row.teacher_ids), 5).double(), torch.randn(vocabulary, 5).double()
    probs = (hidden @ weight.mT / temperature).softmax(-1)
    for chunk in (slice(0, 1), slice(3, 20), slice(None)):
        found = projection.from_head(Head(hidden, weight), places[chunk], temperature=temperature)
        expected = projection(probs, places[chunk])
        FLOAT64.check(found.probs, expected.probs, "probabilities")
        FLOAT64.check(found.rest_mass, expected.rest_mass, "rest_mass")


def test_float32_is_enough(sample: Sample) -> None:
    row, exact, places, probs = sample
    projection, _ = projection_of(PAIR, [row], torch.float32)
    found, expected = projection(probs.float(), places), exact(probs, places)
    FLOAT32.check(found.probs, expected.probs, "probabilities")
    FLOAT32.check(found.rest_mass, expected.rest_mass, "rest_mass")


def test_mass_outside_a_servers_top_k_is_rest_mass(sample: Sample) -> None:
    _, projection, places, probs = sample
    top = torch.where(probs >= probs.topk(20).values[:, -1:], probs, 0)
    top = top.scatter(1, places.previous[:, None].new_zeros(len(top), 1), 0.0)
    cut = 1 - top.sum(-1)
    alone = replace(places, before=torch.full_like(places.before, -1))  # then nothing comes back from longer tokens
    without, target = projection(top, alone), projection(top, alone, cut)
    FLOAT64.check(target.coverage, without.coverage + cut[places.now])
    shared = places.inside == 0  # all of the teacher's probability counts here, so the scale is the whole of it
    FLOAT64.check(target.probs[shared], without.probs[shared] * (1 - cut[places.now[shared]])[:, None])
    FLOAT64.check(target.probs.sum(-1) + target.rest_mass, torch.ones(len(places), dtype=torch.float64))


@pytest.mark.parametrize("surprise", [1e-3, 1e-7, 1e-30, 0.0])
def test_surprising_tokens_have_targets(sample: Sample, surprise: float) -> None:
    """After a name or a number that the teacher hardly expected, what comes next is as certain as anywhere."""
    row, projection, places, probs = sample
    probs = probs.clone()
    before = places.before >= 0
    probs[places.before[before], places.previous[before]] = surprise
    target = projection(probs, places)
    assert target.known[~places.crossing].all()
    assert target.known[places.crossing].any()
    assert target.probs[target.known].isfinite().all()
    single = projection_of(PAIR, [row], torch.float32)[0](probs.float(), places)
    assert torch.equal(single.known, target.known)


def test_mass_on_what_the_student_cannot_write_is_rest_mass(sample: Sample) -> None:
    """Special tokens, such as the header of the next message."""
    row, projection, places, probs = sample
    special = PAIR.teacher.tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    first = int((places.before < 0).nonzero()[0])
    probs = torch.zeros_like(probs)
    probs[places.now[first], special] = 0.75
    probs[places.now[first], row.teacher_ids[row.teacher[first]]] = 0.25
    target = projection(probs, places[first : first + 1])
    assert target.known.all()
    FLOAT64.check(target.rest_mass, torch.tensor([0.75], dtype=torch.float64))
    FLOAT64.check(target.coverage, torch.tensor([0.25], dtype=torch.float64))


def test_full_support_has_no_rest_mass() -> None:
    """There is no token outside the support."""
    pair = make_pair(ALL["llama3"], ALL["llama3"])
    row = talk("yes", pair)
    projection, tables = projection_of(pair, [row])
    probs = random_probs(len(row.teacher_ids), len(pair.teacher.spelling))
    target = projection(probs, find_places(row, tables), torch.full((len(probs),), 0.5, dtype=torch.float64))
    assert not target.rest_mass.any()
    FLOAT64.check(target.probs, probs[row.teacher - 1])


def test_no_target_where_no_token_matches(sample: Sample) -> None:
    _, projection, places, probs = sample
    target = projection(torch.zeros_like(probs), places)
    assert not target.known.any()
    assert target.probs.isfinite().all()


def test_top_tokens_and_rest_mass(sample: Sample) -> None:
    _, projection, places, probs = sample
    whole = projection(probs, places)
    top = whole.top(3)
    assert torch.equal(top.student_tokens, whole.probs.topk(3).indices)
    FLOAT64.check(top.log_probs.exp().sum(-1) + top.rest_mass.exp(), torch.ones(len(places), dtype=torch.float64))


def test_learned_in_chunks_as_at_once(sample: Sample) -> None:
    """From both sides' hidden states to the gradients, cross-entropy where nothing is known."""
    row, projection, places, _ = sample
    vocabularies = projection.vocabulary, len(projection._begins)
    ours, theirs = (torch.randn(len(ids), 5).double() for ids in (row.student_ids, row.teacher_ids))
    heads = [torch.randn(size, 5).double() for size in vocabularies]
    student = Head(ours[torch.from_numpy(row.student) - 1].requires_grad_(), heads[0].requires_grad_())
    teacher = Head(theirs, heads[1])

    def loss(logits: Tensor, rows: slice) -> Tensor:
        target = projection.from_head(teacher, places[rows], temperature=2.0)
        taught = projection_kl(logits, target, temperature=2.0)
        return mix(cross_entropy(logits, places.student_token[rows]), taught, target.known, alpha=0.7)

    whole, total = loss(student.logits(slice(None)), slice(None)).sum(), chunked_loss(student, loss, rows=7)
    FLOAT64.check(total, whole)
    for found, expected in zip(torch.autograd.grad(total, student), torch.autograd.grad(whole, student), strict=True):
        FLOAT64.check(found, expected, "gradient")
