"""Messages in the standard form of chat models, as chats of the training data: one text per turn, media beside it.

A rendered chat has a placeholder, `<image>` or `<video>`, for every medium. The processor replaces them by the visual
tokens, which stand in one place.
"""

import re

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
PLACEHOLDER = re.compile(rf"{IMAGE_TOKEN}|{VIDEO_TOKEN}")
LEADING = re.compile(rf"^[ \t]*(?:(?:{PLACEHOLDER.pattern})[ \t]*)+\n?", re.MULTILINE)
INNER = re.compile(rf"[ \t]*(?:{PLACEHOLDER.pattern})")
MEDIA = {"image": IMAGE_TOKEN, "video": VIDEO_TOKEN}
SOURCES = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}  # keys, as in transformers
# Prepended to the language model's template, which takes texts only: every message becomes its text.
TEXTS_ONLY = (
    "{%- set ns = namespace(chat=[]) -%}{%- for message in messages -%}{%- set own = message['content'] -%}"
    "{%- if own is not string -%}{%- set own = own | selectattr('type', 'equalto', 'text') | map(attribute='text') "
    "| join -%}{%- endif -%}{%- set ns.chat = ns.chat + [dict(message, content=own)] -%}{%- endfor -%}"
    "{%- set messages = ns.chat -%}"
)


def standard_messages(conversation, system: str, control_tokens: list[str]) -> list[dict]:
    """A conversation as chats are trained: the system line first, texts stripped, the placeholders of a message's media
    before its text. ValueError for a message of another form, or a text with a control token."""
    messages = [_standard(message, number, control_tokens) for number, message in enumerate(conversation)]
    if not messages:
        raise ValueError("the conversation has no messages. Pass at least one with role and content")
    if system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system.strip()})
    return messages


def _standard(message, number: int, control_tokens: list[str]) -> dict:
    where = f"message {number}"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        raise ValueError(f"{where}: found {str(message)[:60]!r}, expected a dict with role and content")
    content = message["content"]
    if not isinstance(content, str | list | tuple):
        raise ValueError(f"{where}: its content is {type(content).__name__}, expected a text or a list of parts")
    parts = [content] if isinstance(content, str) else content
    texts, media = [], []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = str(part.get("type")).removesuffix("_url") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in MEDIA:
            media.append(_medium(part, kind, where))
        else:
            raise ValueError(f"{where}: a part is {str(part)[:60]!r}, expected the type text, image or video")
    text = "\n".join(texts).strip()
    control = [token for token in control_tokens if token in text]
    if control:
        raise ValueError(
            f"{where}: {text!r} contains the control token {control[0]}. Pass texts only; the chat template adds it"
        )
    if not media:
        return {**message, "content": text}
    text = text_without_placeholders(text)  # the parts say which media there are
    places = "".join(MEDIA[part["type"]] for part in media)
    return {**message, "content": [*media, {"type": "text", "text": places + text}]}


def _medium(part: dict, kind: str, where: str) -> dict:
    """A part with one medium, or with none, for media that are passed beside the conversation."""
    if part["type"] != kind:  # OpenAI's form: {"type": "image_url", "image_url": {"url": ...}}
        url = part.get(part["type"])
        part = {"type": kind, "url": url.get("url") if isinstance(url, dict) else url}
    given = [key for key in SOURCES[kind] if part.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"{where}: its {kind} has {' and '.join(given)}. Give one of them")
    return {"type": kind} | {key: part[key] for key in given}


def placeholders(text: str) -> list[str]:
    """ "image" or "video" for each placeholder, in order."""
    return [token.strip("<>") for token in PLACEHOLDER.findall(text)]


def text_without_placeholders(text: str) -> str:
    """A question without placeholders, as the training data's."""
    return INNER.sub("", LEADING.sub("", text)).strip()


def without_placeholders(chat: str, control_tokens: list[str]) -> tuple[str, int]:
    """(rendered chat without placeholders, where the text of the message that had them ends).

    ValueError if several messages have some: the network reads all frames of a chat in one place.
    """
    ends = sorted(
        {match.end() for token in control_tokens for match in re.finditer(re.escape(token), chat)} | {0, len(chat)}
    )
    own = {max(end for end in ends if end <= match.start()) for match in PLACEHOLDER.finditer(chat)}
    if len(own) > 1:
        raise ValueError(
            f"{len(own)} messages have images or videos, expected 1: the model reads all frames in one place. Put them "
            "into one message"
        )
    start = own.pop()
    stops = [chat.find(token, start) for token in control_tokens]
    stop = min((place for place in stops if place >= 0), default=len(chat))
    message = INNER.sub("", LEADING.sub("", chat[start:stop])).rstrip()
    return chat[:start] + message + chat[stop:], start + len(message)
