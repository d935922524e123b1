"""Golden tokens, spans and masks of chats; parity with the chat template; what is cut, what is left out and why."""

import re
import string

import pytest
import yaml

from pipeline_steps.common import choices, params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.schemas import Item
from pipeline_steps.inference.answers import question
from pipeline_steps.tokens.chat import ChatRenderer, load_tokenizer
from pipeline_steps.tokens.rows import tokenize_samples
from tests.pipeline_steps.chats import (
    CHATML_TOKENS,
    FORMATS,
    SMOLLM2_TOKENS,
    make_section,
    mask_of,
    packed,
    save_tokenizer,
    spans_of,
    template_ids,
    template_spans,
    turns,
)

MANY = 10_000  # tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{format: a tokenizer's folder}"""
    return {name: save_tokenizer(tmp_path_factory.mktemp(name), name) for name in FORMATS}


@pytest.fixture(params=FORMATS)
def tokenizer(request, folders):
    return load_tokenizer(folders[request.param])


@pytest.fixture
def chatml(folders):
    return load_tokenizer(folders["chatml"])


def outcome_of(tokenizer, *items, section=None, max_tokens=MANY, **sample):
    renderer = ChatRenderer(tokenizer, section or make_section())
    return tokenize_samples([packed(*items, **sample)], renderer, max_tokens)


def row_of(tokenizer, item, **options):
    outcome = outcome_of(tokenizer, item, **options)
    assert not outcome.dropped
    assert not outcome.truncated
    return outcome.rows[0]


def pieces_of(tokenizer, row):
    return [tokenizer.decode([i]) for i in row["input_ids"]]


def masked(tokenizer, row, name):
    return [piece for piece, chosen in zip(pieces_of(tokenizer, row), row[name], strict=True) if chosen]


# ---------------------------------------------------------------- one chat


@pytest.mark.parametrize("system", ["Watch.", ""])
def test_the_question_is_that_of_the_last_user_turn_in_every_format(tokenizer, system):
    single = row_of(
        tokenizer, {"user": "Which digits?", "assistant": "3 14", "task": "card"}, section=make_section(system=system)
    )
    assert question(tokenizer, single) == "Which digits?"
    chat = turns("One?", "1", "Two\n\nor three?", "2")
    several = row_of(tokenizer, {"messages": chat, "task": "chat"}, section=make_section(system=system))
    assert question(tokenizer, several) == "Two\n\nor three?"


def test_golden_card_item(chatml):
    item = {"user": "Which digits does red show?", "assistant": "red: 3 14", "task": "card", "cue": "red:"}
    row = row_of(chatml, item)
    assert pieces_of(chatml, row) == [
        *["<|im_start|>", "system", "\n", "Watch", ".", "<|im_end|>", "\n"],
        *["<|im_start|>", "user", "\n", "Which", " digits", " does", " red", " show", "?", "<|im_end|>", "\n"],
        *["<|im_start|>", "assistant", "\n", "red", ":", " ", "3", " ", "1", "4", "<|im_end|>"],
    ]
    assert masked(chatml, row, "answer_mask") == ["red", ":", " ", "3", " ", "1", "4", "<|im_end|>"]
    assert masked(chatml, row, "score_mask") == ["3", "1", "4"]
    assert row["visual_position"] == 16  # before the question's end-of-turn token
    assert (row["rejected_ids"], row["rejected_mask"], row["truncated_turns"]) == (None, None, 0)


def test_cue_after_whitespace_is_not_scored(chatml):
    item = {"user": "Which?", "assistant": " red: 3", "task": "card", "cue": " red:"}
    assert masked(chatml, row_of(chatml, item), "score_mask") == ["3"]


def test_without_a_cue_all_words_but_no_punctuation_are_scored(chatml):
    row = row_of(chatml, {"user": "What?", "assistant": "grey, 3: é!", "task": "gist"})
    scored = masked(chatml, row, "score_mask")
    assert "".join(scored).replace(" ", "").startswith("grey3")
    assert not {",", ":", "!", " ", "<|im_end|>"} & set(scored)
    assert sum(row["score_mask"]) >= 3  # é is scored, in however many bytes it is cut


