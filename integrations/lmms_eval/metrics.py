"""How right an answer is: letters of multiple choice, VSI-Bench's mean relative accuracy, exact match of short text."""

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from fractions import Fraction
from string import ascii_uppercase
from typing import Literal, NamedTuple

Metric = Literal["choice", "mra", "exact"]

_ASCII = {0x2212: "-", 0x2013: "-", 0x2014: "-", 0xD7: "x", 0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}
"""Minus sign, dashes, times and typographic quotes."""
_NUMBER_WORDS: str = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|"
    "eighteen|nineteen|twenty"
)
_NUMBER_WORD = re.compile(rf"\b({_NUMBER_WORDS})\b", re.IGNORECASE)
_DIGITS = re.compile(r"[-+]?\.?[0-9](?:[0-9.,/:^]*[0-9])?(?:[eE][-+]?[0-9]+)?")
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_JOINER = re.compile(r"\s*(?:[-/,x]|to|or|and)\s*")
_STATEMENT = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+(?:is|would be|should be))?(?:\s*[:=])?\s*(?:\b(?:option|choice)\b)?\s*", re.I
)
_LABEL = re.compile(r"\(?([a-z])(?:[).:]|\s+-)", re.I)
_ANOTHER = re.compile(r"\s*(?:,|/|&|and|or)\s*\(?[A-Z]\b\)?(?!')")
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:can)?not|n't|\bnever|\bneither|\bnor|\bthan|\bexcept|\binstead of|\bunlike)\s+"
    r"(?:(?:the|an?|be|option|choice|answer|letter)\s+)*\(?$",
    re.I,
)
_DENIED_AFTER = re.compile(r"\)?\s*(?:is|was|are|can|could)(?:n't|\s*not|\s+(?:wrong|incorrect|false|ruled out))", re.I)
_ARTICLE = re.compile(r"\s+(?!(?:and|or|is|was|because|since|as|but|not|seems)\b)[a-z]")


def score(reply: str, answer: str | float, metric: Metric, options: Sequence[str] = ()) -> float | None:
    """What a reply is worth, in [0, 1]; None, which counts as 0, where no letter, number or text can be read from it.

    Args:
        reply: the generated text.
        answer: a letter for "choice" (accuracy), a number above 0 for "mra", text for "exact", where a number is equal
            in whatever form a reply gives it.
        options: the texts of the choices, without letters.
    """
    if metric == "mra":
        number = number_in(reply)
        return None if number is None else mean_relative_accuracy(number, float(answer))
    if metric == "choice":
        letter = choice_letter(reply, options)
        return None if letter is None else float(letter == answer)
    return float(ExactAnswers.of([str(answer)]).has(reply)) if _plain(_answer_part(reply)) else None


class ExactAnswers(NamedTuple):
    """Answers that a reply may match exactly: texts as `exact_match` compares them, and those that are numbers, which
    are equal in whatever form a reply gives them."""

    texts: frozenset[str]
    numbers: frozenset[float | None]

    @classmethod
    def of(cls, answers: Iterable[str]) -> "ExactAnswers":
        """Of these answers."""
        known = [*answers]
        numbers = frozenset(number_in(one) for one in known if _NUMBER.fullmatch(one.strip()))
        return cls(frozenset(map(_plain, known)), numbers - {None})

    def has(self, reply: str) -> bool:
        """Whether a reply is one of them."""
        return _plain(_answer_part(reply)) in self.texts or number_in(reply) in self.numbers


def mean_relative_accuracy(predicted: float, answer: float) -> float:
    """Mean relative accuracy of a number ("Thinking in Space", arXiv 2412.14171, the metric of VSI-Bench).

    MRA = 1/10 sum over theta in {0.50, 0.55, ..., 0.95} of [|predicted - answer| / answer < 1 - theta], computed on the
    numbers as they are written in decimals, without rounding. The code released with the benchmark has <= in place of
    <, in floating point: an error of exactly 5%, 10%, ..., 50% can count for 0.1 more there.

    Raises:
        ValueError: `answer` is not above 0, where no relative error exists, or a number is not finite.
    """
    if not (math.isfinite(answer) and answer > 0 and math.isfinite(predicted)):
        raise ValueError(
            f"mean relative accuracy needs finite numbers and an answer above 0, got predicted {predicted} and answer "
            f"{answer}: compare such answers by exact match"
        )
    exact = Fraction(str(answer))
    error = abs(Fraction(str(predicted)) - exact) / exact
    return sum(error < 1 - Fraction(k, 20) for k in range(10, 20)) / 10


