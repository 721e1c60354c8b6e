"""Reading what models write when they are asked for JSON."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longllm.synthesis import parse_pairs
from longllm.synthesis.prompts import FAMILIES, PAPER_QUESTIONS, asked, prompt, side_by_side

TWO = (("Who is it?", "Ahab"), ("What's white?", 'The whale, "Moby Dick"'))
ITEMS = [{"question": question, "answer": answer} for question, answer in TWO]
PLAIN = json.dumps(ITEMS)


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        json.dumps({"items": ITEMS}),
        json.dumps({"title": "Quiz", "questions": ITEMS}),
        json.dumps({"Q1": ITEMS[0], "Q2": ITEMS[1]}),
        json.dumps([{"Question 1": a, "Answer": b} for a, b in TWO]),
        json.dumps([[item] for item in ITEMS]),
        json.dumps([{"items": ITEMS}]),
        f"Here are 2 questions [as you asked]:\n\n```json\n{PLAIN}\n```\n\nI hope this helps! {{smile}}",
        f"```\n{PLAIN}",
        f"Sure. {PLAIN} Let me know if you want more [or fewer].",
        f"<think>They want [{{json}}] …</think>\n{PLAIN}",
        "[{'question': 'Who is it?', 'answer': 'Ahab'}, "
        "{'question': \"What's white?\", 'answer': 'The whale, \"Moby Dick\"'}]",
        PLAIN.replace("}, {", "}\n{"),
        PLAIN.replace("}]", ",}]"),
        PLAIN[:-1],
        "\n".join(json.dumps(item) for item in ITEMS),
    ],
)
def test_two_pairs_are_found_however_they_are_written(text: str) -> None:
    assert parse_pairs(text, "question", "answer").pairs == TWO


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("<think>hm, hm", "empty"),
        ("I am sorry, I cannot do that.", "no JSON"),
        ("[1, 2]", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('{"a": ' * 5000, "no JSON"),
        ('[{"question": "Who?"}]', "no answer"),
        ('[{"question": "", "answer": "x"}]', "no question"),
        ('[{"question": {"a": 1}, "answer": "x"}]', "no question"),
        ('{"items": [{"question": "…", "answer": "…"}]}', "copy of the form"),
        ('[{"question": "Who', "cut off"),
    ],
)
def test_what_cannot_be_used_is_named(text: str, problem: str) -> None:
    parsed = parse_pairs(text, "question", "answer")
    assert parsed.pairs == ()
    assert problem in parsed.problems


def test_the_pair_that_was_cut_off_is_dropped_and_the_others_kept() -> None:
    cut = json.dumps(ITEMS)[:-12]
    parsed = parse_pairs(cut, "question", "answer")
    assert (parsed.pairs, parsed.problems) == (TWO[:1], ("cut off",))
    # An answer with a brace of its own looks finished; the server knows better.
    braces = '[{"question": "a?", "answer": "b"}, {"question": "c?", "answer": "the set {x} and its'
    assert parse_pairs(braces, "question", "answer", cut_off=True).pairs == (("a?", "b"),)
    assert parse_pairs(PLAIN, "question", "answer", cut_off=True).pairs == TWO


def test_a_question_asked_twice_counts_once_and_numbers_become_text() -> None:
    text = '[{"question": "How many?", "answer": 3}, {"question": "how MANY?", "answer": "four"}]'
    parsed = parse_pairs(text, "question", "answer")
    assert (parsed.pairs, parsed.problems) == ((("How many?", "3"),), ("question repeated",))


def test_biographies_under_other_names() -> None:
    text = '[{"name": "Ahab", "biography": "A captain."}, {"Character": "Ishmael", "Summary": ["He", "tells."]}]'
    assert parse_pairs(text, "character", "summary").pairs == (("Ahab", "A captain."), ("Ishmael", "He tells."))


JSONISH = st.text(st.sampled_from("[]{}\"':,\\ \nqa`ue1json<think>/…") | st.characters(), max_size=200)


@given(JSONISH | JSONISH.map(lambda junk: PLAIN[:40] + junk) | st.integers(0, len(PLAIN)).map(lambda n: PLAIN[:n]))
@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
def test_no_text_makes_the_parser_raise(text: str) -> None:
    for cut_off in (False, True):
        parsed = parse_pairs(text, "question", "answer", cut_off=cut_off)
        assert parsed.pairs or parsed.problems
        assert all(one.strip() and two.strip() for one, two in parsed.pairs)


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=5), st.booleans())
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
def test_valid_json_comes_back_as_it_was(pairs: list[tuple[str, str]], ascii_only: bool) -> None:
    text = json.dumps({"items": [{"question": a, "answer": b} for a, b in pairs]}, ensure_ascii=ascii_only)
    wanted: list[tuple[str, str]] = []
    for one, two in ((a.strip(), b.strip()) for a, b in pairs):
        known = {question.casefold() for question, _ in wanted}
        if one and two and one.casefold() not in known and not {one, two} & {"…", "..."}:
            wanted.append((one, two))
    assert list(parse_pairs(text, "question", "answer").pairs) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_holds_its_context_untouched_and_ends_with_the_form(family: str) -> None:
    context = "A text with {braces}, {questions} and % signs."
    message = prompt(family, context, 7)
    rule, before, *_ = message.splitlines()
    assert (set(rule), before) == ({"-"}, context)
    form = asked(family)
    assert message.endswith(form.demand)
    schema = form.response_format["json_schema"]["schema"]
    assert schema["properties"]["items"]["items"]["required"] == [form.first, form.second]
    assert ("7" in message) == (family in ("single", "multi", "cluster"))
    assert all(question in message for question in PAPER_QUESTIONS) == (family == "paper")


def test_a_family_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="the families are single, multi, paper, cluster, biography"):
        prompt("haiku", "x", 1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        prompt("single", "x", 0)


def test_texts_of_the_same_name_stand_side_by_side() -> None:
    assert side_by_side([("a", " one "), ("a", "two")]) == "Text 1: a\n\none\n\nText 2: a\n\ntwo"