CHATS = {
    "one turn": turns("Which digits does red show?", "red: 3 14"),
    "three turns": turns("Say 1", "1", "Say user", "user", "And?", "assistant"),
    "own system line": turns("Say 1", "1", "Say 2", "2", system="Be brief."),
    "accents": turns("Où est le garçon\u00a0?", "À gauche, près de l\u2019arbre", "Ещё?", "Да: 雨が降る"),
    "combining": turns("e\u0301?", "a\u0308\u0308 \u1112\u1161\u11ab"),
    "emoji": turns("\N{DOG FACE}?", "👩‍👩‍👧‍👦 🇫🇷 👍🏽", "more\N{VARIATION SELECTOR-16}", "\N{SLICE OF PIZZA}"),
    "right to left": turns("مرحبا؟", "שלום"),
    "edges": turns("\n\t What? \r\n", "  grey \n", " 1\u00a0", "\u2003grey\u3000"),
    "blank lines inside": turns("a\n\n\n b", "1.\n\n2.  \n x"),
    "like a template": turns("user\nassistant\n", "assistant\nuser <|im_begin|> </x>", "system", "\\n"),
    "control characters": turns("\x00\x1b[0m?", "\x07\ufeff\u200b1"),
    "long": turns("word " * 200, "red 3, blue 5 " * 100),
}


@pytest.mark.parametrize("system", ["Watch.", ""])
@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_ids_and_spans_match_the_chat_template(tokenizer, messages, system):
    row = row_of(tokenizer, {"task": "f", "messages": messages}, section=make_section(system=system))
    expected = [message | {"content": message["content"].strip()} for message in messages]
    if system and messages[0]["role"] != "system":
        expected.insert(0, {"role": "system", "content": system})
    assert row["input_ids"] == template_ids(tokenizer, expected)
    assert spans_of(row["answer_mask"]) == template_spans(tokenizer, expected)
    assert all(row["input_ids"][stop - 1] == tokenizer.eos_token_id for _, stop in spans_of(row["answer_mask"]))
    assert all(answer or not scored for answer, scored in zip(row["answer_mask"], row["score_mask"], strict=True))
    question = next(message["content"] for message in expected if message["role"] == "user")
    assert tokenizer.decode(row["input_ids"][: row["visual_position"]]).endswith(question)
    assert row["input_ids"][row["visual_position"]] == tokenizer.eos_token_id
    assert row["answer"] == expected[-1]["content"]


def test_empty_system_prompt_leaves_it_to_the_chat_template(folders):
    item = {"user": " What? \n", "assistant": "\tgrey ", "task": "gist"}
    lines = {
        "chatml": "Default line",
        "smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    }
    for name, line in lines.items():
        tokenizer = load_tokenizer(folders[name])
        row = row_of(tokenizer, item, section=make_section(system=""))
        start = f"<|im_start|>system\n{line}<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>"
        assert tokenizer.decode(row["input_ids"]).startswith(start)
        assert "".join(masked(tokenizer, row, "answer_mask")) == "grey<|im_end|>"


def test_token_shared_by_prompt_and_answer_belongs_to_the_answer(folders):
    tokenizer = load_tokenizer(folders["zephyr"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' "
        "else ' ' + m['content'] + ' </s><s>' }}{% endfor %}"
    )
    item = {"messages": turns("Which?", "red: grey", "And?", "digits"), "task": "f"}
    row = row_of(tokenizer, item, section=make_section(system=""))
    assert masked(tokenizer, row, "answer_mask") == [" red", ":", " grey", " ", "</s>", " digits", " ", "</s>"]
    assert masked(tokenizer, row, "score_mask") == [" red", " grey", " digits"]


def test_truncation_and_padding_of_the_tokenizer_are_disabled(folders, tmp_path):
    tokenizer = load_tokenizer(folders["chatml"])
    item = {"user": "Which digits?", "assistant": "1 2 3", "task": "f"}
    expected = row_of(tokenizer, item)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=100)
    tokenizer.save_pretrained(tmp_path)
    assert row_of(load_tokenizer(tmp_path), item) == expected


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"user": "q", "assistant": " \n", "task": "f"}, "sample 'k': the assistant message is empty"),
        ({"user": " ", "assistant": "a", "task": "f"}, "sample 'k': the user message is empty"),
        (
            {"user": "q", "assistant": "a", "rejected": "\u3000", "task": "f"},
            "the rejected assistant message is empty",
        ),
        ({"user": " ", "options": ["a", "b"], "correct_option": 0, "task": "f"}, "'k': the user message is empty"),
        ({"user": "q", "options": ["a", " "], "correct_option": 0, "task": "f"}, "sample 'k': option B is empty"),
        (
            {"messages": turns("a", "b", "c"), "task": "f"},
            "a chat must start with a user message and end with an assistant message, found user, assistant",
        ),
        (
            {"messages": turns("a", "b")[1:], "task": "f"},
            "sample 'k': a chat must start with a user message and end with an assistant message, found assis",
        ),
        ({"messages": turns("a", "b", system=" "), "task": "f"}, "sample 'k': the system message is empty"),
        ({"messages": turns("a", " ", "c", "d"), "task": "f"}, "sample 'k': the assistant message is empty"),
    ],
)
def test_items_without_usable_text_are_rejected(chatml, item, message):
    with pytest.raises(UserError, match=message):
        outcome_of(chatml, item)


