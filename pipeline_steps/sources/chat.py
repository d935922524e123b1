"""Source `chat`: text-only questions about rows of digits, so that training on frames preserves text-only answers.

"Say 471 backwards" -> "174", and three more kinds. Every question is unique, so no two splits share one.
"""

from collections.abc import Iterator

import numpy as np

from pipeline_steps.common.schemas import RawSample

KINDS = ("repeat", "backwards", "next", "largest")
LENGTHS = (3, 4, 5, 6)


def make_question(rng: np.random.Generator, kind: str) -> tuple[str, str]:
    """Return (question, answer) about 3 to 6 distinct digits in random order. `kind`: one of KINDS."""
    row = rng.permutation(10)[: rng.choice(LENGTHS)].tolist()
    text = "".join(map(str, row))
    if kind == "repeat":
        return f"Say {text}", text
    if kind == "backwards":
        return f"Say {text} backwards", text[::-1]
    if kind == "largest":
        return f"Which digit is the largest of {text}?", str(max(row))
    at = int(rng.integers(0, len(row) - 1))
    return f"Which digit comes after {row[at]} in {text}?", str(row[at + 1])


def collect(section) -> Iterator[RawSample]:
    """Yield all text-only samples of `section` (schema.Chat), cycling through KINDS."""
    rng = np.random.default_rng(section.seed)
    counts = {"test": section.num_test, "validation": section.num_validation, "train": section.num_train}
    asked = set()
    for split, count in counts.items():
        for number in range(count):
            question, answer = make_question(rng, KINDS[number % len(KINDS)])
            while question in asked:
                question, answer = make_question(rng, KINDS[number % len(KINDS)])
            asked.add(question)
            key = f"chat-{split}-{number:06d}"
            item = {"user": question, "assistant": answer, "task": "text"}
            yield RawSample(key=key, source="chat", split=split, video_id=key, kind="text", items=(item,))
