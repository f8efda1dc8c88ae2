"""Tables of how the student segments the teacher's tokens, as flat arrays cached on disk."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hymba_tune.distill.alignment import Alignment, Indices
from hymba_tune.distill.pair import TokenizerPair
from hymba_tune.distill.segments import Segmenter, StudentTokens
from hymba_tune.distill.spelling import END, describe
from hymba_tune.files import atomic_write

VERSION = 2
"""The version of the arrays' meaning, which is part of their cache key."""
NOWHERE = -1
"""The node of bytes that no token of the teacher begins with."""

Array = NDArray[np.int32]


@dataclass(frozen=True)
class Tables:
    """A byte trie of the teacher's tokens, and the student's segmentation of each token.

    Node 0 is the empty prefix. V is the size of the teacher's vocabulary, K the number of nodes, E that of entries.

    Attributes:
        first: ``(V,)``: the first student token of each teacher token on its own; -1 if the student cannot write it, or
            it is a special token.
        node_start: ``(V + 1,)``: the index of each token's first node in ``node_at``.
        node_at: The nodes of each token's prefixes of 0, 1, … bytes, the whole token last.
        parent: ``(K,)``: the node of the same bytes without the last one.
        byte: ``(K,)``: the last byte of each node.
        after_start: ``(K + 1,)``: the index of each node's first entry. The entries of a node are the teacher tokens
            that continue it and in which the student has a boundary exactly there, and those that the student cannot
            write.
        after_token: ``(E,)``: the teacher token of each entry.
        after_student_token: ``(E,)``: the student token that follows the boundary; -1 if the student cannot write the
            token.
        exact_start: ``(K + 1,)``: the index in ``exact_token`` of the first token that spells exactly a node.
        exact_token: The tokens that spell each node exactly. Several may spell the same bytes.
    """

    first: Array
    node_start: Array
    node_at: Array
    parent: Array
    byte: Array
    after_start: Array
    after_token: Array
    after_student_token: Array
    exact_start: Array
    exact_token: Array

    @cached_property
    def _steps(self) -> tuple[Indices, Indices]:
        """Return the trie's edges: node and byte as one number, ascending, and the child that each leads to."""
        keys = self.parent[1:].astype(np.int64) * 256 + self.byte[1:]
        order = np.argsort(keys)
        return keys[order], order + 1

    def prefix(self, tokens: Indices, spelled: Indices) -> Indices:
        """Return the nodes of the tokens' first ``spelled`` bytes."""
        nodes: Indices = self.node_at[self.node_start[tokens] + spelled].astype(np.int64)
        return nodes

    def whole(self, tokens: Indices) -> Indices:
        """Return the nodes of whole tokens."""
        nodes: Indices = self.node_at[self.node_start[tokens + 1] - 1].astype(np.int64)
        return nodes

    def walk(self, nodes: Indices, tokens: Indices, spelled: Indices) -> Indices:
        """Continue from nodes by the first ``spelled`` bytes of tokens; `NOWHERE` where no token begins so."""
        keys, children = self._steps
        nodes = nodes.copy()
        for step in range(int(spelled.max(initial=0))):
            going = np.flatnonzero((spelled > step) & (nodes != NOWHERE))
            byte = self.byte[self.prefix(tokens[going], np.full_like(going, step + 1))]
            wanted = nodes[going] * 256 + byte
            edges = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            nodes[going] = np.where(keys[edges] == wanted, children[edges], NOWHERE)
        return nodes


def open_tables(pair: TokenizerPair, cache_dir: Path) -> Tables:
    """Load the tables of a pair from the cache, or build and cache them.

    Args:
        pair: The two tokenizers.
        cache_dir: A folder of safetensors files, whose names are digests of both tokenizers' content.
    """
    path = cache_dir / f"{pair_key(pair)}.safetensors"
    if path.is_file():
        try:
            return Tables(**load_file(path))
        except (SafetensorError, TypeError):
            pass  # damaged, or of an older version: it is built again and overwritten
    tables = build_tables(pair)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        save_file({field.name: getattr(tables, field.name) for field in fields(Tables)}, part)
    return tables


def pair_key(pair: TokenizerPair) -> str:
    """Return the SHA-256 of what determines a pair's tables: both ``tokenizer.json`` files and the end tokens."""
    return hashlib.sha256(json.dumps([VERSION, pair.student.key, pair.teacher.key]).encode()).hexdigest()


