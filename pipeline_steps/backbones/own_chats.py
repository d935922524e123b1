"""Chats in a language model's own words: its answers to short questions, in its own format, for `sources.chat.path`.

    python -m pipeline_steps.backbones.own_chats --language FOLDER --output chats.jsonl [--questions FILE.txt]

Training a part of the samples on them keeps what a pretrained language model can say while it learns to see, where no
data set of chats is at hand (self-distillation; with the Hub, `smoltalk` has real ones). The questions are QUESTIONS
about every topic of TOPICS, or the lines of --questions. Answers are greedy; one that has not ended after --max-tokens
is left out, and the count is printed. Every batch of answers is kept in .scratch/own_chats until all are there: after a
kill, the same command in the same folder continues, and writes the same bytes.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline_steps.common.device import choose_device
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import locked_scratch, remove_folder, write_json, write_text
from pipeline_steps.common.hashing import fingerprint, sha256_file
from pipeline_steps.monitoring.progress import progress_bar

QUESTIONS = (
    "What is {topic}?",
    "Tell me one fact about {topic}.",
    "Write a short sentence about {topic}.",
    "Explain {topic} to a child in one sentence.",
    "Which three words go with {topic}?",
    "Why do people care about {topic}?",
    "Ask me a question about {topic}.",
    "What do I need to know about {topic}? Answer in a few words.",
)
TOPIC_LIST = (
    "music, poetry, history, gravity, sleep, money, friendship, rain, summer, winter, thunder, the ocean, mountains, "
    "deserts, rivers, volcanoes, islands, the moon, the sun, stars, planets, light, sound, heat, ice, water, air, "
    "fire, electricity, magnets, energy, time, space, numbers, fractions, geometry, triangles, circles, maps, "
    "languages, grammar, spelling, letters, stories, fairy tales, jokes, dreams, memory, learning, school, homework, "
    "teachers, libraries, science, medicine, doctors, health, exercise, swimming, running, dancing, singing, "
    "painting, drawing, colours, theatre, films, photography, newspapers, radio, the internet, computers, "
    "programming, robots, engines, factories, farming, cooking, breakfast, dinner, restaurants, holidays, birthdays, "
    "travel, cities, villages, houses, bridges, roads, railways, airports, harbours, trade, banks, taxes, laws, "
    "elections, governments, peace, kings and queens, Ancient Rome, Ancient Egypt, Europe, Africa, Asia, Australia, "
    "Canada, Brazil, Japan, India, London, Paris, New York, democracy, honesty, courage, patience, luck, fear, "
    "happiness, sadness, anger, politeness"
)
MAX_TOKENS = 64  # of an answer
LIBRARIES = ("torch", "transformers")  # they determine the answers
TOPICS = tuple(TOPIC_LIST.split(", "))


def questions(path: Path | None) -> list[str]:
    """The built-in questions, or the lines of a text file. UserError if there are none."""
    if path is None:
        return [question.format(topic=topic) for topic in TOPICS for question in QUESTIONS]
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}). Save the file as UTF-8.") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}). --questions is a text file with a question per line."
        ) from None
    if not lines:
        raise UserError(f"{path}: no questions. Write one per line.")
    return list(dict.fromkeys(lines))


@torch.inference_mode()
def answer(model, tokenizer, asked: list[str], max_tokens: int, batch_size: int, kept: Path) -> list[tuple[str, str]]:
    """[(question, its greedy answer)] in the order of `asked`, without answers that are empty or did not end.

    kept: a folder with a file for every batch that is answered; those that are there are not answered again.
    """
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in asked
    ]
    order = sorted(range(len(asked)), key=lambda number: len(prompts[number]))  # little padding
    found = {}
    for start in progress_bar("answers", range(0, len(order), batch_size), unit="batch"):
        path = kept / f"{start:06d}.json"
        if path.exists():
            found |= dict(json.loads(path.read_text(encoding="utf-8")))
            continue
        numbers = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[number] for number in numbers], padding=True, add_special_tokens=False, return_tensors="pt"
        ).to(model.device)
        tokens = model.generate(
            **batch, do_sample=False, max_new_tokens=max_tokens, pad_token_id=tokenizer.pad_token_id
        )
        answers = {}
        for number, row in zip(numbers, tokens[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            if tokenizer.eos_token_id in row:
                text = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)]).strip()
                if text:
                    answers[number] = text
        write_json(path, list(answers.items()))
        found |= answers
    return [(asked[number], found[number]) for number in sorted(found)]


def write_chats(
    language: Path,
    output: Path,
    questions_file: Path | None = None,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = 64,
    device: str = "auto",
) -> int:
    """Write the chats to `output`, a line each; returns how many. UserError if no answer ended."""
    device = choose_device(device, "--device")
    tokenizer = AutoTokenizer.from_pretrained(language, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(language, dtype="auto" if device == "cuda" else torch.float32)
    asked = questions(questions_file)
    files = [path for path in sorted(language.rglob("*")) if path.is_file()]
    contents = [(str(path.relative_to(language)), sha256_file(path)) for path in files]
    libraries = [version(name) for name in LIBRARIES]
    work = fingerprint(contents, asked, max_tokens, batch_size, str(model.dtype), device, libraries, Path(__file__))
    with locked_scratch("own_chats", work) as (kept, _):
        chats = answer(model.to(device).eval(), tokenizer, asked, max_tokens, batch_size, kept)
        if not chats:
            raise UserError(f"none of {len(asked)} answers ended within {max_tokens} tokens: raise --max-tokens.")
        lines = [
            json.dumps(
                {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text}]},
                ensure_ascii=False,
            )
            for question, text in chats
        ]
        write_text(output, "\n".join(lines) + "\n")
        remove_folder(kept)
    print(
        f"{output}: {len(chats)} chats; {len(asked) - len(chats)} answers were empty or longer than {max_tokens} tokens"
    )
    return len(chats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", type=Path, required=True, help="folder of a language model with a chat template")
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl to write")
    parser.add_argument("--questions", type=Path, help="text file with a question per line (default: built in)")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="per answer (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args()
    if not options.language.is_dir():
        raise UserError(f"{options.language}: no such folder. `make pretrained` builds a language model.")
    write_chats(
        options.language, options.output, options.questions, options.max_tokens, options.batch_size, options.device
    )


if __name__ == "__main__":
    run_main(main)
