"""Questions about the text itself: a word left out, what comes first, which sentence, whose address; definitions."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from longllm.synthesis.offline_draft import Turn, Unfit
from longllm.synthesis.offline_texts import clean

# Words in a sentence that may be quoted whole, and draws before a text is given up as having too few.
_SHORT, _LONG = 6, 32
_DRAWS = 40
_QUOTED = 12

_CLOZE_ASKS = (
    'One word is missing from this quotation: "{quote}" Which word is it?',
    'Fill the gap as in the text: "{quote}"',
    'Which word of the text belongs in the gap? "{quote}"',
    'The text reads "{quote}" What stands where the line is?',
)
_CLOZE_TELLS = ('The missing word is "{word}".', "{word}", '"{word}".', 'The text has "{word}" there.')
_NEXT_ASKS = (
    'Which sentence comes right after "{quote}"?',
    'Quote the sentence that follows "{quote}"',
    'What does the text say directly after "{quote}"?',
)
_HOLDING_ASKS = (
    'Quote the sentence with the words "{quote}".',
    'In which sentence do the words "{quote}" stand?',
    'Repeat the whole sentence that contains "{quote}".',
)
_ON_ASKS = ('How does the text continue after "{quote}"?', 'What are the next words after "{quote}"?')
_ORDER_ASKS = (
    'Which of the two stands nearer to the beginning of the text, "{a}" or "{b}"?',
    'Two passages: "{a}" and "{b}". Which one is met first in the text?',
    'Does "{a}" come before or after "{b}" in the text?',
)
_WHO_ASKS = (
    'Whose words are these: "{quote}"?',
    'Whose address contains the sentence "{quote}"?',
    'Who spoke the words "{quote}"?',
)
_WHO_TELLS = ("{president}.", "{president}, in {year}.", "It was {president} who said it.", "{president} said this.")
_YEAR_ASKS = (
    'In what year did someone say "{quote}"?',
    'From what year is the address with the sentence "{quote}"?',
    'What is the year of the address that says "{quote}"?',
)
_YEAR_TELLS = ("{year}.", "In {year}.", "It was said in {year}, by {president}.", "The address of {year} says it.")
_BY_ASKS = ("Which president gave the address of {year}?", "By whom is the address of {year}?")
_EARLIER_ASKS = (
    "Which address was given earlier, that of {a} or that of {b}?",
    "Who of the two gave an address first, {a} or {b}?",
)
_EARLIER_TELLS = ("That of {president}, in {year}.", "{president}, in {year}.")
_MEANING_ASKS = (
    'What does the word "{word}" mean?',
    "Define {word} in one sentence.",
    'Give a short definition of "{word}".',
    "What is the meaning of {word}?",
)
_MEANING_TELLS = ('"{word}" means: {gloss}.', "{Gloss}.", "It means {gloss}.")


def cloze(rng: random.Random, pieces: Sequence[str], at: int, asks: Sequence[str] = _CLOZE_ASKS) -> Turn:
    """Ask for a word or number that is left out of a sentence.

    Raises:
        Unfit: the sentence has none that would do.
    """
    words = clean(pieces[at]).split()
    fit = [i for i in range(2, len(words) - 1) if re.fullmatch(r"[a-z]{5,}|\d[\d,.]*\d", words[i])]
    if not fit or len(words) < _SHORT or '"' in pieces[at]:
        raise Unfit("no word to leave out")
    numbers = [i for i in fit if words[i][0].isdigit()]
    gap = rng.choice(numbers or fit)
    before, after = words[max(0, gap - 9) : gap], words[gap + 1 : gap + 9]
    quote = " ".join([*before, "____", *after])
    return Turn(
        rng.choice(asks).format(quote=quote),
        rng.choice(_CLOZE_TELLS).format(word=words[gap]),
        (at,),
        # Either side alone must lead to the word, unless it is too short to.
        tuple(" ".join(side) for side in (before, after) if len(side) >= 4) or (" ".join(words),),
    )


def recall(rng: random.Random, pieces: Sequence[str], at: int) -> Turn:
    """Ask for a sentence by some of its words, for the one after it, or for how it goes on.

    Raises:
        Unfit: the sentence is too short or too long to be quoted.
    """
    words = _quotable(pieces[at])
    form = rng.choice(("next", "holding", "on"))
    if form == "next":
        answer = _quotable(pieces[at + 1])
        quote = " ".join(words)
        return Turn(rng.choice(_NEXT_ASKS).format(quote=quote), " ".join(answer), (at, at + 1), (quote,))
    if form == "holding":
        start = rng.randint(0, len(words) - 4)
        quote = " ".join(words[start : start + rng.randint(4, 6)]).strip("“”\"'‘’,;:.")
        return Turn(rng.choice(_HOLDING_ASKS).format(quote=quote), " ".join(words), (at,), (quote,))
    middle = rng.randint(4, len(words) - 2) if len(words) > 6 else 4
    quote = " ".join(words[:middle])
    return Turn(rng.choice(_ON_ASKS).format(quote=quote), " ".join(words[middle:]), (at,), (quote,))


def order(rng: random.Random, pieces: Sequence[str], at: int) -> Turn:
    """Ask which of two passages comes first.

    Raises:
        Unfit: there are no two that can be told apart.
    """
    other = rng.randrange(len(pieces) - 1)
    if abs(other - at) < 3:
        raise Unfit("too near to each other")
    here, there = (" ".join(_quotable(pieces[i])[:_QUOTED]) for i in (at, other))
    ask = rng.choice(_ORDER_ASKS)
    first = here if at < other else there
    if "before or after" in ask:
        answer = f"It comes {'before' if at < other else 'after'} it."
    else:
        answer = rng.choice(('"{first}" comes first.', '"{first}"')).format(first=first)
    return Turn(ask.format(a=here, b=there), answer, (at, other), (here, there))


def quoted_from(rng: random.Random, pieces: Sequence[str], at: int, heading: int, president: str, year: str) -> Turn:
    """Ask whose address, or of which year, a sentence is from, or for a word of it in the address of that year.

    Args:
        rng: where chance comes from.
        pieces: the text.
        at: the sentence.
        heading: the piece above it that names president and year.
        president: who spoke.
        year: when.

    Raises:
        Unfit: the sentence does not do.
    """
    form = rng.choice(("who", "who", "year", "year", "by", "cloze"))
    told = {"president": president, "year": year}
    if form == "by":
        return Turn(rng.choice(_BY_ASKS).format(year=year), _WHO_TELLS[0].format(**told), (heading,))
    if form == "cloze":
        asks = [f"In the address of {year}: {ask[0].lower()}{ask[1:]}" for ask in _CLOZE_ASKS]
        return cloze(rng, pieces, at, asks)
    quote = " ".join(_quotable(pieces[at]))
    asks_of, tells = (_WHO_ASKS, _WHO_TELLS) if form == "who" else (_YEAR_ASKS, _YEAR_TELLS)
    return Turn(rng.choice(asks_of).format(quote=quote), rng.choice(tells).format(**told), (heading, at), (quote,))


def earlier(rng: random.Random, one: tuple[int, str, str], other: tuple[int, str, str]) -> Turn:
    """Ask which of two addresses was given first; each is (heading's piece, president, year)."""
    first = min(one, other, key=lambda it: it[2])
    a, b = rng.sample((one, other), 2)
    told = rng.choice(_EARLIER_TELLS).format(president=first[1], year=first[2])
    return Turn(rng.choice(_EARLIER_ASKS).format(a=a[1], b=b[1]), told, (one[0], other[0]))


def meaning(rng: random.Random, word: str, gloss: str) -> Turn:
    """Ask what a word means."""
    told = {"word": word, "gloss": gloss, "Gloss": gloss[0].upper() + gloss[1:]}
    return Turn(rng.choice(_MEANING_ASKS).format(word=word), rng.choice(_MEANING_TELLS).format(**told))


def several(rng: random.Random, places: Sequence[int], count: int, make: Callable[[int], Turn]) -> list[Turn]:
    """Return ``count`` questions, one for each of so many places of a text.

    Raises:
        Unfit: the text does not have so many that will do.
    """
    turns: list[Turn] = []
    for at in rng.sample(places, min(len(places), _DRAWS)):
        if len(turns) == count:
            break
        try:
            turns.append(make(at))
        except Unfit:
            continue
    if len(turns) < count:
        raise Unfit(f"{len(turns)} of {count} questions found")
    return turns


def _quotable(piece: str) -> list[str]:
    words = clean(piece).split()
    if not _SHORT <= len(words) <= _LONG or '"' in piece:
        raise Unfit("too short or too long to be quoted")
    return words
