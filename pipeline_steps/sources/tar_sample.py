"""Convert one sample of a WebDataset archive ({key}.json and media) into a schemas.RawSample.

docs/data.md lists the fields of {key}.json. Contradictory samples are rejected with a reason, never guessed at.
"""

import hashlib
import json
import re
from typing import Annotated, BinaryIO, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline_steps.common.choices import LETTERS
from pipeline_steps.common.schemas import Count, Item, Kind, Message, RawSample, SceneObject, Split, slug
from pipeline_steps.sources.archive import Member
from pipeline_steps.sources.chatml import ChatMLDecoder, NotChatML
from pipeline_steps.sources.layout import Group, quoted
from pipeline_steps.sources.texts import (
    answer_text,
    chat_item,
    decoded,
    names_media,
    standard_message,
    unique_fields,
    without_placeholders,
)

MAX_JSON = 2**22  # bytes; parsing takes some 20 times as much memory
MAX_TEXT = 2**20
MAX_ENTRIES = 20_000  # of a list in `items` and `objects`: pydantic keeps one error per invalid entry
CHUNK = 2**20
HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")
Answer = Annotated[str, BeforeValidator(answer_text)]
Name = Annotated[str, Field(max_length=200)]


class UnusableSample(Exception):
    """The sample is unusable. The message is the reason for the quarantine list."""


class ChatMessage(BaseModel):
    """One message of the JSON field `messages`."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "user", "assistant"]
    content: str
    names_media: bool

    @model_validator(mode="before")
    @classmethod
    def _standard(cls, message):
        standard = standard_message(message)
        if isinstance(standard, dict):
            content = message.get("content", message.get("value"))
            return standard | {"names_media": names_media(content)}
        return standard


class PackedFields(BaseModel):
    """Fields of shards packed by this pipeline (schemas.PackedSample), recognised by the field `items`."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    items: Annotated[list[dict], Field(min_length=1, fail_fast=True)]
    kind: Kind
    split: Split
    duration: Annotated[float, Field(ge=0)]
    objects: Annotated[list[dict], Field(fail_fast=True)] | None = None
    num_source_frames: Count | None = None


