"""Long questions made without a model: every answer follows from the text, lengths and shares are as ordered."""

import ast
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import catalog
import longscope
from longllm.evals.facts import FACTS
from longllm.prompts import QUESTION
from longllm.synthesis import Mixture, offline_draft, offline_passages, offline_texts, synthesise
from longllm.synthesis.offline import SHARES, rows
from longllm.synthesis.offline_facts import invented
from longllm.synthesis.offline_texts import Corpus, Text, clean
from longllm.synthesis.offline_words import Relation, Words, relations

ROOT = Path(__file__).parents[2]
SIZE = {"low": 900, "high": 1100, "questions": 4}
MEANINGS = {"adder": "a snake that is met on heaths", "bight": "a bay that is wide and shallow"}
PRESIDENTS = {"1801": "Thomas Able", "1850": "Millard Baker", "1902": "Ulysses Cook"}


def babble(seed: int, count: int) -> str:
    """Return sentences of made-up words, a number in some; no two are alike."""
    draws, letters = random.Random(seed), random.Random(0)
    known = ["".join(letters.choice("bdfgklmnprst") + letters.choice("aeiou") for _ in range(3)) for _ in range(400)]

    def sentence() -> str:
        words = draws.choices(known, k=draws.randint(6, 14))
        if draws.random() < 0.3:
            words[3] = str(draws.randint(100, 9999))
        return " ".join(words).capitalize() + "."

    return " ".join(sentence() + ("\n" if draws.random() < 0.2 else "") for _ in range(count))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    speeches = [Text.of(f"sotu/{year}", f"{year}, {name}", babble(int(year), 120)) for year, name in PRESIDENTS.items()]
    return Corpus(speeches, Text.of("novel", "The novel", babble(7, 300)), Words(Words.shipped().lists, MEANINGS))


@pytest.fixture(scope="module")
def tokenizer(tiny_chat: ModuleType) -> Any:
    stated = [text for relation in relations() for text in (*relation.states, *relation.asks)]
    return tiny_chat.tokenizer([babble(1, 200), *stated], 1600)


@pytest.fixture(scope="module")
def made(tokenizer: Any, corpus: Corpus) -> list[dict[str, Any]]:
    shares = {"fact": 6, "speech": 4, "cloze": 3, "order": 3, "recall": 4, "short": 2, "meaning": 1}
    return list(rows(tokenizer, Mixture(46, shares, **SIZE, usual=1.0, droning=0.2), corpus))