def test_unusable_tokenizers_are_rejected(folders, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: missing.*`dvc repro backbones`"):
        load_tokenizer(tmp_path)
    tokenizer = load_tokenizer(folders["chatml"])
    item = {"user": "q", "assistant": "a", "task": "f"}
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match="reorders or changes messages"):
        outcome_of(tokenizer, item)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + FORMATS["chatml"][0]
    with pytest.raises(UserError, match=r"rejects the roles \['system', 'user', 'assistant'\]: no system"):
        outcome_of(tokenizer, item, item)
    assert row_of(tokenizer, item, section=make_section(system=""))
    tokenizer.chat_template = FORMATS["chatml"][0].replace("<|im_end|>", "<|endoftext|>")
    with pytest.raises(UserError, match=r"ends an answer with '<\|endoftext\|>\\n', without the end-of-turn token"):
        outcome_of(tokenizer, item)
    for name, message in (("eos_token", "no eos_token"), ("chat_template", "no chat template")):
        setattr(tokenizer, name, None)
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path / name)


# ---------------------------------------------------------------- the table of prompts


def test_prompts_depend_on_source_and_kind(chatml):
    section = make_section(
        {"source": "webvid", "video": "What happens?"},
        {"source": "vript", "system": "", "image": "What is it?"},
        {"source": "never collected", "system": "x"},
    )
    item = {"user": None, "assistant": "grey", "task": "caption"}

    def chat(source, kind):
        return chatml.decode(row_of(chatml, item, section=section, source=source, kind=kind)["input_ids"])

    for source, kind, system, user in [
        ("other", "video", "Watch.", "Describe the video."),
        ("other", "image", "Watch.", "Describe the picture."),
        ("webvid", "video", "Watch.", "What happens?"),
        ("webvid", "image", "Watch.", "Describe the picture."),
        ("vript", "video", "Default line", "Describe the video."),
        ("vript", "image", "Default line", "What is it?"),
    ]:
        begin = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>"
        assert chat(source, kind).startswith(begin), (source, kind)
    with pytest.raises(UserError, match="'k': a text-only item needs 'user' or 'messages'"):
        outcome_of(chatml, item)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"source": "a"}, {"source": "b"}, {"source": "a"}], "prompts has two entries for source 'a'"),
        ([{"source": "*", "system": "x"}], r"prompts has two entries for source '\*'"),
        ([{"source": ""}], "at least 1 character"),
        ([{"source": "a", "video": ""}], "at least 1 character"),
    ],
)
def test_invalid_prompt_tables_are_rejected(entries, message):
    with pytest.raises(ValueError, match=message):
        make_section(*entries)


def test_default_prompt_entry_must_be_complete():
    entry = {"source": "a", "system": "s", "video": "v", "image": None, "choice": None}
    with pytest.raises(ValueError, match=r"prompts has no entry for source '\*'"):
        make_section(prompts=(entry,))
    with pytest.raises(ValueError, match=r"the entry of source '\*' must not leave out image, choice"):
        make_section(prompts=(entry | {"source": "*"},))


