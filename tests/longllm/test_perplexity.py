"""Perplexity: every token is scored once whatever the windows, and losses are those of plain forward passes."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import longllm
from longllm.evals.answerers import LocalAnswerer
from longllm.evals.generation import Generation
from longllm.evals.perplexity import LastTokens, Perplexity, Window, read_texts, windows
from longllm.evals.run import evaluate

TEXT = "The whale is white and the sea is wide. What is the pass key? Remember it. There and back again. " * 4


@given(st.integers(1, 300), st.integers(3, 40), st.data(), st.sampled_from([0, 1]))
def test_every_token_is_scored_exactly_once(tokens: int, size: int, data: st.DataObject, lead: int) -> None:
    stride = data.draw(st.integers(1, size - 1))
    found = list(windows(tokens, size, stride, lead))
    scored = [place for window in found for place in range(window.first, window.end)]
    # Without a token that leads, nothing stands before the first one.
    assert scored == list(range(1 - lead, tokens))
    for number, window in enumerate(found):
        assert window.begin == number * stride
        assert window.end - window.begin + lead <= size
        assert window.first - window.begin + lead >= 1


def test_windows_that_would_skip_tokens_are_refused() -> None:
    # The reference accepts a stride of max_length: with its leading token it then skips one token between two windows.
    with pytest.raises(ValueError, match=r"stride must lie between 0 and 4,095 \(one slot of each window is the begin"):
        Perplexity([], 4096, 4096)
    assert list(windows(9, 4, 3, 1)) == [Window(0, 3, 0), Window(3, 6, 3), Window(6, 9, 6)]
    assert list(windows(100, 10, 0, 1)) == [Window(0, 9, 0)]
    with pytest.raises(ValueError, match="max_length must be at least 3"):
        Perplexity([], 2, 0)


def losses(tiny: longllm.LoadedModel, ids: list[int]) -> list[float]:
    """Return the loss of every token but the first, by one dense pass."""
    with torch.no_grad():
        logits = tiny.model(torch.tensor([ids])).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none").tolist()


def test_a_text_within_one_window_has_the_loss_of_one_pass(tiny: longllm.LoadedModel, tmp_path: Path) -> None:
    ids = tiny.tokenizer(TEXT)["input_ids"]
    expected = losses(tiny, ids)
    summary = evaluate(Perplexity([("a", TEXT)], 400, 200), LocalAnswerer(tiny), tmp_path)
    assert summary["nll"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert summary["perplexity"] == pytest.approx(math.exp(summary["nll"]))
    assert summary["tokens"] == len(ids) - 1
    assert summary["peak_bytes"] > 0


def test_sliding_windows_weigh_tokens_within_and_texts_between(tiny: longllm.LoadedModel, tmp_path: Path) -> None:
    texts = [("a", TEXT), ("b", "The sky is blue. " * 6), ("c", "")]
    expected = []
    for _, text in texts[:2]:
        ids, own, done = tiny.tokenizer(text)["input_ids"], [], 1
        for begin in range(0, len(ids), 20):
            part = ids[begin : begin + 32]
            own += losses(tiny, part)[done - begin - 1 :] if len(part) > 1 else []
            done = max(done, begin + len(part))
            if begin + 32 >= len(ids):
                break
        assert len(own) == len(ids) - 1
        expected.append(sum(own) / len(own))
    summary = evaluate(Perplexity(texts, 32, 20), LocalAnswerer(tiny), tmp_path)
    assert summary["n"] == 2
    assert summary["nll"] == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert evaluate(Perplexity(texts, 32, 20), LocalAnswerer(tiny), tmp_path) == summary


def test_the_same_tokens_are_scored_after_every_context(tiny: longllm.LoadedModel, tmp_path: Path) -> None:
    ids = tiny.tokenizer(TEXT)["input_ids"]
    task = LastTokens([("a", TEXT), ("short", "The sea.")], (16, 48), last=8, places=2)
    examples = list(task.examples(tiny.tokenizer))
    assert [example.facts["length"] for example in examples] == [16, 48, 16, 48]
    assert {example.ids[-8:] for example in examples[:2]} == {tuple(ids[40:48])}
    assert {example.ids[-8:] for example in examples[2:]} == {tuple(ids[-8:])}
    found = evaluate(task, LocalAnswerer(tiny), tmp_path)["lengths"]
    for length in (16, 48):
        parts = [losses(tiny, ids[end - length : end])[-8:] for end in (48, len(ids))]
        assert found[str(length)]["nll"] == pytest.approx(sum(map(sum, parts)) / 16, abs=1e-4)
        assert found[str(length)]["tokens"] == 16
    with pytest.raises(ValueError, match="no text has the 4,096 tokens"):
        list(LastTokens([("a", TEXT)], (4096,)).examples(tiny.tokenizer))
    with pytest.raises(ValueError, match="lengths above last"):
        LastTokens([], (8,), last=8)


def test_without_a_memory_a_reader_takes_no_losses(tiny: longllm.LoadedModel) -> None:
    answerer = LocalAnswerer(tiny, reader=lambda ids, expected: longllm.prefill(tiny, ids), label="read before")
    with pytest.raises(NotImplementedError, match="how losses of a text are taken is not"):
        answerer.token_losses([5, 6, 7], 1)


def test_texts_come_whole_or_in_part(tmp_path: Path) -> None:
    rows = tmp_path / "pg.jsonl"
    rows.write_text('{"text": "one two three four"}\n{"text": "five six"}\n', encoding="utf-8")
    assert read_texts(str(rows)) == [("0", "one two three four"), ("1", "five six")]
    assert read_texts(str(rows), 0.0, 0.4)[0][1] == "one two"
    first, second = (read_texts(str(rows), *part)[0][1] for part in ((0.0, 0.5), (0.5, 1.0)))
    assert f"{first} {second}" == "one two three four"
    with pytest.raises(ValueError, match="between 0 and 1"):
        read_texts(str(rows), 0.5, 0.5)


def test_conversations_are_answered_from_their_first_user_turn(tiny: longllm.LoadedModel, tmp_path: Path) -> None:
    turns = [("system", "s"), ("user", "Who?"), ("assistant", "the white whale"), ("user", "u"), ("assistant", "a")]
    row = {"conversations": [{"role": role, "content": content} for role, content in turns]}
    task = Generation([row], 4)
    example = next(iter(task.examples(None)))
    assert (example.prompt, example.references) == ("Who?", ("the white whale",))
    scores = task.score(example, "the white ship")
    assert scores == pytest.approx({"rouge_1": 2 / 3, "rouge_2": 1 / 2, "rouge_l": 2 / 3}, abs=1e-6)
    assert set(task.score(example, ".").values()) == {0.0}
    summary = evaluate(Generation([row], 4, rouge=False), LocalAnswerer(tiny), tmp_path)
    assert summary["n"] == 1
    with pytest.raises(ValueError, match="row 0 has no user turn"):
        list(Generation([{"conversations": []}]).examples(None))
