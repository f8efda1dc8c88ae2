"""Show how the tokens of a student and a teacher lie on the same bytes, as `hymba-tune distill` aligns them.

python align_tokenizers.py "The ferry leaves at 7:15."
"""

import argparse
from importlib.resources import files

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import hymba_tune  # noqa: F401 (transformers' Auto classes now know Hymba)
from hymba_tune.data import Conversation, Message, open_source
from hymba_tune.distill.alignment import align
from hymba_tune.distill.alignment_report import AlignmentReport, alignment_lines, matched_vocabulary
from hymba_tune.distill.pair import Unaligned, make_pair

NANO = str(files("hymba_tune.assets") / "hymba-nano")


def byte_level() -> PreTrainedTokenizerFast:
    """A stand-in for a teacher's tokenizer: every byte, and the words of the packaged data."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<end>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((m["content"] for row in open_source("demo") for m in row.value["messages"]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def main() -> None:
    """Print a table of one answer's tokens, and the counts that a run of distillation prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("answer", nargs="?", default="The first ferry leaves at 7:15.")
    parser.add_argument("--student", default="hymba-nano", help="hymba-nano, a folder, or nvidia/Hymba-1.5B-Base")
    parser.add_argument("--teacher", help="a folder or a Hub id; without it, a small byte-level one")
    options = parser.parse_args()

    student = AutoTokenizer.from_pretrained(NANO if options.student == "hymba-nano" else options.student)
    pair = make_pair(student, AutoTokenizer.from_pretrained(options.teacher) if options.teacher else byte_level())
    row = Conversation((Message("user", "When does it leave?"), Message("assistant", options.answer)))
    (aligned,) = align([row], pair)
    if isinstance(aligned, Unaligned):
        raise SystemExit(f"not aligned: {aligned.in_full}")
    print("student token   teacher token there   bytes of it before")
    for at, teacher_at, spelled in zip(aligned.student, aligned.teacher, aligned.spelled, strict=True):
        token = pair.student.spelling.tokens[aligned.student_ids[at]]
        there = pair.teacher.spelling.tokens[aligned.teacher_ids[teacher_at]]
        print(f"{token!s:<15} {there!s:<21} {spelled}")
    counts = AlignmentReport()
    counts.add([aligned], pair)
    for label, line in alignment_lines(counts, matched_vocabulary(pair)).items():
        print(f"{label:<8} {line}")


if __name__ == "__main__":
    main()
