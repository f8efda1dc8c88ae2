"""Write data/train.jsonl and data/test.jsonl from GSM8K, of the Hugging Face Hub or of a folder.

python make_data.py                    downloads openai/gsm8k (MIT), 5 MB
python make_data.py path/to/gsm8k      reads train.jsonl and test.jsonl there
"""

import argparse
import json
import re
from pathlib import Path

from hymba_tune.data import open_source

CALCULATOR = re.compile(r"<<[^>]*>>")
"""GSM8K's notes for a calculator, as in ``48/2 = <<48/2=24>>24``: text that a model without one need not learn."""


def main() -> None:
    """Write both files as prompts and completions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    folder = parser.parse_args().folder

    Path("data").mkdir(exist_ok=True)
    for split in ("train", "test"):
        source = open_source(str(folder / f"{split}.jsonl") if folder else f"openai/gsm8k:main@{split}")
        rows = [
            {"prompt": row.value["question"], "completion": CALCULATOR.sub("", row.value["answer"])} for row in source
        ]
        path = Path("data", f"{split}.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
