"""Token ids of old shards back to the messages that they were made of."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pipeline_steps.common.errors import UserError
from pipeline_steps.sources.chatml import ChatMLDecoder, NotChatML
from tests.pipeline_steps.chats import save_tokenizer


@pytest.fixture(scope="module", params=["chatml", "smollm2"])
def tokenizer_dir(tmp_path_factory, request):
    """Both have a chat template with a system line of its own."""
    return save_tokenizer(tmp_path_factory.mktemp("language_model"), request.param)


def ids_of(tokenizer_dir, messages):
    chat = [{"role": role, "content": content} for role, content in messages]
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_dir).apply_chat_template(chat)["input_ids"]


CHATS = [
    [("user", "Which digits?"), ("assistant", "red: 31415")],
    [
        ("system", "Be brief."),
        ("user", "Hello  there\n\n"),
        ("assistant", " ünï 視 🎈\ttab"),
        ("user", "?"),
        ("assistant", "!"),
    ],
    [("user", "user\nassistant\n"), ("assistant", "12 + 3 = 15\r\n- a\n- b")],
]


@pytest.mark.parametrize("messages", CHATS)
def test_messages_are_recovered_exactly_from_token_ids(tokenizer_dir, messages):
    decoder, ids = ChatMLDecoder(tokenizer_dir), ids_of(tokenizer_dir, messages)
    assert decoder.messages(ids) == messages
    assert decoder.messages([*ids[:-1], *[decoder.end] * 5]) == messages  # padded, without the last line break


def test_incomplete_chats_are_rejected(tokenizer_dir):
    decoder, ids = ChatMLDecoder(tokenizer_dir), ids_of(tokenizer_dir, CHATS[0])
    start, end = decoder.start, decoder.end
    for wrong, message in (
        (ids[:-3], "is cut off: no <|im_end|>"),
        ([*ids, start], "is cut off"),
        ([], "token 0 is not <|im_start|>"),
        (ids[1:], "token 0 is not <|im_start|>"),
        ([5000], "5000 is not in the tokenizer's vocabulary"),
        ([-1], "-1 is not in"),
        ([start, end], "expected a role"),
        ([*ids, *ids[5:8], *ids], "is text between two turns"),
        ([start, *(decoder.tokenizer.token_to_id(c) for c in "userĊHi"), end], "its text encodes to other ids"),
    ):
        with pytest.raises(NotChatML, match=message.replace("|", r"\|")):
            decoder.messages(wrong)


def test_tokenizers_without_chatml_are_rejected(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: missing"):
        ChatMLDecoder(tmp_path)
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no <\|im_start\|>"):
        ChatMLDecoder(tmp_path)
