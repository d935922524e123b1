"""Text formats that data sets use: encodings, answers that are not text, chats of LLaVA and of typed contents.

Shared by the sources `folder` and `tars`. Every function raises ValueError, with a short reason, for what it cannot
interpret.
"""

import json
import math
import re
from collections import Counter

ROLES = {"human": "user", "gpt": "assistant"}  # the speakers `from` of LLaVA and ShareGPT; others are kept
MEDIA_PARTS = ("image", "image_url", "video", "video_url")  # types of parts of a message
PLACEHOLDER = "<image>|<video>"
LEADING = re.compile(rf"^[ \t]*(?:(?:{PLACEHOLDER})[ \t]*)+\n?", re.MULTILINE)
INNER = re.compile(rf"[ \t]*(?:{PLACEHOLDER})")


def decoded(content: bytes) -> str:
    """Decode UTF-8, UTF-16 or UTF-32, with or without a byte order mark. Raises UnicodeDecodeError."""
    return content.decode(json.detect_encoding(content))  # JSON and the names of columns start with an ASCII character


def unique_fields(pairs: list[tuple[str, object]]) -> dict:
    """The object of JSON, as `object_pairs_hook` of json.loads. ValueError for a repeated field."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the field {repeated[:50]!r} occurs twice")
    return fields


def names_media(content) -> bool:
    """Whether a question, as text or typed contents, has a placeholder or a part that is a picture or video."""
    if isinstance(content, list):
        return any(map(names_media, content))
    if isinstance(content, dict):
        return content.get("type") in MEDIA_PARTS or names_media(content.get("text"))
    return isinstance(content, str) and ("<image>" in content or "<video>" in content)


def answer_text(answer):
    """An answer as text: 3 -> "3", 2.0 -> "2", true -> "yes", ["red", "blue"] -> "red, blue". Text and None stay."""
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    if isinstance(answer, int):
        return str(answer)
    if isinstance(answer, float) and math.isfinite(answer):
        return str(int(answer)) if answer.is_integer() else repr(answer)
    if isinstance(answer, list) and answer and all(isinstance(part, str | int | float) for part in answer):
        parts = [answer_text(part) for part in answer]
        if len(set(parts)) < len(parts):
            raise ValueError("a list that repeats an answer, such as votes: choose one answer")
        return ", ".join(parts)
    raise ValueError("expected text, a number, true, false, or a list of these")


def without_placeholders(question: str) -> str:
    """Remove <image> and <video>, which mark the place of the media in a question."""
    if not names_media(question):
        return question
    return INNER.sub("", LEADING.sub("", question)).strip()


def standard_message(message):
    """A message as {role, content}, made of {from, value} and of typed contents. Anything else is returned as it is."""
    if isinstance(message, dict) and "from" in message and "role" not in message:
        speaker = message["from"]
        role = ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
        message = {"role": role, "content": message.get("value")}
    if isinstance(message, dict) and isinstance(message.get("content"), list):
        message = message | {"content": _content_text(message["content"], message.get("role"))}
    return message


def _content_text(parts: list, role) -> str:
    """The texts among typed contents, a line each. Parts with media are dropped: the media are the sample's."""
    lines = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str) or (kind == "text" and isinstance(part.get("text"), str)):
            lines.append(part if isinstance(part, str) else part["text"])
        elif kind not in MEDIA_PARTS:
            raise ValueError(f"a part of a message is {str(part)[:50]!r}, expected a text, an image or a video")
        elif role == "assistant":
            raise ValueError(f"an answer with a part of the type {kind}, expected text")
    return "\n".join(lines)


def chat_item(turns: list[tuple[str, str]]) -> list[tuple[str, str]] | None:
    """The turns without placeholders in those of the user; None if nothing else is asked: the answer is a caption."""
    asked = [(role, without_placeholders(text) if role == "user" else text) for role, text in turns]
    placeholder_alone = [role for role, _ in turns] == ["user", "assistant"] and turns[0][1].strip() and not asked[0][1]
    return None if placeholder_alone else asked
