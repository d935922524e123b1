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

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers, self.batches = tokenizer, answers, []
        self.max_batches = None  # is interrupted after these

    def to(self, device):
        return self

    def eval(self):
        return self

    def generate(self, input_ids, attention_mask, **options):
        if len(self.batches) == self.max_batches:
            raise KeyboardInterrupt
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


def test_answers_keep_their_question_and_those_without_an_end_are_left_out(tokenizer, tmp_path):
    answers = {"Say red": "red", "And now say something longer": "1 2 3", "Go on": "1 2 3 ...", "Nothing": " "}
    model = Model(tokenizer, answers)
    found = own_chats.answer(model, tokenizer, list(answers), max_tokens=8, batch_size=3, kept=tmp_path)
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


@pytest.fixture
def load(tokenizer, tmp_path, monkeypatch):
    """Has `Model` loaded in place of a language model, and its questions in questions.txt; returns it."""

    def load(answers):
        model = Model(tokenizer, answers)
        monkeypatch.setattr(own_chats.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
        monkeypatch.setattr(own_chats.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
        (tmp_path / "questions.txt").write_text("".join(f"{question}\n" for question in answers))
        (tmp_path / "language").mkdir(exist_ok=True)
        return model

    monkeypatch.setenv("RUN_SCRATCH", str(tmp_path))
    return load


def test_the_source_chat_reads_what_is_written(load, tmp_path):
    load({"One?": "1", "Two?": "2 é"})
    path = tmp_path / "chats.jsonl"
    assert own_chats.write_chats(tmp_path / "language", path, tmp_path / "questions.txt", device="cpu") == 2
    samples = list(chat.collect(SimpleNamespace(path=str(path))))
    assert [[message.content for message in sample.items[0].messages] for sample in samples] == [
        ["One?", "1"],
        ["Two?", "2 é"],
    ]
    assert {sample.items[0].task for sample in samples} == {"text"}


def test_after_a_kill_the_same_command_continues_with_the_same_bytes(load, tmp_path):
    answers = {f"Question {number}": f"{number} é" for number in range(8)} | {"Without end": "..."}

    def write(name, max_batches=None):
        model = load(answers)
        model.max_batches = max_batches
        try:
            own_chats.write_chats(
                tmp_path / "language", tmp_path / name, tmp_path / "questions.txt", batch_size=2, device="cpu"
            )
        except KeyboardInterrupt:
            assert not (tmp_path / name).exists()
        return len(model.batches)

    assert write("whole.jsonl") == 5
    assert [write("chats.jsonl", max_batches) for max_batches in (0, 2, 1, None)] == [0, 2, 1, 2]
    assert (tmp_path / "chats.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [path.suffix for path in (tmp_path / ".scratch/own_chats").iterdir()] == [".lock"]
    assert write("more.jsonl", max_batches=3) == 3
    (tmp_path / "language/model.safetensors").write_bytes(b"other weights")
    assert write("more.jsonl") == 5


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
        (['{"messages": [], "messages": []}'], "line 1: .*the field 'messages' occurs twice"),
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


def test_a_path_of_chats_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "chats.jsonl").write_text(json.dumps(GOOD))
    assert len(list(chat.collect(SimpleNamespace(path="~/chats.jsonl")))) == 1


def test_a_missing_file_of_chats_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"sources\.chat\.path is .*none\.jsonl: does not exist, expected a \.jsonl file"
    ):
        list(chat.collect(SimpleNamespace(path=str(tmp_path / "none.jsonl"))))
