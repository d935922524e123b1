"""Make the items of one metadata row: caption, question and answer, chat, multiple choice, preference."""

import json
import math
from pathlib import Path

from pydantic import ValidationError

from pipeline_steps.common.choices import LETTERS
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.schemas import Message
from pipeline_steps.sources.texts import answer_text, chat_item, standard_message, without_placeholders

BOOLEANS = {True: ("yes", "true"), False: ("no", "false")}
TEXTS = ("caption", "question", "answer", "rejected")


def row_items(metadata: Path, line: int, row: dict, shown: str) -> list[dict]:
    """Return one item per caption, per question (with its answer or options) and per chat of a row.

    `shown` names the row's files in messages. Raises UserError, with the line number, for invalid rows.
    """
    where = f"{metadata} line {line} ({shown})"
    options = _options(where, row) if row.get("options") is not None else None
    texts = {name: _text(where, name, row[name]) for name in TEXTS if _is_given(row, name, options)}
    _check_forms(where, row, texts, options)
    extra = {name: row[name] for name in ("task", "cue", "target") if row.get(name) is not None}
    _check_extra(where, row, extra, options)
    rejected = {"rejected": texts["rejected"]} if "rejected" in texts else {}
    items = []
    if "caption" in texts:
        item = {"user": None, "assistant": texts["caption"], "task": "caption"}
        alone = "question" not in texts and row.get("messages") is None
        items.append(item | _preferred(rejected) | extra if alone else item)
    if options is not None:
        choice = {"options": options, "correct_option": _correct(where, row["answer"], options)}
        items.append({"user": texts["question"], **choice, "task": "choice", **extra})
    elif "question" in texts:
        item = {"user": texts["question"], "assistant": texts["answer"], "task": "question"}
        items.append(item | _preferred(rejected) | extra)
    if row.get("messages") is not None:
        item = _chat(where, row["messages"])
        items.append(item | _preferred(rejected) | extra)
    return items


def _is_given(row: dict, name: str, options) -> bool:
    return row.get(name) is not None and not (
        name == "answer" and options is not None
    )  # of a multiple choice, it may be a number


def _preferred(rejected: dict) -> dict:
    return rejected and rejected | {"task": "preference"}


def _text(where: str, name: str, text) -> str:
    if name in ("answer", "rejected"):
        try:
            text = answer_text(text)
        except ValueError as error:
            raise UserError(f"{where}: {name} is {str(text)[:100]}, {error}.") from None
    if not isinstance(text, str):
        raise UserError(f"{where}: {name} is {repr(text)[:100]}, expected text.")
    text = without_placeholders(text) if name == "question" else text
    if not any(character.isprintable() and not character.isspace() for character in text):
        raise UserError(f"{where}: {name} is blank. Fill it in, or remove the row.")
    return text


def _check_forms(where: str, row: dict, texts: dict, options) -> None:
    """Check that a row is a caption, a question with its answer, or a chat. Raises UserError."""
    answered = "answer" in texts or (options is not None and row.get("answer") is not None)
    has_chat = row.get("messages") is not None
    if ("question" in texts) != answered or not (has_chat or "caption" in texts or answered):
        named = [name for name in (*texts, "options") if name in texts or (name == "options" and options is not None)]
        found = f"only {' and '.join(named)}" if named else "no text (empty cells and nulls do not count)"
        raise UserError(
            f"{where}: found {found}. Every row needs a caption, or a question and its answer, or messages."
        )
    if has_chat and answered:
        raise UserError(f"{where}: found both messages and a question. Write them in two rows.")


def _check_extra(where: str, row: dict, extra: dict, options) -> None:
    if row.get("task") == "text":
        raise UserError(f"{where}: the task 'text' is reserved for samples without media. Use another name.")
    if row.get("task") == "*":
        raise UserError(f"{where}: the task '*' means all tasks in mixtures. Use another name.")
    if isinstance(row.get("task"), str) and not row["task"].strip():
        raise UserError(f"{where}: task is blank. Set it, or remove it.")
    if "cue" in extra and (options is not None or row.get("messages") is not None):
        raise UserError(f"{where}: a cue needs a question with a plain answer, not options or messages. Remove it.")
    if options is not None and row.get("rejected") is not None:
        raise UserError(f"{where}: found both options and rejected. Multiple choice has no rejected answer: remove it.")


