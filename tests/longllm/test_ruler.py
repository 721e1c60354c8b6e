"""RULER's kinds: lengths, what is asked is really there, and no other answer is."""

import itertools
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import longllm
from longllm.evals.filling import fitting, most, planted, running
from longllm.evals.haystack import Haystack
from longllm.evals.offline import Passage
from longllm.evals.ruler import KINDS, Ruler, match
from longllm.evals.ruler_qa import one_step, read_questions, two_steps
from longllm.evals.task import Example, Row

WORDS = ["".join(word) for word in itertools.islice(itertools.product("bdfgklmnprst", "aeiou", "bdfg", "aeo"), 700)]
HAY = Haystack(
    "words", " ".join(f"The {a} saw {b} in the deep {c}." for a, b, c in zip(WORDS, WORDS[1:], WORDS[2:], strict=False))
)
PASSAGES = [
    Passage(
        f"We thank you. Our {WORDS[n]} treaty with {WORDS[n + 1]} is of great use. It stands.", f"Address {year}, {who}"
    )
    for n, (year, who) in enumerate(
        [
            (1800, "Ann Lee"),
            (1801, "Ann Lee"),
            (1810, "Bob Orr"),
            (1811, "Bob Orr"),
            (1820, "Cy Pym"),
            (1830, "Dee Roe"),
        ]
    )
]
TO_THE_TOKEN = [
    kind for kind in KINDS if kind.startswith("niah") and kind not in ("niah_multikey_2", "niah_multikey_3")
]


def made(kind: str, tiny: longllm.LoadedModel, length: int = 1500, **options: Any) -> list[Example]:
    rows: Any = ()
    if kind.startswith("qa"):
        rows = (one_step if kind == "qa_1" else two_steps)(PASSAGES, 4)
    return list(Ruler(kind, (length,), HAY, 2, rows=rows, **options).examples(tiny.tokenizer))


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_frame_and_answer_fill_the_length(kind: str, tiny: longllm.LoadedModel) -> None:
    length = 3000 if kind == "fwe" else 1500
    frame = len(longllm.chat_prompt(tiny.tokenizer, []))
    for example in made(kind, tiny, length):
        taken = len(example.ids) + frame + KINDS[kind][1]
        assert taken <= length
        assert example.max_new_tokens == KINDS[kind][1]
        assert tiny.tokenizer.decode(example.ids) == example.prompt
        if kind in (*TO_THE_TOKEN, "vt"):
            assert taken == length
        elif not kind.startswith("qa"):  # six passages do not fill it
            assert taken > length - 120
    again = made(kind, tiny, length)
    assert again == made(kind, tiny, length)
    assert again[0].ids != again[1].ids
    assert made(kind, tiny, length, seed=5)[0].ids != again[0].ids


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("niah")])
def test_needles_state_what_is_asked_and_nothing_else_does(kind: str, tiny: longllm.LoadedModel) -> None:
    for example in made(kind, tiny):
        text, question = example.prompt.rsplit("\n\n", 1)
        stated = re.findall(r"special magic (?:number|identifier)s for ([\w-]+) is: ([\w-]+)\.", text)
        asked = re.search(r" for (.+) that the text mentions", question)[1].split(", ")
        assert sorted(value for key, value in stated if key in asked) == sorted(example.references)
        assert len(asked) == (4 if kind == "niah_multiquery" else 1)
        assert len(example.references) == (4 if kind in ("niah_multiquery", "niah_multivalue") else 1)
        assert len(stated) >= {"niah_multikey_1": 4, "niah_multikey_2": 15, "niah_multikey_3": 8}.get(kind, 1)
        assert len(set(stated)) == len(stated)
        width = 36 if kind in ("niah_single_3", "niah_multikey_3") else 7
        assert {len(value) for value in example.references} == {width}
        if kind == "niah_single_1":
            assert text.count("The grass is green") > 10


def test_a_chain_of_variables_leads_to_all_that_are_asked(tiny: longllm.LoadedModel) -> None:
    for example in made("vt", tiny):
        values: dict[str, str] = {}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", example.prompt):
            values[name] = values.get(source, source)
        asked = re.search(r"have the value (\d+)", example.prompt)[1]
        assert [name for name, value in values.items() if value == asked] == list(example.references)
        assert len(example.references) == 5


@pytest.mark.parametrize(("length", "often", "seldom"), [(1500, 10, 1), (6000, 30, 3)])
def test_common_words_are_those_counted_most(length: int, often: int, seldom: int, tiny: longllm.LoadedModel) -> None:
    example = made("cwe", tiny, length)[0]
    listed = re.findall(r" (\d+)\. ([a-z]+)", example.prompt)
    assert [int(place) for place, _ in listed] == list(range(1, len(listed) + 1))
    counts = Counter(word for _, word in listed)
    assert {word for word, count in counts.items() if count == often} == set(example.references)
    assert {count for word, count in counts.items() if word not in example.references} == {seldom}
    assert len(example.references) == 10