def same_tokenizer(pair: TokenizerPair) -> bool:
    """Return whether both sides have the same tokens and the same end tokens."""
    return pair.student.key == pair.teacher.key


def build_tables(pair: TokenizerPair) -> Tables:
    """Compute the tables of a pair, which takes seconds."""
    spelled = pair.teacher.spelling.tokens
    nodes = {b"": 0}
    node_at = array("i")
    for whole in spelled:
        node_at.extend(nodes.setdefault(whole[:size], len(nodes)) for size in range(len(whole) + 1))
    node_start = np.concatenate([[0], (pair.teacher.spelling.lengths + 1).cumsum()])
    parent = array("i", (nodes[prefix[:-1]] for prefix in nodes))
    byte = bytes(prefix[-1] if prefix else 0 for prefix in nodes)

    # Flat arrays, because millions of tuples would take gigabytes: an entry is its node, token and student token.
    first, after, exact = array("i"), array("i"), array("i")
    lengths = pair.student.spelling.lengths.tolist()
    for token, student_tokens in enumerate(_segments(pair)):
        first.append(student_tokens[0] if student_tokens else NOWHERE)
        if student_tokens is None:
            continue
        at, size = int(node_start[token]), len(spelled[token])
        exact.extend((node_at[at + size], token))
        if not student_tokens:
            for node in node_at[at + 1 : at + size]:
                after.extend((node, token, NOWHERE))
        for student_token, following in pairwise(student_tokens):
            at += lengths[student_token]
            after.extend((node_at[at], token, following))

    after_start, after_token, after_student_token = _grouped(after, 3, len(nodes))
    exact_start, exact_token = _grouped(exact, 2, len(nodes))
    return Tables(
        first=np.array(first, np.int32),
        node_start=node_start.astype(np.int32),
        node_at=np.array(node_at, np.int32),
        parent=np.array(parent, np.int32),
        byte=np.frombuffer(byte, np.uint8).astype(np.int32),
        after_start=after_start,
        after_token=after_token,
        after_student_token=after_student_token,
        exact_start=exact_start,
        exact_token=exact_token,
    )


def _segments(pair: TokenizerPair) -> Iterator[StudentTokens]:
    """Segment each teacher token into student tokens; none for a token that the student cannot write.

    It is None for what spells no text: special tokens other than the end tokens, and ids without a token.
    """
    spelled = pair.teacher.spelling.tokens
    if same_tokenizer(pair):
        yield from ([token] for token in range(len(spelled)))
        return
    special = {token["id"] for token in describe(pair.teacher.tokenizer)["added_tokens"] if token["special"]}
    for token, student_tokens in enumerate(Segmenter(pair.student)(spelled)):
        if spelled[token] == END:
            yield [pair.student.end]
        else:
            yield None if token in special or not spelled[token] else student_tokens or []


def _grouped(flat: array[int], columns: int, groups: int) -> list[Array]:
    """Sort rows by their first column, the group; return the start of each group and the other columns."""
    rows = np.array(flat, np.int32).reshape(-1, columns)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    starts = np.searchsorted(rows[:, 0], np.arange(groups + 1)).astype(np.int32)
    return [starts, *(np.ascontiguousarray(column) for column in rows[:, 1:].T)]


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """Counts of the student tokens that begin where a teacher token begins, in the user's texts.

    Attributes:
        tokens: The teacher tokens; with ``student_tokens`` these are pairs in ascending order.
        student_tokens: The student tokens.
        counts: The count of each pair, at least 1.
    """

    tokens: Indices
    student_tokens: Indices
    counts: Indices


def count_first_tokens(rows: Iterable[Alignment]) -> FirstTokens:
    """Count first student tokens in context, in one pass over the aligned data."""
    seen: Counter[int] = Counter()
    for row in rows:
        both = row.spelled == 0
        tokens = np.array(row.teacher_ids, np.int64)[row.teacher[both]]
        student_tokens = np.array(row.student_ids, np.int64)[row.student[both]]
        seen.update((tokens << 32 | student_tokens).tolist())
    keys = np.array(sorted(seen), np.int64)
    counts = np.array([seen[key] for key in keys.tolist()], np.int64)
    return FirstTokens(keys >> 32, keys & 0xFFFFFFFF, counts)