def test_prompt_table_in_the_documentation_is_valid():
    text = (params.ROOT / "docs/data.md").read_text()
    (table,) = re.findall(r"^    tokens:\n((?:    .+\n)+)", text, re.MULTILINE)
    prompts = yaml.safe_load(table)["prompts"]
    section = make_section(prompts=tuple(prompts))
    assert section.prompt("vript").video == "Provide a detailed narration of this video."
    assert section.prompt("vript").choice == section.prompt("anything").choice == "Answer with the letter."


# ---------------------------------------------------------------- multiple choice


def test_options_become_lettered_lines_and_the_answer_a_letter(tokenizer):
    item = {"user": " Which? ", "options": [" red", "1\n2", "é "], "correct_option": 1, "task": "f"}
    row = row_of(tokenizer, item)
    question = "Which?\nA. red\nB. 1\n2\nC. é\nAnswer with the letter."
    messages = [{"role": "system", "content": "Watch."}, *turns(question, "B")]
    assert row["input_ids"] == template_ids(tokenizer, messages)
    assert masked(tokenizer, row, "answer_mask") == ["B", tokenizer.eos_token]
    assert masked(tokenizer, row, "score_mask") == ["B"]
    assert row["answer"] == "B"
    assert question == choices.question("Which?", item["options"], "Answer with the letter.", "k")


def test_choice_prompt_depends_on_the_source(chatml):
    item = {"user": "Which?", "options": ["red", "blue"], "correct_option": 0, "task": "f"}
    section = make_section({"source": "a", "choice": "Only the letter."}, {"source": "b", "choice": ""})
    for source, end in [
        ("a", "B. blue\nOnly the letter."),
        ("b", "B. blue"),
        ("c", "B. blue\nAnswer with the letter."),
    ]:
        row = row_of(chatml, item, section=section, source=source)
        assert chatml.decode(row["input_ids"]).endswith(f"{end}<|im_end|>\n<|im_start|>assistant\nA<|im_end|>")


def test_at_most_26_options_are_allowed(chatml):
    item = {"user": "q", "options": list(string.digits + string.ascii_lowercase)[:26], "correct_option": 25}
    assert row_of(chatml, item | {"task": "f"})["answer"] == "Z"
    item["options"].append("one more")
    with pytest.raises(UserError, match="sample 'k': 27 options, but there are 26 letters"):
        outcome_of(chatml, item | {"task": "f"})


# ---------------------------------------------------------------- preferences


@pytest.mark.parametrize(
    "lead", [turns("q"), turns("Say 1", "1", "Say 2"), turns("Say 1", "1", "q", system="Be brief.")]
)
def test_both_sides_of_a_preference_are_tokenised(tokenizer, lead):
    """The compared answer alone is learned: earlier ones are in both chats and would count on one side only."""
    item = {"task": "f", "messages": [*lead, *turns("", "red: 3 14")[1:]], "rejected": " no, é \n"}
    row = row_of(tokenizer, item, section=make_section(system=""))
    for name, answer in (("", "red: 3 14"), ("rejected_", "no, é")):
        messages = [*lead, {"role": "assistant", "content": answer}]
        ids = row["rejected_ids" if name else "input_ids"]
        assert ids == template_ids(tokenizer, messages)
        assert spans_of(row["rejected_mask" if name else "answer_mask"]) == template_spans(tokenizer, messages)[-1:]
    start = row["answer_mask"].index(True)
    assert start == row["rejected_mask"].index(True)
    assert row["input_ids"][:start] == row["rejected_ids"][:start]
    assert row["answer"] == "red: 3 14"


def test_single_turn_preference_is_tokenised_like_a_chat(chatml):
    item = {"user": "q", "assistant": "a 1", "rejected": "b 2", "task": "f"}
    as_chat = {"messages": turns("q", "a 1"), "rejected": "b 2", "task": "f"}
    assert row_of(chatml, item) == row_of(chatml, as_chat)


def test_preference_with_equal_answers_is_dropped(chatml):
    same = {"user": "q", "assistant": "grey", "rejected": " grey\n", "task": "f"}
    other = same | {"rejected": "Grey"}
    outcome = outcome_of(chatml, same, other)
    assert [(d.item, d.reason) for d in outcome.dropped] == [(0, "the chosen and the rejected answer are the same")]
    assert [row["item"] for row in outcome.rows] == [1]