def exact_match(reply: str, answer: str) -> float:
    """1.0 where both are equal up to case, space, outer quotes and brackets, and punctuation at the end, else 0.0."""
    return float(_plain(_answer_part(reply)) == _plain(answer))


def number_in(reply: str) -> float | None:
    """The number that a reply gives: the last that follows "answer is", else the one at its start, else the only one.

    Digits with thousands separators, decimals and exponents, and the words zero to twenty; units and what stands in
    brackets after a number are passed over. None where there is none, or no saying which: ranges, fractions, decimal
    commas, several numbers in prose.
    """
    text = _NUMBER_WORD.sub(
        lambda word: str(_NUMBER_WORDS.split("|").index(word[0].lower())), _stated(_answer_part(reply))
    )
    outside = re.sub(r"\([^)]*\)", " ", text)
    text = outside if _DIGITS.search(outside) else text
    found = list(_DIGITS.finditer(text))
    if not found:
        return None
    first_opens = not re.search(r"[^\W\d_]", text[: found[0].start()])
    if len(found) > 1:
        between = text[found[0].end() : found[1].start()] + found[1][0][:1].strip(".0123456789")
        several = len({number[0] for number in found}) > 1
        if _JOINER.fullmatch(between) or (several and not first_opens):
            return None
    value = float(found[0][0].replace(",", "")) if _NUMBER.fullmatch(found[0][0]) else math.nan
    return value if math.isfinite(value) else None


def choice_letter(reply: str, options: Sequence[str]) -> str | None:
    """The letter that a reply to a multiple-choice question chooses.

    What follows the last "answer is", "answer:" or "option" is read first, then all of the reply: a bare letter, an
    option's text, a label at the start ("B.", "(B)", "B) blue"), the only letter that is named and not denied
    ("C, not B"), the only option whose text is. None where those are none or several.
    """
    whole = _answer_part(reply)
    return _letter(_stated(whole), options) or _letter(whole, options)


def _letter(text: str, options: Sequence[str]) -> str | None:
    letters = ascii_uppercase[: len(options)]
    if (bare := re.fullmatch(r"\W*([a-z])\W*", text, re.I)) and bare[1].upper() in letters:
        return bare[1].upper()
    for letter, option in zip(letters, options, strict=True):
        if _plain(option) == _plain(text):
            return letter
    if (label := _LABEL.match(text)) and label[1].upper() in letters:
        return None if _ANOTHER.match(text, label.end()) else label[1].upper()
    named = {
        lone[1]
        for lone in re.finditer(rf"(?<![\w'])([{letters}])(?![\w'])", text)
        if not _denied(text, lone.start(), lone.end()) and not (lone[1] in "AI" and _ARTICLE.match(text, lone.end()))
    }
    named = named or _options_named(text, options)
    return named.pop() if len(named) == 1 else None


def _options_named(text: str, options: Sequence[str]) -> set[str]:
    """Letters of the options whose text stands in `text`, not denied; of "left" and "front-left" the longer."""
    letters: set[str] = set()
    for letter, option in sorted(zip(ascii_uppercase, options, strict=False), key=lambda pair: -len(pair[1])):
        pattern = re.compile(rf"(?<!\w){re.escape(option)}(?!\w)", re.I)
        if any(not _denied(text, place.start(), place.end()) for place in pattern.finditer(text)):
            letters.add(letter)
        text = pattern.sub(lambda place: "\0" * len(place[0]), text)
    return letters


def _denied(text: str, start: int, end: int) -> bool:
    return bool(_DENIED_BEFORE.search(text[:start]) or _DENIED_AFTER.match(text, end))


def _answer_part(reply: str) -> str:
    """A reply without its <think> block and markup; only the inside of the last <answer> or \\boxed{} if it has one."""
    reply = re.sub(r"<think>.*?(?:</think>|$)", " ", reply.translate(_ASCII), flags=re.DOTALL | re.I)
    for pattern in (r"<answer>(.*?)(?:</answer>|$)", r"\\boxed\{([^{}]*)\}"):
        found = re.findall(pattern, reply, flags=re.DOTALL | re.I)
        reply = found[-1] if found else reply
    return re.sub(r"[*`_$]", "", reply).strip()


def _stated(text: str) -> str:
    """What follows the last statement of the answer; all of the text where there is none."""
    statements = list(_STATEMENT.finditer(text))
    return text[statements[-1].end() :] if statements else text


def _plain(text: str) -> str:
    text = " ".join(unicodedata.normalize("NFKC", text.translate(_ASCII)).casefold().split())
    return text.rstrip(".,;:!?").strip("\"'()[]{}").rstrip(".,;:!?")
