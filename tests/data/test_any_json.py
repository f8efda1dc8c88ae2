"""Rows of any JSON whatever are read, or refused by a message; no value ends in another error."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hymba_tune.data.checking import check_sources
from hymba_tune.data.comparisons import read_comparisons
from hymba_tune.data.dataset import sample_prompts
from hymba_tune.data.formats import FORMATS, LIKELY_LABELS, PAIR, Names
from hymba_tune.data.messages import MEDIA, OTHER_ROLES, ROLES, SHOWN_KEYS
from hymba_tune.data.preferences import FIELDS
from hymba_tune.data.prompts import parse_prompt
from hymba_tune.data.rows import RowLocation, SourceRow
from hymba_tune.errors import DataError
from tests.data.inputs import source

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 0.5, -1, float("nan"), float("inf"), 10**400]),
    st.sampled_from(["", " ", "a", "<image>", "null", "[]", '[{"role": "user", "content": "x"}]', "\ud83d", "</s>"]),
    st.sampled_from([*ROLES, *OTHER_ROLES]),
)
CALLS = st.fixed_dictionaries({"name": SCALARS, "arguments": SCALARS})
MESSAGES = st.lists(
    st.one_of(
        SCALARS,
        st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": SCALARS}),
        st.fixed_dictionaries({"from": st.sampled_from([*OTHER_ROLES]), "value": SCALARS}),
        st.dictionaries(st.sampled_from(sorted(SHOWN_KEYS)), st.one_of(SCALARS, CALLS, st.lists(CALLS, max_size=2))),
    ),
    max_size=4,
)
VALUES = st.one_of(SCALARS, MESSAGES, st.lists(MESSAGES, max_size=2), CALLS)
COLUMNS = sorted({*FIELDS, *PAIR, *LIKELY_LABELS, *MEDIA, *(name for form in FORMATS for name in form.fields), "other"})
ROWS = st.one_of(
    VALUES,
    st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=5),
    *(st.fixed_dictionaries(dict.fromkeys(form.required, VALUES)) for form in FORMATS),
    st.fixed_dictionaries(dict.fromkeys(("prompt", *PAIR), VALUES)),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(row=ROWS)
def test_any_row_is_read_or_refused(hymba: PreTrainedTokenizerFast, row: Any) -> None:
    result = check_sources([source([row])], hymba, max_length=64)
    assert result.rows == 1 or result.files[0].problem
    for problem in result.problems.values():
        assert len(problem.examples[0]) < 400
    sample_prompts([source([row])], 1)
    for paired in (True, False):
        try:
            read_comparisons(SourceRow(RowLocation("a", 1), row), Names(), paired=paired)
        except DataError as error:
            assert len(str(error)) < 900  # noqa: PT017 (any other error is a failure)
    try:
        parse_prompt(row, Names())
    except DataError as error:
        assert error.what  # noqa: PT017
