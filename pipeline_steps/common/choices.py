"""Text format of multiple-choice questions, shared by training and evaluation."""

from string import ascii_uppercase

from pipeline_steps.common.errors import UserError

LETTERS = ascii_uppercase


def question(user, options, line, where):
    """The user's text: the question, one line `A. text` per option, and `line` ("": none).

    options: texts without letters. UserError that starts with `where`: a blank option, or more options than letters.
    """
    texts = [option.strip() for option in options]
    if len(texts) > len(LETTERS):
        raise UserError(f"{where}: {len(texts)} options, but there are {len(LETTERS)} letters. Remove some options.")
    if "" in texts:
        raise UserError(f"{where}: option {LETTERS[texts.index('')]} is empty. Correct or remove it at its source.")
    lettered = [f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False)]
    return "\n".join([user.strip(), *lettered, *([line.strip()] if line.strip() else [])])


def answer(number):
    """The answer text for option `number`: its letter."""
    return LETTERS[number]