def test_frequent_words_follow_the_dots(tiny: longllm.LoadedModel) -> None:
    example = made("fwe", tiny, 3000)[0]
    coded = example.prompt.split("(...).\n\n")[1].rsplit("\n\n", 1)[0].split()
    (first, dots), *rest = Counter(coded).most_common(5)
    assert first == "..."
    assert [word for word, _ in rest[:3]] == list(example.references)
    assert rest[2][1] > rest[3][1]
    assert rest[0][1] / dots == pytest.approx(1 / 4, abs=0.05)


def test_questions_have_one_answer_among_the_documents(tiny: longllm.LoadedModel) -> None:
    for example in made("qa_1", tiny):
        quoted = re.search(r'said: "(.+?)"', example.prompt)[1]
        (line,) = [line for line in example.prompt.splitlines() if quoted in line and line.startswith("President")]
        assert line.startswith(f"President {example.references[0]},")
        assert example.references[1] == example.references[0].split()[-1]
    for example in made("qa_2", tiny):
        quoted = re.search(r'who said "(.+?)"', example.prompt)[1]
        lines = [line for line in example.prompt.splitlines() if line.startswith("President ")]
        (who,) = {line.split(",")[0] for line in lines if quoted in line}
        others = [line for line in lines if line.startswith(who + ",") and quoted not in line]
        assert [re.search(r"address of (\d+)", line)[1] for line in others] == list(example.references)
        assert len({line.split(",")[0] for line in lines}) > 1


def test_rows_of_a_file_are_read_in_their_several_forms(tmp_path: Path) -> None:
    file = tmp_path / "qa.jsonl"
    file.write_text(
        '{"question": "Who?", "answers": {"text": ["Ann"]}, "context": "It was Ann."}\n'
        '{"question": "Where?", "answer": "here", "documents": ["a", "b"]}\n'
    )
    assert read_questions(str(file)) == [
        {"question": "Who?", "answers": ["Ann"], "documents": ["It was Ann."]},
        {"question": "Where?", "answers": ["here"], "documents": ["a", "b"]},
    ]


@pytest.mark.parametrize(
    ("answer", "references", "every", "any_of_them"),
    [
        ("ONE, two and three", ("one", "Two", "four", "five"), 0.5, 1.0),
        ("nothing", ("one",), 0.0, 0.0),
        ("12345678", ("234",), 1.0, 1.0),
        ("", ("a", "b"), 0.0, 0.0),
    ],
)
def test_matches_are_parts_of_the_answer(
    answer: str, references: tuple[str, ...], every: float, any_of_them: float
) -> None:
    found = [bool(re.search(re.escape(reference), answer, re.I)) for reference in references]
    assert match(answer, references, True) == every == sum(found) / len(found)
    assert match(answer, references, False) == any_of_them == max(found)


def test_scores_and_means_are_of_the_kind(tiny: longllm.LoadedModel) -> None:
    task = Ruler("niah_multivalue", (1500,), HAY)
    example = Example("1500/0", "", ("11", "22", "33", "44"), 8, facts={"length": 1500})
    assert task.score(example, "11 and 44") == {"match": 0.5}
    assert Ruler("qa_1", (1500,), HAY).score(example, "11 and 44") == {"match": 1.0}
    rows = [Row(f"1500/{n}", "", {"match": n / 2}, (), {"length": 1500}) for n in range(3)]
    assert task.summarise(rows) == {"match": 0.5, "by_length": {"1500": {"n": 3, "match": 0.5}}}


def test_running_text_goes_round_and_units_keep_their_order() -> None:
    draws = random.Random(0)
    text = running([[1], [2, 2], [3, 3, 3]], 10, 1)
    assert list(itertools.chain(*text)) == [2, 2, 3, 3, 3, 1, 2, 2, 3, 3]
    for _ in range(20):
        mixed = planted(text, [[7], [8, 8], [9]], draws)
        assert [token for token in mixed if token > 3] == [7, 8, 8, 9]
        assert [token for token in mixed if token <= 3] == list(itertools.chain(*text))
    assert len(planted([[1]], [[7]] * 5, draws)) == 6
    assert list(fitting([[1] * 3] * 5, 8)) == [[1] * 3] * 2
    assert [most(lambda n, top=top: n <= top) for top in (-1, 0, 1, 6, 7, 8, 1000)] == [-1, 0, 1, 6, 7, 8, 1000]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda t: Ruler("niah", (100,), HAY), "kind must be one of niah_single_1"),
        (lambda t: Ruler("vt", (100,), HAY, 0), "count must be"),
        (lambda t: list(Ruler("vt", (100,), HAY).examples(t)), "too small"),
        (lambda t: list(Ruler("cwe", (500,), HAY).examples(t)), "at least"),
        (lambda t: list(Ruler("fwe", (250,), HAY).examples(t)), "too few"),
        (lambda t: list(Ruler("qa_1", (900,), HAY).examples(t)), "needs rows"),
        (lambda t: list(Ruler("vt", (900,), HAY).examples(None)), "tokeniser"),
        (
            lambda t: list(Ruler("cwe", (5000,), Haystack("few", "only four words here.")).examples(t)),
            "different words",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(make: Any, reason: str, tiny: longllm.LoadedModel) -> None:
    with pytest.raises(ValueError, match=reason):
        make(tiny.tokenizer)