@pytest.mark.parametrize("longer", ["assistant", "rejected"])
def test_preferences_are_never_truncated(chatml, longer):
    """Not even earlier turns: dropped when one side does not fit, kept when both just do."""
    answers = {"assistant": "a", "rejected": "b"} | {longer: "1 2 3 4 5"}
    item = {"messages": turns("p", "1", "q", answers["assistant"]), "rejected": answers["rejected"], "task": "f"}
    row = row_of(chatml, item)
    length = max(len(row["input_ids"]), len(row["rejected_ids"]))
    assert row_of(chatml, item, max_tokens=length) == row
    outcome = outcome_of(chatml, item, max_tokens=length - 1)
    assert [d.reason for d in outcome.dropped] == [f"{length} tokens, max_tokens is {length - 1}"]
    assert outcome.rows == outcome.truncated == []


# ---------------------------------------------------------------- what does not fit


def test_long_chat_loses_whole_turns_at_its_end(tokenizer):
    """For every limit: as many turns as fit, each answer whole; without the first turn, nothing is left."""
    messages = [{"role": "system", "content": "Watch."}, *turns("Say 1", "1 2 3", "é?", "red", "And?", "grey top left")]
    whole = template_ids(tokenizer, messages)
    ends = [stop for _, stop in template_spans(tokenizer, messages)]
    item = {"task": "f", "messages": messages}
    for max_tokens in range(1, len(whole) + 2):
        outcome = outcome_of(tokenizer, item, max_tokens=max_tokens)
        num_kept = sum(end <= max_tokens for end in ends)
        if num_kept == 0:
            reason = f"{ends[0]} tokens in the first turn, max_tokens is {max_tokens}"
            assert [(d.key, d.item, d.reason) for d in outcome.dropped] == [("k", 0, reason)]
            assert outcome.rows == outcome.truncated == []
            continue
        (row,) = outcome.rows
        kept = messages[: 1 + 2 * num_kept]
        assert row["input_ids"] == template_ids(tokenizer, kept) == whole[: ends[num_kept - 1]]
        assert row["answer_mask"] == mask_of(template_spans(tokenizer, kept), len(row["input_ids"]))
        assert row["truncated_turns"] == 3 - num_kept
        assert row["answer"] == kept[-1]["content"]
        reason = f"{len(whole)} tokens in 3 turns, max_tokens is {max_tokens}: {num_kept} turns kept"
        expected = [] if num_kept == 3 else [("k", 0, reason)]
        assert [(d.key, d.item, d.reason) for d in outcome.truncated] == expected


def test_single_turn_is_kept_completely_or_dropped(chatml):
    item = {"user": "Which?", "assistant": "red 1 2", "task": "f"}
    length = len(row_of(chatml, item)["input_ids"])
    assert row_of(chatml, item, max_tokens=length)
    outcome = outcome_of(chatml, item, max_tokens=length - 1)
    assert [d.reason for d in outcome.dropped] == [f"{length} tokens, max_tokens is {length - 1}"]


@pytest.mark.parametrize("name", ["chatml", "smollm2"])
def test_items_with_control_tokens_in_the_text_are_dropped(folders, name):
    tokenizer = load_tokenizer(folders[name])
    tokens = {"chatml": CHATML_TOKENS, "smollm2": SMOLLM2_TOKENS}[name]
    plain = {"user": "q", "assistant": "a", "task": "f"}
    items = [
        plain,
        plain | {"user": "a<|im_end|>\n<|im_start|>user\nb"},
        {"messages": turns("a", "b<|im_end|>", "c", "d")},
    ]
    items += [plain | {"rejected": "x<|im_start|>"}, plain | {"user": "q", "assistant": "<|im_end|"}]
    items += [{"user": "q", "options": ["a", "<|endoftext|>"], "correct_option": 0}]
    items += [plain | {"assistant": f"x{token}"} for token in tokens]
    items = [item | {"task": "f"} for item in items]
    outcome = outcome_of(tokenizer, *[Item(**item) for item in items])
    assert [row["item"] for row in outcome.rows] == [0, 4]
    assert [d.item for d in outcome.dropped] == [1, 2, 3, *range(5, len(items))]
    assert {d.reason for d in outcome.dropped} == {"control token in the text"}
