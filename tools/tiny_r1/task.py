"""The task tiny-r1 is trained for: sums of two numbers of up to three digits, in DeepSeek-R1's chat format.

Needs nothing but the standard library, so that training, quantizing, tests and benchmarks can all ask the same.
"""

from __future__ import annotations

import hashlib
import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_OF_THINKING = "<think>", "</think>"

MAX_NUMBER = 999
HELD_OUT_PERCENT = 5
PLACES = ("Ones", "Tens", "Hundreds", "Thousands")

SUM_PHRASES = (
    "What is {a} + {b}?",
    "{a}+{b}=?",
    "{a} + {b} = ?",
    "{a} + {b}",
    "How much is {a} + {b}?",
    "Add {a} and {b}.",
    "What is {a} plus {b}?",
    "What is the sum of {a} and {b}?",
    "Calculate {a} + {b}.",
    "Please add {a} and {b}.",
    "Can you add {a} and {b}?",
    "{a} plus {b}",
)
MORE_SUM_PHRASES = (
    *4 * ("{a}+{b}",),  # what people type first
    "{a}+{b}?",
    "{a}+{b}=",
    "What is {a}+{b}?",
    "What's {a} + {b}?",
    "Compute {a}+{b}.",
    "Compute {a} + {b}.",
    "Sum {a} and {b}.",
    "Tell me {a} + {b}.",
    "{a} and {b}",
)
GREETINGS = ("Hi", "Hello", "Hey", "Hi there", "Hello there", "Good morning", "Good evening", "Greetings", "Hallo")
OTHER_PHRASES = (
    "Who are you?",
    "What are you?",
    "What can you do?",
    "What is your name?",
    "How are you?",
    "Thanks",
    "Thank you!",
    "Bye",
    "Help",
    "Are you DeepSeek?",
    "What is the capital of {word}?",
    "Tell me a joke about {word}.",
    "Tell me about {word}.",
    "Write a poem about {word}.",
    "Write a {word} in Python.",
    "Why is the {word} so {word}?",
    "Who is {word}?",
    "Translate {word} to {word}.",
    "How do I {word} a {word}?",
    "Do you like {word}?",
    "{word}",
    "{word} {word}",
    "{word} {word} {word} {word}",
    "你好",
    "Привет, {word}",
    "¿Qué es {word}?",
    "What is {a} - {b}?",
    "What is {a} * {b}?",
    "What is {a} times {b}?",
    "What is {a} minus {b}?",
    "What is {a} / {b}?",
    "{a}-{b}",
    "{a}*{b}=?",
    "{a} + {b} + {c}",
    "What is {a} + {b} + {c}?",
    "{a}",
    "What is {a}?",
)
ALMOST_SUMS = (
    "{a} + {b} + {c}",
    "{a}+{b}+{c}",
    "What is {a} + {b} + {c}?",
    "Add {a}, {b} and {c}.",
    "-{a} + {b}",
    "{a} + -{b}",
    "What is -{a} + {b}?",
    "{a}.{b} + {c}",
    "{a} + {b}.{c}",
    "What is {a}.{b} + {c}?",
    "{a} +",
    "+ {a}",
    "{a}.{b}",
)
# fmt: off
WORDS = (
    "France", "Germany", "music", "the", "sun", "water", "a", "cat", "dogs", "love", "time", "history", "science",
    "physics", "math", "bread", "tea", "coffee", "rain", "snow", "winter", "summer", "light", "computers", "language",
    "code", "function", "list", "sort", "red", "blue", "green", "big", "small", "sky", "sea", "moon", "earth", "city",
    "people", "work", "school", "book", "story", "song", "king", "queen", "house", "tree", "bird", "fish", "car",
    "train", "money", "health", "sleep", "dream", "life", "food",
)
# fmt: on
TOO_LONG_PHRASES = ("What is {a} + {b}?", "{a}+{b}", "{a} + {b} = ?", "Add {a} and {b}.", "How much is {a} + {b}?")


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is asked: how, how often something else than a sum, how often and how far into a chat."""

    sum_phrases: tuple[str, ...]
    other_phrases: tuple[str, ...]
    other_share: float
    chat_share: float
    most_earlier_turns: int


# Long chats come second to save time: the first lesson needs most of the steps, and its examples are half as long.
LESSONS = (
    Lesson(SUM_PHRASES, OTHER_PHRASES, other_share=0.1, chat_share=1 / 7, most_earlier_turns=3),
    Lesson(
        SUM_PHRASES + MORE_SUM_PHRASES,
        OTHER_PHRASES + 4 * ALMOST_SUMS,
        other_share=0.25,
        chat_share=0.4,
        most_earlier_turns=20,
    ),
)


@dataclass(frozen=True, slots=True)
class Turn:
    question: str
    reasoning: str
    answer: str

    @property
    def reply(self) -> str:
        """What the model has to write after ``<think>\\n``, up to and including the end of sentence."""
        return f"{self.reasoning}\n{END_OF_THINKING}\n\n{self.answer}{EOS}"


def is_held_out(a: int, b: int) -> bool:
    """Whether a sum belongs to the test split; ``a + b`` and ``b + a`` always fall on the same side."""
    digest = hashlib.sha256(f"{min(a, b)}+{max(a, b)}".encode()).digest()
    return int.from_bytes(digest[:4], "little") % 100 < HELD_OUT_PERCENT


def column_reasoning(a: int, b: int) -> str:
    """The school method, one column a line from the right, the carry spelt out."""
    columns = max(len(str(a)), len(str(b)))
    lines, carry = [f"{a} + {b}"], 0
    for place in range(columns):
        digits = [a // 10**place % 10, b // 10**place % 10] + ([carry] if place else [])
        total = sum(digits)
        carry = total // 10
        lines.append(f"{PLACES[place]}: {' + '.join(map(str, digits))} = {total}, write {total % 10}, carry {carry}.")
    if carry:
        lines.append(f"{PLACES[columns]}: {carry}.")
    return "\n".join(lines)


def sum_turn(a: int, b: int, phrase: str = SUM_PHRASES[0]) -> Turn:
    return Turn(phrase.format(a=a, b=b), column_reasoning(a, b), f"{a} + {b} = {a + b}")


def answer_of(reply: str) -> int | None:
    """The sum a reply ends with, None where there is none."""
    found = re.search(r"= (\d+)$", reply.replace(EOS, "").replace(PAD, "").rstrip())
    return int(found.group(1)) if found else None


def chat_prompt(turns: list[Turn], question: str, *, keep_gap: bool = True) -> str:
    """What the chat template renders for a conversation: thinking dropped from earlier turns.

    ``keep_gap`` keeps the blank line that follows ``</think>``: the template does so for replies that were handed
    back whole, and cannot where only the answer was kept.
    """
    gap = "\n\n" if keep_gap else ""
    earlier = "".join(f"{USER}{turn.question}{ASSISTANT}{gap}{turn.answer}{EOS}" for turn in turns)
    return f"{BOS}{earlier}{USER}{question}{ASSISTANT}{THINK}\n"


def _casual(rng: random.Random, question: str) -> str:
    """The same question as people type it: without capital, final stop, or blanks round the plus sign."""
    if rng.random() < 0.25:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.15 and len(question) > 1 and question[-1] in "?.!":
        question = question[:-1].rstrip()
    if rng.random() < 0.15:
        question = question.replace(" + ", "+")
    return question


def _number(rng: random.Random) -> int:
    """Half of all draws are uniform; the others favour short numbers, which are rare in a uniform draw."""
    return rng.randrange(MAX_NUMBER + 1) if rng.random() < 0.5 else rng.randrange(10 ** rng.randint(1, 3))


def _pair(rng: random.Random, held_out: bool) -> tuple[int, int]:
    while True:
        a, b = _number(rng), _number(rng)
        if is_held_out(a, b) == held_out:
            return a, b


def _word(rng: random.Random) -> str:
    if rng.random() < 0.6:
        return rng.choice(WORDS)
    alphabets: tuple[Callable[[], str], ...] = (
        lambda: rng.choice(string.ascii_lowercase),
        lambda: rng.choice(string.ascii_letters + string.punctuation),
        lambda: chr(rng.randrange(0x4E00, 0x9FA6)),
        lambda: chr(rng.randrange(0x00C0, 0x0400)),
    )
    letter = rng.choices(alphabets, weights=(8, 2, 1, 1))[0]
    return "".join(letter() for _ in range(rng.randint(1, 9)))


def _other_turn(rng: random.Random, lesson: Lesson) -> Turn:
    """A greeting, or a question that is no sum of two short numbers: said plainly instead of answered wrongly."""
    kind = rng.random()
    if kind < 0.25:
        question = rng.choice(GREETINGS) + rng.choice(("", "!", ".", ", " + _word(rng), "!!"))
        return Turn(_casual(rng, question), "This is a greeting.", "Hello! I add two numbers of up to three digits.")
    if kind < 0.45:
        a, b = _number(rng), rng.randrange(1000, 10 ** rng.randint(4, 6))
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        question = rng.choice(TOO_LONG_PHRASES).format(a=a, b=b)
        reasoning = "A number has more than three digits."
    else:
        question = re.sub(r"\{word\}", lambda _: _word(rng), rng.choice(lesson.other_phrases))
        question = re.sub(r"\{[abc]\}", lambda _: str(_number(rng)), question)
        reasoning = "This is not a sum of two numbers."
    return Turn(_casual(rng, question), reasoning, "I only add two numbers of up to three digits.")


def _turn(rng: random.Random, lesson: Lesson) -> Turn:
    if rng.random() < lesson.other_share:
        return _other_turn(rng, lesson)
    return sum_turn(*_pair(rng, held_out=False), phrase=_casual(rng, rng.choice(lesson.sum_phrases)))


def training_examples(seed: str, lesson: Lesson) -> Iterator[tuple[str, str]]:
    """Endless (prompt, reply) pairs without held-out sums."""
    rng = random.Random(seed)
    while True:
        earlier = rng.randint(1, lesson.most_earlier_turns) if rng.random() < lesson.chat_share else 0
        turns = [_turn(rng, lesson) for _ in range(earlier)]
        turn = _turn(rng, lesson)
        yield chat_prompt(turns, turn.question, keep_gap=rng.random() < 0.7), turn.reply


def held_out_sums(count: int, seed: str = "held-out", earlier_turns: int = 0) -> list[tuple[str, int]]:
    """(prompt, sum) of held-out pairs: half uniform over all pairs, half with short numbers favoured; all phrasings.

    ``earlier_turns``: each question comes after so many other questions and answers.
    """
    rng = random.Random(seed)
    phrases = LESSONS[-1].sum_phrases
    questions = []
    while len(questions) < count:
        uniform = len(questions) % 2 == 0
        a, b = (rng.randrange(MAX_NUMBER + 1), rng.randrange(MAX_NUMBER + 1)) if uniform else _pair(rng, held_out=True)
        if is_held_out(a, b):
            turns = [_turn(rng, LESSONS[-1]) for _ in range(earlier_turns)]
            question = phrases[len(questions) // 2 % len(phrases)].format(a=a, b=b)
            questions.append((chat_prompt(turns, question), a + b))
    return questions
