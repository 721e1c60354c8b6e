"""An endpoint as an answerer: what is really sent over HTTP, what comes of it, and what cannot be asked of it."""

import runpy
from pathlib import Path
from typing import Any

import pytest

import longllm
from longllm.endpoint import Endpoint
from longllm.evals.endpoint import EndpointAnswerer
from longllm.evals.longbench import LongBench, kinds
from longllm.evals.mmlu import Mmlu
from longllm.evals.run import evaluate
from longllm.evals.task import Example

SERVER = runpy.run_path(str(Path(__file__).with_name("chat_server.py")))


def echo(body: dict[str, Any], before: int) -> str:
    """Answer with the last word of the question, then go on on another line."""
    return f"{body['messages'][-1]['content'].split()[-1]}\nand more"


def test_a_task_runs_over_http(tmp_path: Path) -> None:
    rows = [{"input": f"Who {word}?", "context": "c", "answers": ["answer"]} for word in ("sails", "sinks", "swims")]
    with SERVER["ChatServer"](echo) as server, Endpoint(server.url, "whale-7b") as endpoint:
        answerer = EndpointAnswerer(endpoint)
        assert answerer.name == f"whale-7b at {server.url}"
        summary = evaluate(LongBench(kinds()["hotpotqa"], rows), answerer, tmp_path)
        again = evaluate(LongBench(kinds()["hotpotqa"], rows), answerer, tmp_path)
    # The prompt ends with "Answer:", so the echo is right; the newline ends it.
    assert (summary["score"], summary["n"]) == (100.0, 3)
    assert again == summary
    assert len(server.bodies) == 3
    sent = server.bodies[0]
    assert [message["role"] for message in sent["messages"]] == ["user"]
    assert sent["messages"][0]["content"].startswith("Answer the question based on the given passages.")
    assert {key: sent[key] for key in ("model", "max_tokens", "temperature", "stop")} == {
        "model": "whale-7b", "max_tokens": 32, "temperature": 0, "stop": ["\n"],
    }  # fmt: skip


def test_answers_carry_what_the_server_counted() -> None:
    with SERVER["ChatServer"](echo) as server, Endpoint(server.url, "m") as endpoint:
        answer = EndpointAnswerer(endpoint).generate(Example("0", "Say whale", (), 4, chat=False))
    assert (answer.text, answer.tokens_seen, answer.facts) == ("whale\nand more", 10, {"new_tokens": 5})
    assert "stop" not in server.bodies[0]


def test_prompts_are_cut_by_the_tokeniser_if_there_is_one(tiny: longllm.LoadedModel) -> None:
    prompt = "The whale is white and the sea is wide. " * 10
    ids = tiny.tokenizer(prompt)["input_ids"]
    with SERVER["ChatServer"](echo) as server, Endpoint(server.url, "m") as endpoint:
        answerer = EndpointAnswerer(endpoint, tiny.tokenizer, max_length=20)
        assert answerer.generate(Example("0", prompt, (), 4)).tokens_cut == len(ids) - 20
        answerer.generate(Example("1", "", (), 4, ids=tuple(ids[:5])))
        with pytest.raises(ValueError, match="20 are allowed"):
            answerer.generate(Example("2", prompt, (), 4, truncate="error"))
        with pytest.raises(ValueError, match="given as token ids"):
            EndpointAnswerer(endpoint).generate(Example("3", "", (), 4, ids=(1, 2)))
        with pytest.raises(ValueError, match="max_length counts tokens"):
            EndpointAnswerer(endpoint, None, 20)
    contents = [body["messages"][0]["content"] for body in server.bodies]
    assert contents == [
        tiny.tokenizer.decode(ids[:10]) + tiny.tokenizer.decode(ids[-10:]),
        tiny.tokenizer.decode(ids[:5]),
    ]


def test_likelihoods_are_refused_with_the_reason() -> None:
    row = {"query": "q", "subject": "anatomy", "choices": list("abcd"), "answer": 0}
    with Endpoint("http://127.0.0.1:9/v1", "m") as endpoint:
        answerer = EndpointAnswerer(endpoint)
        with pytest.raises(NotImplementedError, match="no likelihoods of given options"):
            Mmlu([row]).measure(answerer, next(iter(Mmlu([row]).examples(None))))
        with pytest.raises(NotImplementedError, match="no likelihoods of a given text"):
            answerer.token_losses([1, 2], 1)