def _options(where: str, row: dict) -> tuple[str, ...]:
    options = row["options"]
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise UserError(f"{where}: options are {str(options)[:100]}, expected a list of 2 to {len(LETTERS)} texts.")
    if all(_is_number(option) for option in options):
        options = [answer_text(option) for option in options]
    options = tuple(_text(where, "an option", option).strip() for option in options)
    repeated = next((option for option in options if options.count(option) > 1), None)
    if repeated is not None:
        raise UserError(f"{where}: the option {repeated!r} occurs twice. Remove or rename one.")
    return options


def _correct(where: str, answer, options: tuple[str, ...]) -> int:
    """Return the index of the correct option. `answer` is its text, else its number from 0.

    A number that could be both is ambiguous, unless all options are numbers: then it is the option's text.
    """
    text = answer.strip() if isinstance(answer, str) else answer_text(answer) if _is_number(answer) else None
    named = options.index(text) if text in options else None
    if isinstance(answer, bool):  # true or false, as the text of an option
        found = [i for i, option in enumerate(options) if option.casefold() in BOOLEANS[answer]]
        named = found[0] if len(found) == 1 else None
    number = int(text) if text is not None and text.isascii() and text.isdigit() else None
    is_index = number is not None and number < len(options)
    all_numbers = all(_is_numeral(option) for option in options)
    if is_index and not isinstance(answer, str) and named not in (None, number) and not all_numbers:
        raise UserError(
            f"{where}: the answer {answer!r} is ambiguous: option {number} is {options[number]!r}, but option {named} "
            f"is {options[named]!r}. Write the answer as text."
        )
    if named is None and all_numbers and _is_number(answer):
        equal = [i for i, option in enumerate(options) if float(option) == answer]  # 2 is "2.0"
        named = equal[0] if len(equal) == 1 else None
    if named is not None:
        return named
    if is_index and not all_numbers:
        return number
    known = json.dumps(options, ensure_ascii=False)[:200]
    or_number = "" if all_numbers else f" or a number from 0 to {len(options) - 1}"
    raise UserError(f"{where}: the answer is {repr(answer)[:100]}, expected one of the options {known}{or_number}.")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_numeral(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _chat(where: str, messages) -> dict:
    """The fields of an item: a chat, or a caption if nothing but a placeholder of the media is asked."""
    chat = chat_messages(where, messages)
    asked = chat_item([(message.role, message.content) for message in chat])
    if asked is None:
        return {"user": None, "assistant": chat[-1].content, "task": "caption"}
    for number, (_, text) in enumerate(asked):
        _text(where, f"message {number}", text)
    return {"messages": tuple(Message(role=role, content=text) for role, text in asked), "task": "question"}


def chat_messages(where: str, messages) -> tuple[Message, ...]:
    """Parse a chat: an optional system message, then user to assistant. Raises UserError."""
    if not isinstance(messages, list):
        raise UserError(
            f'{where}: messages is {str(messages)[:50]!r}, expected [{{"role": ..., "content": ...}}, ...].'
        )
    chat = []
    for number, message in enumerate(messages):
        try:
            chat.append(Message.model_validate(standard_message(message)))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, ("messages", number, *first["loc"])))
            raise UserError(f"{where}: {place}: {first['msg']}, found {str(first['input'])[:100]!r}.") from None
        except ValueError as error:
            raise UserError(f"{where}: messages.{number}: {error}.") from None
        _text(where, f"message {number}", chat[-1].content)
    roles = [message.role for message in chat]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns[:1] != ["user"] or turns[-1] != "assistant" or "system" in turns:
        raise UserError(
            f"{where}: a chat must start with user and end with assistant, found "
            f"{', '.join(roles)[:100] or 'no message'}."
        )
    return tuple(chat)
