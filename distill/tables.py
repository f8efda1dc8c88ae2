"""What two vocabularies say about each other before any text is seen, as flat arrays kept on disk."""

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
from hymba_tune.distill.pair import Side, TokenizerPair
from hymba_tune.distill.segments import Pieces, Segmenter
from hymba_tune.distill.spelling import END, describe
from hymba_tune.files import atomic_write

VERSION = 1
"""Of the arrays' meaning, part of their key."""
NOWHERE = -1
"""Node of a prefix that no token of the teacher's begins with."""

Array = NDArray[np.int32]


@dataclass(frozen=True)
class Tables:
    """All beginnings of the teacher's tokens as the nodes of a tree, and how the student's pieces lie in them.

    Node 0 is the empty beginning. V is the size of the teacher's vocabulary, K the number of nodes, E that of entries.

    Attributes:
        first: ``(V,)``: the student's first piece of each token on its own; -1 if the student cannot write it, or it is
            a special token.
        node_start: ``(V + 1,)``: where a token's nodes begin in ``node_at``.
        node_at: The node of each token's beginning of 0, 1, … bytes, the whole token last.
        parent: ``(K,)``: a node without its last byte.
        byte: ``(K,)``: that byte.
        after_start: ``(K + 1,)``: where a node's entries begin: the tokens that go on after it, with a boundary of the
            student's exactly there.
        after_token: ``(E,)``: which token.
        after_piece: ``(E,)``: the student's next piece in it.
        exact_start: ``(K + 1,)``: where the tokens begin that spell a node and no more.
        exact_token: Which tokens. Several may spell the same.
    """

    first: Array
    node_start: Array
    node_at: Array
    parent: Array
    byte: Array
    after_start: Array
    after_token: Array
    after_piece: Array
    exact_start: Array
    exact_token: Array

    @cached_property
    def _steps(self) -> tuple[Indices, Indices]:
        """From a node and a byte, as one number, to the node they lead to: numbers ascending, and nodes."""
        keys = self.parent[1:].astype(np.int64) * 256 + self.byte[1:]
        order = np.argsort(keys)
        return keys[order], order + 1

    def prefix(self, tokens: Indices, spelled: Indices) -> Indices:
        """Nodes of the tokens' first ``spelled`` bytes."""
        nodes: Indices = self.node_at[self.node_start[tokens] + spelled].astype(np.int64)
        return nodes

    def whole(self, tokens: Indices) -> Indices:
        """Nodes of whole tokens."""
        nodes: Indices = self.node_at[self.node_start[tokens + 1] - 1].astype(np.int64)
        return nodes

    def walk(self, nodes: Indices, tokens: Indices, spelled: Indices) -> Indices:
        """From nodes on by the first ``spelled`` bytes of tokens; `NOWHERE` if no token begins so."""
        keys, children = self._steps
        nodes = nodes.copy()
        for step in range(int(spelled.max(initial=0))):
            going = np.flatnonzero((spelled > step) & (nodes != NOWHERE))
            byte = self.byte[self.prefix(tokens[going], np.full_like(going, step + 1))]
            wanted = nodes[going] * 256 + byte
            found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            nodes[going] = np.where(keys[found] == wanted, children[found], NOWHERE)
        return nodes


def open_tables(pair: TokenizerPair, cache_dir: Path) -> Tables:
    """The tables of a pair, from the cache if they were built before.

    Args:
        pair: The two sides.
        cache_dir: Where tables lie as safetensors, each under a name made of both tokenizers' content.
    """
    path = cache_dir / f"{pair_key(pair)}.safetensors"
    if path.is_file():
        try:
            return Tables(**load_file(path))
        except (SafetensorError, TypeError):
            pass  # damaged: built again, and written over
    tables = build_tables(pair)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        save_file({field.name: getattr(tables, field.name) for field in fields(Tables)}, part)
    return tables


def pair_key(pair: TokenizerPair) -> str:
    """SHA-256 of all that decides a pair's tables: both ``tokenizer.json`` and the tokens that end a turn."""
    return _digest([VERSION, _side_key(pair.student), _side_key(pair.teacher)])


