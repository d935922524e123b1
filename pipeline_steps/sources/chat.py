"""Source `chat`: text-only questions or chats, so that training on frames preserves text-only answers.

Questions about rows of digits, "Say 471 backwards" -> "174" and three more kinds: every question is unique, so no two
splits share one. Or the user's own chats: a .jsonl with a list `messages` of {role, content} per line and, optionally,
its `split`. Without it the stage `shards` assigns one; equal chats are of the same split.

Rows may be those of SmolTalk (HuggingFaceTB/smoltalk, any of its subsets, saved with `to_json`): their columns of
PUBLISHED_COLUMNS say where a chat comes from and how it was rated, and are ignored. Any other column is an error, as it
might change what the chat means, such as the tools and thinking modes of SmolTalk 2's `chat_template_kwargs`.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.schemas import RawSample
from pipeline_steps.sources.folder_items import chat_messages
from pipeline_steps.sources.metadata import read_jsonl

KINDS = ("repeat", "backwards", "next", "largest")
LENGTHS = (3, 4, 5, 6)
COLUMNS = {"messages", "split"}
PUBLISHED_COLUMNS = {"source", "full_topic", "category", "difficulty", "quality", "reward_model_score"}
PUBLISHED_COLUMNS |= {"conversation_tokens"}


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
    """Yield all text-only samples of `section` (schema.Chat): its chats, else questions, cycling through KINDS.

    Raises UserError, with the line number, for chats that cannot be read.
    """
    yield from questions(section) if section.path is None else chats(Path(section.path).expanduser())


def chats(path: Path) -> Iterator[RawSample]:
    """Yield a sample per line of a .jsonl. Raises UserError."""
    if path.suffix != ".jsonl" or not path.is_file():
        problem = "" if path.exists() else "does not exist, "
        raise UserError(
            f"sources.chat.path is {path}: {problem}expected a .jsonl file with a list `messages` per line."
        )
    rows = read_jsonl(path)
    if not rows:
        raise UserError(f"sources.chat.path is {path}: the file has no chats. Write one per line.")
    for line, row in rows:
        where = f"{path} line {line}"
        if unknown := sorted(set(row) - COLUMNS - PUBLISHED_COLUMNS):
            raise UserError(
                f"{where}: unknown column {', '.join(unknown)}. Expected messages and, optionally, split; ignored are "
                f"{', '.join(sorted(PUBLISHED_COLUMNS))}, as in SmolTalk. Remove other columns."
            )
        item = {"messages": chat_messages(where, row.get("messages")), "task": "text"}
        key = f"chat-{line:06d}"
        try:
            yield RawSample(key=key, source="chat", split=row.get("split"), video_id=key, kind="text", items=(item,))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UserError(f"{where}: {place}: {first['msg']}, found {str(first['input'])[:100]!r}.") from None


def questions(section) -> Iterator[RawSample]:
    """Yield the questions of all splits."""
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