def turns(rows_: list[dict[str, Any]], kind: str) -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield text, question, answer and the passages that are said to hold the answer."""
    before, after = (re.escape(part) for part in QUESTION.split("{question}"))
    for row in (row for row in rows_ if row["kind"] == kind):
        talk = row["conversations"]
        first = talk[0]["content"]
        # The opening is not a part of the text, but holds no answers either.
        text, asked = re.fullmatch(rf"(.*)\n\n{before}(.*){after}", first, re.DOTALL).groups()
        for number, spans in enumerate(row["positions"]):
            question = talk[2 * number]["content"] if number else asked
            yield clean(text), question, talk[2 * number + 1]["content"], [clean(first[a:b]) for a, b in spans]


def stated(relation: Relation, sentence: str) -> dict[str, str] | None:
    """Return who, value and it of a sentence that states a relation."""
    for template in relation.states:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(template))
        if found := re.fullmatch(pattern, sentence):
            return {"it": "", **found.groupdict()}
    return None


def test_a_fact_is_stated_once_and_answers_its_question(made: list[dict[str, Any]]) -> None:
    checked = 0
    for text, question, answer, (evidence,) in turns(made, "fact"):
        assert text.count(evidence) == 1
        found = [(relation, told) for relation in relations() if (told := stated(relation, evidence))]
        # Some sentence forms are near to each other: one of the readings must fit question and answer.
        assert any(
            question in [ask.format(**told) for ask in relation.asks]
            and answer.lower()
            in {
                told["value"].lower(),
                told["value"].lower() + ".",
                *(tell.format(**told).lower() for tell in relation.tells),
            }
            for relation, told in found
        ), (evidence, question, answer)
        checked += 1
    assert checked > 20


def test_some_facts_have_others_of_the_same_relation_beside_them_with_other_values() -> None:
    twins = 0
    for seed in range(30):
        facts = invented(random.Random(seed), Words.shipped(), relations(), 6)
        assert len({fact.sentence for fact in facts}) == len({fact.question for fact in facts}) == 6
        # Other subjects and other values, asked for in the same words.
        forms = [re.sub(r"[A-Z]\S*", "", fact.question) for fact in facts]
        twins += len(set(forms)) < 6
    assert twins > 10


def test_the_missing_word_completes_the_quotation(made: list[dict[str, Any]]) -> None:
    checked = 0
    for text, question, answer, (evidence,) in turns(made, "cloze"):
        quote = re.search(r'"(.*____.*)"', question)[1]
        word = re.fullmatch(r'(?:The missing word is |The text has )?"?([^" ]+?)"?(?: there)?\.?', answer)[1]
        whole = quote.replace("____", word)
        assert whole in text
        assert whole in evidence
        # Nothing else fits into the gap.
        assert len(re.findall(re.escape(quote).replace("____", r"\S+"), text)) == 1
        checked += 1
    assert checked > 5


def test_a_recalled_sentence_stands_where_the_question_says(made: list[dict[str, Any]]) -> None:
    forms = set()
    for text, question, answer, evidence in turns(made, "recall"):
        quote = re.search(r'"(.*)"', question)[1]
        assert text.count(quote) == 1
        if re.search("right after|that follows|directly after|continue|next words", question):
            assert f"{quote} {answer}" in text
            forms.add("after")
        else:
            assert quote in answer
            assert answer in text
            forms.add("holding")
        assert quote in " ".join(evidence)
    assert forms == {"after", "holding"}


def test_what_is_said_to_come_first_does(made: list[dict[str, Any]]) -> None:
    seen = set()
    for text, question, answer, _ in turns(made, "order"):
        a, b = re.findall(r'"([^"]*)"', question)
        assert text.count(a) == text.count(b) == 1
        earlier = text.index(a) < text.index(b)
        if "before or after" in question:
            assert (" before " in answer) == earlier
        else:
            assert (a if earlier else b) in answer
            assert (b if earlier else a) not in answer
        seen.add(earlier)
    assert seen == {True, False}


def test_the_address_that_is_named_holds_the_quotation(made: list[dict[str, Any]]) -> None:
    asked = set()
    for text, question, answer, _ in turns(made, "speech"):
        places = sorted((text.index(name), year, name) for year, name in PRESIDENTS.items() if name in text)
        if quote := re.search(r'"(.*)"', question):
            if "____" in quote[1]:
                assert re.search(re.escape(quote[1]).replace("____", r"\S+"), text)
                asked.add("gap")
                continue
            spot = text.index(quote[1])
            year, name = [(year, name) for place, year, name in places if place < spot][-1]
            assert name in answer or year in answer
            assert not any(other in answer for _, *pair in places for other in pair if other not in (year, name))
            asked.add("quote")
        elif "earlier" in question or "first" in question:
            named = [(year, name) for _, year, name in places if name in question]
            assert len(named) == 2
            assert min(named)[1] in answer
            asked.add("earlier")
    assert asked >= {"quote", "earlier"}


def test_rows_without_a_text_define_words(made: list[dict[str, Any]]) -> None:
    defined = [row["conversations"] for row in made if row["kind"] == "meaning"]
    assert defined
    for talk in defined:
        for ask, tell in zip(talk[::2], talk[1::2], strict=True):
            word = next(word for word in MEANINGS if word in ask["content"])
            assert MEANINGS[word][1:] in tell["content"]


def test_lengths_and_shares_are_those_of_the_mixture(made: list[dict[str, Any]], tokenizer: Any) -> None:
    for row in made:
        least, most = {"short": (100, 500), "meaning": (60, 400)}.get(row["kind"], (900, 1100))
        tokens = len(tokenizer.apply_chat_template(row["conversations"], tokenize=True)["input_ids"])
        assert row["tokens"] == tokens
        assert least <= tokens <= most
        roles = [message["role"] for message in row["conversations"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(row["positions"]) == len(roles) // 2 <= 4
    counts = {kind: sum(row["kind"] == kind for row in made) for kind in SHARES}
    assert counts == {"fact": 12, "speech": 8, "cloze": 6, "order": 6, "recall": 8, "short": 4, "meaning": 2}


def test_answers_are_spread_over_the_length(tokenizer: Any, corpus: Corpus) -> None:
    facts = list(rows(tokenizer, Mixture(30, {"fact": 1}, **SIZE), corpus))
    depths = [span[0][0] / len(row["conversations"][0]["content"]) for row in facts for span in row["positions"]]
    fifths = [sum(fifth / 5 <= depth < (fifth + 1) / 5 for depth in depths) for fifth in range(5)]
    assert min(fifths) > len(depths) / 12, fifths


def test_the_same_seed_gives_the_same_file_and_another_another(tokenizer: Any, corpus: Corpus, tmp_path: Path) -> None:
    files = [tmp_path / "new" / f"{number}.jsonl" for number in range(3)]
    reports = [
        synthesise(tokenizer, Mixture(6, **SIZE, seed=seed), file, corpus=corpus)
        for file, seed in zip(files, (1, 1, 2), strict=True)
    ]
    texts = [file.read_text() for file in files]
    assert texts[0] == texts[1] != texts[2]
    lines = [json.loads(line) for line in texts[0].splitlines()]
    assert reports[0]["rows"] == len(lines) == 6
    assert reports[0]["tokens"] == sum(row["tokens"] for row in lines)
    assert reports[0]["questions"] == sum(len(row["positions"]) for row in lines)
    assert sum(reports[0]["kinds"].values()) == sum(reports[0]["sources"].values()) == 6


def test_what_cannot_be_made_is_refused_and_leaves_the_file_as_it_was(
    tokenizer: Any, corpus: Corpus, tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text("mine\n")
    with pytest.raises(ValueError, match="no speech row of 60 to 80 tokens"):
        synthesise(tokenizer, Mixture(3, {"speech": 1}, low=60, high=80), out, corpus=corpus)
    bare = type("Base", (), {"chat_template": None, "name_or_path": "base-7b"})()
    with pytest.raises(ValueError, match="base-7b has no chat template"):
        synthesise(bare, Mixture(3), out, corpus=corpus)
    assert out.read_text() == "mine\n"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"novel": 1.5}, "novel must be between 0 and 1, got 1.5"),
        ({"shares": {"fakt": 1.0}}, "unknown kind 'fakt'; the kinds are fact, "),
        ({"shares": {"fact": 0.0}}, "shares must be 0 or more, and not all 0"),
        ({"low": 3000}, r"length of fact must be .*, got \(3000, 2000\)"),
        ({"lengths": {"short": (10, 5)}}, r"length of short must be .*, got \(10, 5\)"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(**wrong)


def runs(text: str, words: int = 5) -> set[str]:
    """Return every run of so many words of a text."""
    found = re.findall(r"[\w']+", re.sub(r"\{\w*\}", " ", text).lower())
    return {" ".join(found[start : start + words]) for start in range(len(found) - words + 1)}


def wordings(place: Path) -> Iterator[str]:
    """Yield the texts in the source of an evaluation, docstrings left out."""
    if place.suffix == ".toml":
        yield place.read_text()
        return
    tree = ast.parse(place.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docs:
            yield node.value


def test_no_wording_of_an_evaluation_is_taught() -> None:
    evaluations = [*(ROOT / "longllm/evals").glob("*.*"), ROOT / "commands/tour_novel.py", ROOT / "bench/methods.py"]
    asked = [text for place in evaluations if place.suffix in (".py", ".toml") for text in wordings(place)]
    tested = set().union(*map(runs, asked))
    # The check sees what it is meant to see.
    for known in (*runs("The best thing to do in San Francisco is"), *runs(FACTS[0].sentence)):
        assert known in tested
    own = [text for relation in relations() for text in (*relation.states, *relation.asks, *relation.tells)]
    own += [*offline_draft.ASIDE, *offline_draft.OPENINGS, *itertools.chain(*offline_texts.DRONE)]
    own += [text for value in vars(offline_passages).values() if isinstance(value, tuple) for text in value]
    assert len(own) > 250
    assert not tested.intersection(*[set().union(*map(runs, own))])
    shipped, kinds = Words.shipped().lists, {relation.value for relation in relations()}
    taught = {word.lower() for kind in kinds & {*shipped} for word in shipped[kind]}
    assert len(taught) > 200
    assert not taught & {answer.lower() for fact in FACTS for answer in fact.answers}


def test_the_templates_are_many_and_whole() -> None:
    known = relations()
    assert len(known) >= 30
    assert sum(len(relation.states) for relation in known) >= 60
    for relation in known:
        for text in relation.states:
            assert {"{who}", "{value}"} <= set(re.findall(r"\{\w+\}", text))
        assert all("{who}" in text and "{value}" not in text for text in relation.asks)
        assert all("{value}" in text for text in relation.tells)
        for kind in (relation.subject, relation.value, relation.it):
            assert Words.shipped().draw(random.Random(0), kind)
    with pytest.raises(ValueError, match="unknown kind of word 'planet'"):
        Words.shipped().draw(random.Random(0), "planet")


@pytest.mark.real
def test_texts_that_are_held_out_stay_out_of_the_data() -> None:
    train, validation = Corpus.of_catalog("train"), Corpus.of_catalog("validation")
    held = {1963, 1999, 1790, 2019}
    years = [{int(text.title[:4]) for text in part.speeches} for part in (train, validation)]
    assert not years[0] & years[1]
    assert not held & (years[0] | years[1])
    assert len(years[0]) > 150
    assert len(years[1]) > 15
    novel = catalog.read_document("moby-dick").text
    used = "".join(train.novel.sentences) + "".join(validation.novel.sentences)
    assert clean(used) == clean(novel[: int(len(novel) * 0.6)])
    assert len(train.words.meanings) > 1000


@pytest.mark.real
def test_the_command_makes_rows_of_the_catalog(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: Callable[[str], list[str]]
) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["synth", "offline", "--out", str(out), "--mixture.rows", "40", "--mixture.novel", "0.8", "--json"]
    assert longscope.main(command) == 0
    report = json.loads(capsys.readouterr().out)
    told = [json.loads(line) for line in out.read_text().splitlines()]
    assert report["rows"] == len(told) == 40
    long = [row["tokens"] for row in told if row["kind"] not in ("short", "meaning")]
    assert 1700 <= min(long) <= max(long) <= 2000
    text = clean(" ".join(message["content"] for row in told for message in row["conversations"]))
    novel = catalog.read_document("moby-dick").text
    early, late = novel[: int(len(novel) * 0.6)], novel[int(len(novel) * 0.6) :]
    assert any(sentence in text for sentence in cut(early))
    assert not [sentence for sentence in cut(late) if sentence in text and sentence not in clean(early)]


@pytest.fixture
def cut() -> Callable[[str], list[str]]:
    """Cuts a text into its long sentences, in a way of its own."""
    return lambda text: [clean(part) for part in re.split(r"(?<=[.!?])\s", text) if len(part) > 60]
