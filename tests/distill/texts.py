"""Texts of every kind that tokenizers treat in their own ways."""

from __future__ import annotations

from hypothesis import strategies as st

PARTS = [
    *(" ", "  ", " " * 17, "\n", "\n\n", "\t", "\r\n", " \n ", "a" * 30, "\x00", "\u3000", "\u00a0"),
    *("0", "42", "1,234.56", "2024-07-26", "the answer is 42", "Natalia sold clips", "naïve", "e\u0301"),
    *("def f(x):\n        return x[1:]\n", "{{ x }}", "{% y %}", "</div>", "<0x41>", "Ġ", "<|x|>"),
    *("🙂", "👩‍👩‍👧‍👦", "🏳️‍🌈", "שלום עולם", "مرحبا", "\u202eabc", "中文字", "한국어", "ﬁ", "\U0010ffff"),
]

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
"""▁ is how SentencePiece spells a space: it cannot come back. Surrogates are no characters."""

TEXTS = st.lists(st.sampled_from(PARTS) | st.text(CHARACTERS, max_size=5), min_size=1, max_size=8).map("".join)
