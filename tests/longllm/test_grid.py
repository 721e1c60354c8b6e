"""The grid: exact lengths and places, turns of facts over depths, one reading per text, resumed where it stopped."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import longllm
from longllm.context import context_from
from longllm.evals import answerers, compare
from longllm.evals.answerers import LocalAnswerer
from longllm.evals.facts import FACTS, holds
from longllm.evals.grid import Grid, GridPlan, carrier, plant, run_grid
from longllm.evals.haystack import Haystack, read_haystack, stretch
from longllm.evals.interval import tally, wilson
from longllm.evals.steady import steady
from longllm.evals.task import Answer, Row

HAY = Haystack("log", " ".join(f"Line {number} of the log speaks of the sea." for number in range(2000)))
PLAN = GridPlan((1024, 1500), (0, 50, 100), (2, 1), new_tokens=6)


class Reciting:
    """Answers every question rightly, or fails after so many answers."""

    name = "reciting"

    def __init__(self, tokenizer: Any, lasts: int = 1000) -> None:
        self.tokenizer, self.lasts = tokenizer, lasts
        self.asked: list[str] = []

    def generate(self, example: Any) -> Answer:
        if len(self.asked) == self.lasts:
            raise KeyboardInterrupt
        self.asked.append(example.name)
        return Answer(f"It is {example.references[0]}.", len(example.ids))


@pytest.mark.parametrize("length", [1024, 1500])
def test_the_longest_prompt_with_its_answer_has_exactly_the_length(tiny: longllm.LoadedModel, length: int) -> None:
    answerer = LocalAnswerer(tiny, max_length=length)
    examples = [x for x in Grid(PLAN, HAY).examples(tiny.tokenizer) if x.facts["length"] == length]
    framed = [len(answerer.prompt_ids(example)[0]) + PLAN.new_tokens for example in examples]
    assert max(framed) == length
    assert all(left_out == 0 for _, left_out in map(answerer.prompt_ids, examples))
    for example in examples:
        frame = len(longllm.chat_prompt(tiny.tokenizer, []))
        assert example.shared.reach + frame == length
        assert example.facts["question"] in tiny.tokenizer.decode(example.ids[example.shared.tokens :])
    assert len({example.ids[: example.shared.tokens] for example in examples}) == PLAN.texts_of(length)


def test_needles_stand_where_the_formula_puts_them(tiny: longllm.LoadedModel) -> None:
    plan = GridPlan((1300,), (0, 11, 50, 99.5, 100), (1,), new_tokens=4)
    made = carrier(tiny.tokenizer, plan, HAY.ids(tiny.tokenizer), 1300, 0)
    text = tiny.tokenizer.decode(made.ids)
    after = len(tiny.tokenizer("\n\n")["input_ids"])
    long = {item.sentence: len(tiny.tokenizer(item.sentence)["input_ids"]) for item in made.planted}
    hay = len(made.ids) - after - sum(long.values())
    for item, place in zip(made.planted, made.places, strict=True):
        assert tiny.tokenizer.decode(made.ids[place : place + long[item.sentence]]) == item.sentence
        assert text.count(item.sentence.strip()) == 1
        earlier = [
            other
            for other, at in zip(made.planted, made.places, strict=True)
            if at < place and other.sentence != item.sentence
        ]
        before = place - sum(long[other.sentence] for other in earlier)
        assert before == round((hay - 1) * item.depth / 100)
    bare = text
    for item in made.planted:
        bare = bare.replace(item.sentence, "")
    assert bare.rstrip("\n") in HAY.text
    assert text.startswith(made.planted[0].sentence)


def test_over_all_turns_every_fact_stands_once_at_every_depth() -> None:
    plan = GridPlan((1024,), tuple(range(0, 100, 10)), (20,))
    texts = [plant(plan, text) for text in range(len(FACTS))]
    pairs = Counter((item.fact, item.depth) for text in texts for item in text if item.kind == "needle")
    assert len(pairs) == len(FACTS) * 10
    assert set(pairs.values()) == {1}
    keys = Counter(item.depth for text in texts[:10] for item in text if item.kind == "passkey")
    assert keys == dict.fromkeys(plan.depths, 1)
    assert all(len({item.fact for item in text}) == 11 for text in texts)
    first, second, third = (text[-1].depth for text in texts[:3])
    assert min(abs(first - second), abs(second - third), abs(third - first)) >= 30
    other = plant(GridPlan((1024,), plan.depths, (1,), seed=7), 0)
    assert [item.fact for item in other] != [item.fact for item in texts[0]]
    assert other[-1].references != texts[0][-1].references


def test_facts_are_told_apart_and_no_sentence_answers_another_question() -> None:
    assert len(FACTS) >= 12
    assert len({fact.name for fact in FACTS}) == len(FACTS)
    for fact in FACTS:
        assert holds(fact.sentence, fact.answers[:1])
        assert not holds(fact.question, fact.answers)
        assert not [other.name for other in FACTS if other is not fact and holds(other.sentence, fact.answers)]


@pytest.mark.parametrize(
    ("answer", "wanted", "right"),
    [
        ("At 6:42.", ("6:42",), True),
        ("At 16:42.", ("6:42",), False),
        ("a SWIMMING\npool!", ("swimming pool",), True),
        ("swimming pools", ("swimming pool",), False),
        ("", ("owl",), False),
        ("an owlet", ("owls", "owl"), False),
    ],
)
def test_an_answer_holds_whole_words(answer: str, wanted: tuple[str, ...], right: bool) -> None:
    assert holds(answer, wanted) is right


def test_a_text_is_read_once_and_answers_are_those_of_whole_prompts(
    tiny: longllm.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = GridPlan((1024,), (0, 50, 100), (2,), new_tokens=6)
    read: list[int] = []
    prefill = longllm.prefill

    def counted(loaded: longllm.LoadedModel, ids: Any, **options: Any) -> longllm.Prefix:
        read.append(len(ids))
        return prefill(loaded, ids, **options)

    monkeypatch.setattr(answerers, "prefill", counted)
    answerer = LocalAnswerer(tiny, max_length=1024)
    examples = list(Grid(plan, HAY).examples(tiny.tokenizer))
    answers = [answerer.generate(example) for example in examples]
    assert len(read) == 2
    assert {answer.facts["read_seconds"] > 0 for answer in answers} == {True}
    for example, answer in zip(examples[::3], answers[::3], strict=True):
        ids = longllm.chat_prompt(tiny.tokenizer, example.ids)
        alone = longllm.stream(tiny, ids, longllm.Decoding(6)).result
        assert answer.text == alone.text
        assert answer.tokens_seen == alone.tokens_seen


def test_an_answer_ends_once_it_is_decided(tiny: longllm.LoadedModel) -> None:
    task = Grid(PLAN, HAY)
    for example in task.examples(tiny.tokenizer):
        right = f"I think {example.references[0]}"
        assert not re.search(example.enough, right)
        assert re.search(example.enough, right + ", or so")
        for text in (right + ", no: 11111 and a shark", "1 and " + right + ".", "no idea."):
            cut = re.search(example.enough, text)
            shown = text[: cut.end()] if cut else text
            assert task.score(example, shown) == task.score(example, text)


@pytest.mark.parametrize("lasts", [2, 4, 5])
def test_an_interrupted_run_reads_only_texts_with_open_questions(
    tiny: longllm.LoadedModel, tmp_path: Path, lasts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = GridPlan((500, 600), (0, 50, 100), (1,), new_tokens=2)

    class Failing(LocalAnswerer):
        answered = 0

        def generate(self, example: Any) -> Answer:
            if self.answered == lasts:
                raise KeyboardInterrupt
            self.answered += 1
            return super().generate(example)

    whole = run_grid(LocalAnswerer(tiny, 600), plan, HAY, tmp_path / "whole", label="tiny")
    with pytest.raises(KeyboardInterrupt):
        run_grid(Failing(tiny, 600), plan, HAY, tmp_path / "parted", label="tiny")
    read: list[int] = []
    prefill = longllm.prefill
    monkeypatch.setattr(answerers, "prefill", lambda loaded, ids: (read.append(len(ids)), prefill(loaded, ids))[1])
    parted = run_grid(LocalAnswerer(tiny, 600), plan, HAY, tmp_path / "parted", label="tiny")
    assert len(read) == (2 if lasts < 4 else 1)
    assert parted == whole
    lines = [(tmp_path / name / "grid.jsonl").read_text().splitlines() for name in ("whole", "parted")]
    answers = [[(json.loads(line)["name"], json.loads(line)["answer"]) for line in rows[1:]] for rows in lines]
    assert answers[0] == answers[1]


def test_figures_are_counts_of_the_rows(tiny: longllm.LoadedModel, tmp_path: Path) -> None:
    summary = run_grid(Reciting(tiny.tokenizer), PLAN, HAY, tmp_path, label="reciting")
    assert summary["lengths"]["1024"]["needle"]["n"] == 6
    assert summary["lengths"]["1500"]["passkey"] == {
        "n": 1,
        "right": 1,
        "accuracy": 1.0,
        "interval": list(wilson(1, 1)),
    }
    assert sum(cell["n"] for cell in summary["cells"]) == summary["n"] == 12
    for ending in ("jsonl", "json", "png", "svg"):
        assert (tmp_path / f"grid.{ending}").stat().st_size > 100
    more = GridPlan((1024, 1500), PLAN.depths, (3, 2), new_tokens=6)
    second = Reciting(tiny.tokenizer)
    assert run_grid(second, more, HAY, tmp_path, label="reciting")["n"] == 20
    assert len(second.asked) == 8
    with pytest.raises(ValueError, match="another seed"):
        run_grid(second, GridPlan((1024,), PLAN.depths, (1,), seed=5, new_tokens=6), HAY, tmp_path, label="reciting")


def test_finished_runs_stand_next_to_each_other(tiny: longllm.LoadedModel, tmp_path: Path) -> None:
    run_grid(Reciting(tiny.tokenizer), PLAN, HAY, tmp_path / "a", label="base")
    few = GridPlan((1024,), PLAN.depths, (2,), new_tokens=6)
    run_grid(LocalAnswerer(tiny, 1024), few, HAY, tmp_path / "b", label="tuned")
    record = compare.compare([tmp_path / "a", tmp_path / "b" / "grid.json"], tmp_path / "both", "before and after")
    assert record["differ_in"] == []
    head, _, first, second, *_ = record["table"].splitlines()
    assert head == "| run | asked | 1K | 1,500 |"
    low, high = wilson(6, 6)
    assert first == f"| base | needle | 1.00 (6/6, {low:.2f}-{high:.2f}) | 1.00 (3/3, {wilson(3, 3)[0]:.2f}-1.00) |"
    assert second.startswith("| tuned | needle | 0.00 (0/6, 0.00-")
    assert second.endswith("| - |")
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == [
        f"compare.{ending}" for ending in ("json", "md", "png", "svg")
    ]
    other = GridPlan((1024,), PLAN.depths, (1,), seed=9, new_tokens=6)
    run_grid(Reciting(tiny.tokenizer), other, HAY, tmp_path / "c", label="other")
    assert compare.compare([tmp_path / "a", tmp_path / "c"], tmp_path / "two")["differ_in"] == ["seed"]
    (tmp_path / "c" / "grid.json").write_text("{}")
    with pytest.raises(ValueError, match="no summary of a grid"):
        compare.compare([tmp_path / "c"], tmp_path / "two")


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (3, 3), (9, 10), (0, 30), (17, 40), (299, 300)])
def test_the_interval_solves_its_equation(right: int, n: int) -> None:
    # Wilson's bounds are the shares p that lie z standard errors, sqrt(p (1 - p) / n), from what was seen.
    z = 1.959963984540054
    low, high = wilson(right, n)
    for bound, at_the_end in ((low, right == 0), (high, right == n)):
        if not at_the_end:
            assert abs(right / n - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), rel=1e-9)
    assert 0 <= low <= right / n <= high <= 1
    assert (low == 0) == (right == 0)
    assert (high == 1) == (right == n)


def test_the_interval_is_scipys() -> None:
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for right, n in ((0, 5), (3, 7), (50, 60)):
        theirs = binomtest(right, n).proportion_ci(0.95, "wilson")
        assert wilson(right, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert tally([])["accuracy"] is None
    with pytest.raises(ValueError, match="right must lie"):
        wilson(3, 2)


@pytest.mark.parametrize("method", ["dynamic", "longrope"])
def test_moving_rope_is_kept_still_while_a_text_is_read_in_chunks(method: str, tiny_folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_folder)
    context = context_from(config, method, length=2048, factor=4.0)
    loaded = longllm.load(tiny_folder, dtype="fp32", attention="sdpa", device="cpu", context=context)
    ids = torch.randint(5, 200, (1200,)).tolist()
    with torch.no_grad(), steady(loaded.model, len(ids)):
        together = loaded.model(torch.tensor([ids])).logits[0, -1]
    fresh = longllm.load(tiny_folder, dtype="fp32", attention="sdpa", device="cpu", context=context)
    before = fresh.model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        once = fresh.model(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(together, once)
    with torch.no_grad(), steady(loaded.model, len(ids)):
        prefix = longllm.prefill(loaded, ids[:-1], chunk=100)
        at = torch.tensor([[len(ids) - 1]])
        last = loaded.model(torch.tensor([ids[-1:]]), position_ids=at, past_key_values=prefix.cache).logits[0, -1]
    torch.testing.assert_close(last, once, atol=1e-4, rtol=1e-4)
    assert loaded.model.model.rotary_emb.rope_type == method
    torch.testing.assert_close(loaded.model.model.rotary_emb.inv_freq, before)
    # Without it the same chunks give another answer, which is why it is there.
    with torch.no_grad():
        prefix = longllm.prefill(loaded, ids[:-1], chunk=100)
        moved = loaded.model(torch.tensor([ids[-1:]]), position_ids=at, past_key_values=prefix.cache).logits[0, -1]
    assert (moved - once).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: GridPlan((0,)), "lengths must be"),
        (lambda: GridPlan((64, 64)), "lengths must be different"),
        (lambda: GridPlan((64,), (0, 101)), "between 0 and 100"),
        (lambda: GridPlan((64,), (5, 5)), "differ"),
        (lambda: GridPlan((64,), tuple(range(30))), "1 to 20"),
        (lambda: GridPlan((64, 128), texts=(1, 2, 3)), "one for each of 2"),
        (lambda: GridPlan((64,), new_tokens=0), "new_tokens"),
        (lambda: list(Grid(GridPlan((64,)), HAY).examples(None)), "tokeniser"),
        (lambda: Haystack("x", "abc", 1.0), "start must be"),
        (lambda: Haystack("x", "abc    ", 0.5), "has no text"),
        (lambda: stretch([], 3), "need tokens"),
        (lambda: compare.compare([], "nowhere"), "at least one panel"),
    ],
)
def test_what_cannot_be_asked_is_refused(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


def test_the_smallest_length_that_the_refusal_names_can_be_built(tiny: longllm.LoadedModel) -> None:
    plan, hay = GridPlan((64,), (0, 50, 100)), HAY.ids(tiny.tokenizer)
    with pytest.raises(ValueError, match="at least") as caught:
        carrier(tiny.tokenizer, plan, hay, 64, 0)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    assert len(carrier(tiny.tokenizer, plan, hay, least, 0).planted) == 4
    with pytest.raises(ValueError, match="at least"):
        carrier(tiny.tokenizer, plan, hay, least - 1, 0)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name, text in (("b.txt", "second"), ("a.txt", "first\n"), ("c.md", "not this"), ("d/e.txt", "third")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_haystack(tmp_path).text == "first\n\nsecond\n\nthird"
    assert read_haystack(tmp_path / "b.txt", 0.5).used == "ond"
    assert read_haystack(tmp_path).facts != read_haystack(tmp_path, 0.1).facts
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"no \.txt"):
        read_haystack(tmp_path / "none")


def test_a_short_haystack_is_repeated_and_a_long_one_is_entered_anywhere() -> None:
    hay = list(range(10))
    assert [stretch(hay, 4, place)[1] for place in (0, 0.5, 1)] == [0, 3, 6]
    ids, begin = stretch(hay, 25, 0.7)
    assert (ids, begin) == ([n % 10 for n in range(25)], 0)


def test_a_row_holds_what_the_figures_need(tiny: longllm.LoadedModel) -> None:
    task = Grid(PLAN, HAY)
    rows = [Row(x.name, "", {"right": 0.0}, x.references, dict(x.facts)) for x in task.examples(tiny.tokenizer)]
    again = [Row.of(json.loads(json.dumps(row.record()))) for row in rows]
    assert task.summarise(again) == task.summarise(rows)
