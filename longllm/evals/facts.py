"""Short invented facts that have nothing to do with each other or with any text, each with its question.

No answer can be guessed without the fact: names, places and objects are made up or put together at random.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """A sentence to hide, the question it answers, and the words a right answer holds.

    >>> Fact("parrot", "The parrot is called Bismuth.", "What is the parrot called?", ("Bismuth",)).answers[0]
    'Bismuth'
    """

    name: str
    sentence: str
    question: str
    answers: tuple[str, ...]
    """any of them is right"""


def holds(answer: str, wanted: tuple[str, ...]) -> bool:
    """Say whether an answer holds one of the wanted words or phrases, as whole words and in any case.

    >>> holds("It is called BISMUTH.", ("Bismuth",)), holds("Bismuths", ("Bismuth",))
    (True, False)
    """
    return any(re.search(pattern(word), answer) for word in wanted)


def pattern(words: str) -> str:
    """Return the regular expression of a phrase as whole words, in any case, however it is spaced.

    >>> bool(re.search(pattern("swimming pool"), "a Swimming\\npool!"))
    True
    """
    inner = r"\s+".join(re.escape(word) for word in words.split())
    return rf"(?i:(?<!\w){inner}(?!\w))"


FACTS = (
    Fact(
        "ferry",
        "The ferry to Castel Dorno leaves at 6:42 every morning.",
        "At what time does the ferry to Castel Dorno leave?",
        ("6:42",),
    ),
    Fact(
        "cello",
        "Ottilie Brandt plays a cello that was built from cherry wood.",
        "What wood was the cello of Ottilie Brandt built from?",
        ("cherry",),
    ),
    Fact(
        "bakery",
        "The bakery on Pellwood Lane is famous for its rhubarb pie.",
        "Which pie is the bakery on Pellwood Lane famous for?",
        ("rhubarb",),
    ),
    Fact(
        "parrot",
        "The parrot of Doctor Halvorsen is called Bismuth.",
        "What is the parrot of Doctor Halvorsen called?",
        ("Bismuth",),
    ),
    Fact(
        "bridge",
        "The bridge at Tarn Hollow is guarded by two bronze owls.",
        "What is the bridge at Tarn Hollow guarded by?",
        ("owls", "owl"),
    ),
    Fact(
        "librarian",
        "The librarian of Westmere collects antique thimbles.",
        "What does the librarian of Westmere collect?",
        ("thimbles", "thimble"),
    ),
    Fact(
        "satellite",
        "The satellite Corvina carries 317 small mirrors.",
        "How many small mirrors does the satellite Corvina carry?",
        ("317",),
    ),
    Fact(
        "soup",
        "The secret ingredient of Aunt Rosalba's soup is nutmeg.",
        "What is the secret ingredient of Aunt Rosalba's soup?",
        ("nutmeg",),
    ),
    Fact(
        "society",
        "The next meeting of the Kite Society will be held in Reykjavik.",
        "Where will the next meeting of the Kite Society be held?",
        ("Reykjavik",),
    ),
    Fact(
        "lighthouse",
        "The lighthouse on Skarn Island was designed by Tobias Wren.",
        "Who designed the lighthouse on Skarn Island?",
        ("Tobias Wren", "Tobias", "Wren"),
    ),
    Fact(
        "diary",
        "Professor Ikeda hides his diary behind the piano.",
        "Where does Professor Ikeda hide his diary?",
        ("piano",),
    ),
    Fact(
        "train",
        "The night train to Velmora always stops in Duskin.",
        "Where does the night train to Velmora always stop?",
        ("Duskin",),
    ),
    Fact(
        "garden",
        "The garden of the Hotel Miramond is full of lavender.",
        "What is the garden of the Hotel Miramond full of?",
        ("lavender",),
    ),
    Fact(
        "prize",
        "Sigrid Valle won the regional prize for ice sculpture.",
        "What did Sigrid Valle win the regional prize for?",
        ("ice sculpture", "ice sculptures"),
    ),
    Fact(
        "robot",
        "The robot Pemberton was built to sort buttons.",
        "What was the robot Pemberton built to sort?",
        ("buttons", "button"),
    ),
    Fact(
        "statue",
        "The statue in Fennick Square shows a giraffe.",
        "What does the statue in Fennick Square show?",
        ("giraffe",),
    ),
    Fact(
        "allergy",
        "Leonora Quist is allergic to strawberries.",
        "What is Leonora Quist allergic to?",
        ("strawberries", "strawberry"),
    ),
    Fact(
        "orchestra",
        "The Dunmore orchestra rehearses in an empty swimming pool.",
        "Where does the Dunmore orchestra rehearse?",
        ("swimming pool",),
    ),
    Fact(
        "mayor",
        "The mayor of Oslin rides to work on a unicycle.",
        "What does the mayor of Oslin ride to work on?",
        ("unicycle",),
    ),
    Fact(
        "mountain",
        "Mount Kessary was first climbed by Wanda Ostrow.",
        "Who first climbed Mount Kessary?",
        ("Wanda Ostrow", "Wanda", "Ostrow"),
    ),
)
