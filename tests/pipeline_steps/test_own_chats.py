"""`pipeline_steps.backbones.own_chats`: which answers are kept, and the file that the source `chat` reads."""

import json
from types import SimpleNamespace

import pytest
import torch

from pipeline_steps.backbones import own_chats
from pipeline_steps.common.errors import UserError
from pipeline_steps.sources import chat
from pipeline_steps.tokens.chat import load_tokenizer
from tests.pipeline_steps.chats import save_tokenizer


class Model:
    """Answers a question with `answers[question]`, and ends it unless the answer has three dots."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers, self.batches = tokenizer, answers, []

    def generate(self, input_ids, attention_mask, **options):
        self.batches.append(len(input_ids))
        rows = []
        for row, mask in zip(input_ids, attention_mask, strict=True):
            assert mask[-1] == 1, "prompts are padded on the left"
            prompt = self.tokenizer.decode(row[mask.bool()])
            (answer,) = [text for question, text in self.answers.items() if question in prompt]
            ids = self.tokenizer.encode(answer, add_special_tokens=False)
            rows.append(ids if "..." in answer else [*ids, self.tokenizer.eos_token_id])
        width = max(map(len, rows))
        rows = [row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(rows)], 1)


@pytest.fixture
def tokenizer(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "tokenizer", "chatml"))
    tokenizer.padding_side, tokenizer.pad_token = "left", "<|endoftext|>"
    return tokenizer


def test_answers_keep_their_question_and_those_without_an_end_are_left_out(tokenizer):
    answers = {"Say red": "red", "And now say something longer": "1 2 3", "Go on": "1 2 3 ...", "Nothing": " "}
    model = Model(tokenizer, answers)
    found = own_chats.answer(model, tokenizer, list(answers), max_tokens=8, batch_size=3)
    assert found == [("Say red", "red"), ("And now say something longer", "1 2 3")]
    assert model.batches == [3, 1]


def test_questions_are_built_in_or_lines_of_a_file(tmp_path):
    built_in = own_chats.questions(None)
    assert len(built_in) == len(set(built_in)) == len(own_chats.TOPICS) * len(own_chats.QUESTIONS)
    (tmp_path / "questions.txt").write_text("One?\n\n Two? \nOne?\n")
    assert own_chats.questions(tmp_path / "questions.txt") == ["One?", "Two?"]
    (tmp_path / "questions.txt").write_text("\n")
    with pytest.raises(UserError, match=r"questions\.txt: no questions"):
        own_chats.questions(tmp_path / "questions.txt")
    with pytest.raises(UserError, match=r"none\.txt: cannot be read \(No such file"):
        own_chats.questions(tmp_path / "none.txt")
    (tmp_path / "questions.txt").write_text("One?\n", encoding="utf-8-sig")
    assert own_chats.questions(tmp_path / "questions.txt") == ["One?"]
    (tmp_path / "questions.txt").write_text("One?\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"questions\.txt: not UTF-8 \(byte 0\)\. Save the file as UTF-8"):
        own_chats.questions(tmp_path / "questions.txt")


def test_the_source_chat_reads_what_is_written(tokenizer, tmp_path, monkeypatch):
    model = Model(tokenizer, {"One?": "1", "Two?": "2 é"})
    loaded = SimpleNamespace(to=lambda device: SimpleNamespace(eval=lambda: model))
    monkeypatch.setattr(own_chats.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    monkeypatch.setattr(own_chats.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: loaded)
    (tmp_path / "questions.txt").write_text("One?\nTwo?\n")
    path = tmp_path / "chats.jsonl"
    assert own_chats.write_chats(tmp_path, path, tmp_path / "questions.txt", device="cpu") == 2
    samples = list(chat.collect(SimpleNamespace(path=str(path))))
    assert [[message.content for message in sample.items[0].messages] for sample in samples] == [
        ["One?", "1"],
        ["Two?", "2 é"],
    ]
    assert {sample.items[0].task for sample in samples} == {"text"}


def test_columns_of_smoltalk_are_ignored(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, *GOOD["messages"]]
    rated = {"category": "math", "difficulty": "easy", "quality": "good", "reward_model_score": 0.1}
    rows = [
        {"messages": turns, "source": "systemchats-30k"},
        {"full_topic": "Travel/Trains", "messages": turns[1:]},
        {"messages": turns[1:], **rated, "conversation_tokens": 7},
    ]
    path = tmp_path / "smoltalk.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = list(chat.collect(SimpleNamespace(path=str(path))))
    assert [[message.role for message in sample.items[0].messages] for sample in samples] == [
        ["system", "user", "assistant"],
        *[["user", "assistant"]] * 2,
    ]
    assert {sample.source for sample in samples} == {"chat"}


GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the file has no chats"),
        ([GOOD, {"messages": GOOD["messages"][:1]}], "line 2: a chat must start with user and end with assistant"),
        ([{"question": "a", "messages": []}], "line 1: unknown column question. Expected messages and, optionally"),
        ([GOOD | {"source": "s", "chat_template_kwargs": {}}], "line 1: unknown column chat_template_kwargs"),
        ([{"split": "test"}], "line 1: messages is 'None'"),
        ([GOOD | {"split": "held out"}], "line 1: split: .*'held out'"),
        (["not JSON"], "line 1"),
    ],
)
def test_a_chat_that_cannot_be_read_is_named_by_its_line(tmp_path, lines, message):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    with pytest.raises(UserError, match=message):
        list(chat.collect(SimpleNamespace(path=str(path))))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_chats_in_every_unicode_encoding_are_read(tmp_path, encoding):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(GOOD).replace('"b"', '"Größe"') + "\n", encoding=encoding)
    (sample,) = chat.collect(SimpleNamespace(path=str(path)))
    assert sample.items[0].messages[1].content == "Größe"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"messages": "Größe"}\n'.encode("latin-1"), r"line 1: not UTF-8 \(byte 16\)\. Save the file as UTF-8"),
        ("{}\n".encode("utf-16")[:-1], r"chats\.jsonl: not UTF-16.* \(byte \d\)\. Save it as UTF-8"),
    ],
)
def test_chats_that_are_no_unicode_are_named(tmp_path, content, message):
    (tmp_path / "chats.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(chat.collect(SimpleNamespace(path=str(tmp_path / "chats.jsonl"))))


def test_a_missing_file_of_chats_is_named(tmp_path):
    with pytest.raises(UserError, match=r"sources\.chat\.path is .*none\.jsonl: expected a \.jsonl file"):
        list(chat.collect(SimpleNamespace(path=str(tmp_path / "none.jsonl"))))