def same_tokenizer(pair: TokenizerPair) -> bool:
    """Whether both sides have the same tokens, and end turns with the same one."""
    return _side_key(pair.student) == _side_key(pair.teacher)


def _side_key(side: Side) -> str:
    return _digest([describe(side.tokenizer), *side.ends])


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def build_tables(pair: TokenizerPair) -> Tables:
    """Compute the tables of a pair, in seconds."""
    spelled = pair.teacher.spelling.tokens
    nodes = {b"": 0}
    node_at = array("i")
    for whole in spelled:
        node_at.extend(nodes.setdefault(whole[:size], len(nodes)) for size in range(len(whole) + 1))
    node_start = np.concatenate([[0], (pair.teacher.spelling.lengths + 1).cumsum()])
    parent = array("i", (nodes[beginning[:-1]] for beginning in nodes))
    byte = bytes(beginning[-1] if beginning else 0 for beginning in nodes)
    first, after, exact = array("i"), array("i"), array("i")  # flat: of each entry its node, token and piece
    lengths = pair.student.spelling.lengths.tolist()
    for token, pieces in enumerate(_segments(pair)):
        first.append(pieces[0] if pieces else NOWHERE)
        if not pieces:
            continue
        exact.extend((nodes[spelled[token]], token))
        at = int(node_start[token])
        for piece, following in pairwise(pieces):
            at += lengths[piece]
            after.extend((node_at[at], token, following))
    after_start, after_token, after_piece = _grouped(after, 3, len(nodes))
    exact_start, exact_token = _grouped(exact, 2, len(nodes))
    return Tables(
        first=np.array(first, np.int32),
        node_start=node_start.astype(np.int32),
        node_at=np.array(node_at, np.int32),
        parent=np.array(parent, np.int32),
        byte=np.frombuffer(byte, np.uint8).astype(np.int32),
        after_start=after_start,
        after_token=after_token,
        after_piece=after_piece,
        exact_start=exact_start,
        exact_token=exact_token,
    )


def _segments(pair: TokenizerPair) -> Iterator[Pieces]:
    """The student's pieces of each token of the teacher's; None of special ones, but that which ends a turn."""
    spelled = pair.teacher.spelling.tokens
    if same_tokenizer(pair):
        yield from ([token] for token in range(len(spelled)))
        return
    special = {token["id"] for token in describe(pair.teacher.tokenizer)["added_tokens"] if token["special"]}
    for token, pieces in enumerate(Segmenter(pair.student)(spelled)):
        if spelled[token] == END:
            yield [pair.student.end]
        else:
            yield None if token in special else pieces


def _grouped(flat: array[int], columns: int, groups: int) -> list[Array]:
    """Rows by their first column, which is a group: where each group's rows begin, and the other columns."""
    rows = np.array(flat, np.int32).reshape(-1, columns)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    starts = np.searchsorted(rows[:, 0], np.arange(groups + 1)).astype(np.int32)
    return [starts, *(np.ascontiguousarray(column) for column in rows[:, 1:].T)]


@dataclass(frozen=True, slots=True)
class FirstPieces:
    """How often the student's piece began where a token of the teacher's did, in texts of the user's own.

    Attributes:
        tokens: The teacher's tokens, with `pieces` the pairs in ascending order.
        pieces: The student's.
        counts: How often, each at least 1.
    """

    tokens: Indices
    pieces: Indices
    counts: Indices


def count_first_pieces(rows: Iterable[Alignment]) -> FirstPieces:
    """Count first pieces in context: one pass over the aligned data."""
    seen: Counter[int] = Counter()
    for row in rows:
        both = row.spelled == 0
        tokens = np.array(row.teacher_ids, np.int64)[row.teacher[both]]
        pieces = np.array(row.student_ids, np.int64)[row.student[both]]
        seen.update((tokens << 32 | pieces).tolist())
    keys = np.array(sorted(seen), np.int64)
    counts = np.array([seen[key] for key in keys.tolist()], np.int64)
    return FirstPieces(keys >> 32, keys & 0xFFFFFFFF, counts)