class Contents(BaseModel):
    """The fields read from {key}.json. Other fields are ignored; null means not set."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    user: str | None = None
    assistant: Answer | None = None
    chosen_assistant: Answer | None = None
    rejected_assistant: Answer | None = None
    caption: str | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] | None = None
    conversations: Annotated[list[ChatMessage], Field(fail_fast=True)] | None = None  # LLaVA's name of `messages`
    token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    loss_mask: Annotated[list[float], Field(fail_fast=True)] | None = None  # only its length is used
    source: Name | None = None
    task: Name | None = None
    video_id: Name | int | None = None
    yt_id: Name | int | None = None
    frame_count: Count | None = None
    split: str | None = None  # RawSample checks it, unless the entry sets another
    is_text_only: bool | None = None
    has_frames: bool | None = None
    own: PackedFields | None = None


def make_sample(group: Group, file: BinaryIO, path: str, key: str, entry, decoder: ChatMLDecoder | None) -> RawSample:
    """Return the RawSample of a group of members in the open archive `file`, stored at `path`.

    entry: schema.Tars. decoder: for its tokenizer, or None. Raises UnusableSample, and OSError if the disk fails.
    """
    if group.problem:
        raise UnusableSample(group.problem)
    contents = _contents(file, group)
    kind, media = _media(group, contents)
    is_video_of_pictures = kind == "video" and media[0] is not group.video
    parts = tuple((member.offset, member.size) for member in media)
    values = {
        "key": key,
        "source": _source(contents, entry.name),
        "split": contents.split if entry.split is None else entry.split,
        "video_id": _video_id(contents, entry.name, key),
        "path": path if media else None,
        "parts": parts,
        "kind": kind,
        "sha256": _sha256(file, parts) if media else None,
        "size": sum(size for _, size in parts),
        "picture_fps": _picture_fps(contents, len(media), entry.picture_fps) if is_video_of_pictures else None,
        "num_source_frames": len(media) if is_video_of_pictures else None,
    }
    try:
        if contents.own:
            values |= _own_items(contents.own, len(media))
        else:
            text = _read_text(file, group.text) if group.text else None
            values["items"] = (_item(contents, text, kind, decoder),)
        return RawSample(**values)
    except ValidationError as error:
        raise UnusableSample(_first_problem(error)) from None


# ---------------------------------------------------------------- reading


def _contents(file: BinaryIO, group: Group) -> Contents:
    if group.json is None:
        if group.text is None:
            raise UnusableSample("no .json and no .txt with the text" + _dot_hint(group))
        return Contents()
    try:
        fields = _parse(_read(file, group.json, MAX_JSON))
        return Contents.model_validate(fields | {"own": fields if fields.get("items") is not None else None})
    except ValidationError as error:
        raise UnusableSample(f"{quoted(group.json.name)}: {_first_problem(error)}") from None
    except (ValueError, RecursionError) as error:  # syntax, UTF-8, huge numbers, deep nesting
        raise UnusableSample(f"{quoted(group.json.name)} is not valid JSON: {str(error).split(';')[0][:200]}") from None


def _dot_hint(group: Group) -> str:
    return f" (its key is the name up to the first dot: {quoted(group.key)})" if group.pictures or group.still else ""


def _parse(content: bytes) -> dict:
    def refuse(constant):
        raise ValueError(f"{constant} is not a JSON number")

    parsed = json.loads(decoded(content), parse_constant=refuse, object_pairs_hook=unique_fields)
    if HALF_CHARACTER.search(content):
        json.dumps(parsed, ensure_ascii=False).encode()  # rejects lone surrogates
    if not isinstance(parsed, dict):
        raise ValueError("expected an object {...}")
    return parsed


def _read(file: BinaryIO, member: Member, limit: int) -> bytes:
    if member.size > limit:
        raise UnusableSample(f"{quoted(member.name)} has {member.size} bytes, at most {limit} are allowed")
    file.seek(member.offset)
    return file.read(member.size)


def _read_text(file: BinaryIO, member: Member) -> str:
    try:
        return decoded(_read(file, member, MAX_TEXT))
    except UnicodeDecodeError as error:
        raise UnusableSample(f"{quoted(member.name)} is not {error.encoding.upper()} (byte {error.start})") from None


def _sha256(file: BinaryIO, parts) -> str:
    """hashing.media_sha256 of the parts of the open file, in constant memory."""
    digest = hashlib.sha256()
    for offset, size in parts:
        file.seek(offset)
        while size:
            chunk = file.read(min(size, CHUNK))
            if not chunk:
                raise UnusableSample(f"the archive was truncated while it was read: no data at byte {offset}")
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "sample"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}, found {ascii(first['input'])[:100]}"


# ---------------------------------------------------------------- media


def _media(group: Group, contents: Contents) -> tuple[str, list[Member]]:
    """Return (kind, ordered media). Raises UnusableSample if the members contradict each other or the JSON."""
    given = [name for name in ("still", "pictures", "video") if getattr(group, name)]
    if len(given) > 1:
        names = {"still": "a picture", "pictures": "numbered pictures", "video": "a video file"}
        raise UnusableSample("found " + " and ".join(names[name] for name in given) + ": keep one of them")
    media = [group.still or group.video] if group.still or group.video else _in_order(group.pictures)
    claims_frames = contents.has_frames or contents.is_text_only is False or bool(contents.frame_count)
    denies_frames = contents.has_frames is False or contents.is_text_only or contents.frame_count == 0
    is_text = denies_frames or (contents.own is not None and contents.own.kind == "text")
    if not media:
        if claims_frames:
            count = "frames" if contents.frame_count is None else f"frame_count {contents.frame_count}"
            raise UnusableSample(f"the JSON claims {count}, found 0 frames")
        if not is_text and _asks_about_media(contents):
            raise UnusableSample(
                "a question names a picture or video (such as <image>), found 0 frames: add them, or set is_text_only"
            )
        return "text", []
    if denies_frames:
        raise UnusableSample(f"the JSON claims no frames, found {len(media)}")
    if group.video is None and contents.frame_count is not None and contents.frame_count != len(media):
        raise UnusableSample(f"frame_count is {contents.frame_count}, found {len(media)} frames")
    empty = next((member for member in media if not member.size), None)
    if empty is not None:
        raise UnusableSample(f"{quoted(empty.name)} is empty")
    is_image = group.still is not None or (group.pictures and contents.own and contents.own.kind == "image")
    return ("image" if is_image else "video"), media


def _asks_about_media(contents: Contents) -> bool:
    turns = [*(contents.messages or ()), *(contents.conversations or ())]
    return names_media(contents.user or "") or any(turn.role == "user" and turn.names_media for turn in turns)


def _in_order(pictures: list[tuple[int, Member]]) -> list[Member]:
    """Sort the numbered pictures. Raises UnusableSample unless they are 0, 1, 2 ... or 1, 2, 3 ..."""
    ordered = sorted(pictures, key=lambda entry: entry[0])
    numbers = [number for number, _ in ordered]
    first = 1 if numbers and numbers[0] == 1 else 0
    for place, number in enumerate(numbers, first):
        if number != place:
            problem = f"frame {number} occurs twice" if number < place else f"frame {place} is missing"
            raise UnusableSample(f"{problem} ({len(numbers)} frames, the last is number {numbers[-1]})")
    return [member for _, member in ordered]


def _picture_fps(contents: Contents, count: int, given: float) -> float:
    """Return the frames per second of stored pictures: from the duration in shards of this pipeline, else `given`."""
    return count / contents.own.duration if contents.own and contents.own.duration else given


# ---------------------------------------------------------------- text


def _source(contents: Contents, name: str) -> str:
    if contents.source is not None and not slug(contents.source):
        raise UnusableSample(f"source is {contents.source!r}, expected a name with letters or digits")
    return contents.source or name


def _video_id(contents: Contents, name: str, key: str) -> str:
    """Return an id that is unique over all entries: a `video_id` is so within its entry, a YouTube id anywhere."""
    if contents.video_id is not None and str(contents.video_id).strip():
        return f"{name}-{contents.video_id}"
    return str(contents.yt_id) if contents.yt_id is not None and str(contents.yt_id).strip() else key


def _own_items(own: PackedFields, count: int) -> dict:
    """Return the items, and the objects if they describe exactly the stored frames."""
    for thing in (*own.items, *(own.objects or ())):
        long = next(
            (name for name, value in thing.items() if isinstance(value, list) and len(value) > MAX_ENTRIES), None
        )
        if long is not None:
            raise UnusableSample(f"{long[:50]!r} has {len(thing[long])} entries, at most {MAX_ENTRIES} are allowed")
    items = [Item.model_validate(item) for item in own.items]
    for item in items:
        turns = [(message.role, message.content) for message in item.messages or ()]
        for text in (item.user, item.assistant, item.rejected, *(item.options or ())):
            _check_text("items", text)
        if item.messages is not None:
            _check_turns(turns)
        elif item.user is None and not count:
            raise UnusableSample("an answer without frames and without a question")
        if len(item.options or ()) > len(LETTERS):
            raise UnusableSample(f"{len(item.options)} options, at most {len(LETTERS)} are allowed")
    if own.objects is not None and own.num_source_frames == count:
        return {"items": items, "objects": [SceneObject.model_validate(thing) for thing in own.objects]}
    return {"items": [item.model_copy(update={"target": None}) for item in items]}


def _item(contents: Contents, text: str | None, kind: str, decoder: ChatMLDecoder | None) -> Item:
    """Make the item from the texts in the JSON, else from its token ids, else from the caption or the .txt."""
    chosen = _agreed("assistant", contents.assistant, "chosen_assistant", contents.chosen_assistant)
    if contents.messages is not None and contents.conversations is not None:
        raise UnusableSample("found both messages and conversations")
    given = contents.messages if contents.conversations is None else contents.conversations
    messages = given and [(message.role, message.content) for message in given]
    is_text = messages is not None or chosen is not None or contents.user is not None
    if not is_text and contents.token_ids is not None:
        messages = _decode(contents, decoder)
    user = contents.user if contents.user is not None and contents.user.strip() else None
    user = (without_placeholders(user) or None) if user is not None and kind != "text" else user
    caption = next((words for words in (contents.caption, text) if words is not None), None)
    if messages is not None:
        item = _chat(messages, chosen, contents, kind)
    elif is_text:
        if chosen is None:
            raise UnusableSample("user without assistant")
        item = {"user": user, "assistant": chosen, "task": "question" if user else "caption"}
    elif caption is not None:
        item = {"assistant": caption, "task": "caption"}
    else:
        raise UnusableSample("no text: found no user and assistant, messages, caption, token_ids or .txt")
    if kind == "text" and item.get("user") is None and item.get("messages") is None:
        raise UnusableSample("an answer without frames and without a question")
    return _finished(item, contents, kind)


def _finished(item: dict, contents: Contents, kind: str) -> Item:
    if contents.rejected_assistant is not None:
        answer = item.get("assistant") or item["messages"][-1].content
        if contents.rejected_assistant.strip() == answer.strip():
            raise UnusableSample("the chosen and the rejected answer are the same")
        item |= {"rejected": contents.rejected_assistant, "task": "preference"}
    for name in ("user", "assistant", "rejected"):
        _check_text(name, item.get(name))
    if kind == "text":
        return Item(**item | {"task": "text"})
    if contents.task is not None and (contents.task in ("text", "*") or not contents.task.strip()):
        raise UnusableSample(f"the task {contents.task!r} is not allowed for a sample with frames")
    return Item(**item | ({"task": contents.task} if contents.task else {}))


def _agreed(one: str, first: str | None, other: str, second: str | None) -> str | None:
    if first is not None and second is not None and first != second:
        raise UnusableSample(f"{one} and {other} differ")
    return second if first is None else first


def _decode(contents: Contents, decoder: ChatMLDecoder | None) -> list[tuple[str, str]]:
    if contents.loss_mask is not None and len(contents.loss_mask) != len(contents.token_ids):
        raise UnusableSample(
            f"token_ids has {len(contents.token_ids)} entries, loss_mask has {len(contents.loss_mask)} entries"
        )
    if decoder is None:
        raise UnusableSample(
            "token_ids instead of text: set `tokenizer` of this entry to the tokenizer that produced them"
        )
    try:
        return decoder.messages(contents.token_ids)
    except NotChatML as error:
        raise UnusableSample(f"token_ids: {error}") from None


def _chat(messages: list[tuple[str, str]], chosen: str | None, contents: Contents, kind: str) -> dict:
    """Return the item fields of one question and answer, or of a whole chat."""
    if chosen is not None and messages and messages[-1][0] == "user":
        messages = [*messages, ("assistant", chosen)]
    elif chosen is not None and messages and messages[-1][1] != chosen:
        raise UnusableSample("the last message differs from the answer in assistant")
    if contents.user is not None and ("user", contents.user) not in messages:
        raise UnusableSample("user is not in messages")
    _check_turns(messages)
    if kind != "text":
        asked = chat_item(messages)
        if asked is None:
            return {"assistant": messages[1][1], "task": "caption"}
        messages = asked
        _check_turns(messages)
    if [role for role, _ in messages] != ["user", "assistant"]:
        chat = tuple(Message(role=role, content=content) for role, content in messages)
        return {"messages": chat, "task": "question"}
    question, answer = messages[0][1], messages[1][1]
    is_caption = contents.caption is not None and contents.caption.strip() == answer.strip()
    if is_caption and contents.token_ids is not None and contents.messages is None:
        return {"assistant": answer, "task": "caption"}  # the question was the prompt of the run that packed it
    return {"user": question, "assistant": answer, "task": "question"}


def _check_turns(messages: list[tuple[str, str]]) -> None:
    for role, content in messages:
        _check_text(role, content)
    roles = [role for role, _ in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns[:1] != ["user"] or turns[-1] != "assistant" or "system" in turns:
        raise UnusableSample(
            f"a chat must start with user and end with assistant, found {', '.join(roles)[:100] or 'no message'}"
        )


def _check_text(name: str, text: str | None) -> None:
    if text is not None and not any(character.isprintable() and not character.isspace() for character in text):
        raise UnusableSample(f"{name} is blank")
