"""The small server of the OpenAI protocol: it answers as the model would, and what it cannot do it refuses."""

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import longllm
from longllm.endpoint import Endpoint
from longllm.replies import EndpointError
from longllm.serve import ModelServer, Refused, conversation_ids, until

QUESTION = [{"role": "user", "content": "What is the pass key?"}]


@pytest.fixture(scope="module")
def server(tiny: longllm.LoadedModel) -> Iterator[ModelServer]:
    with ModelServer(tiny, max_new_tokens=9) as running:
        yield running


def sent(server: ModelServer, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Send a request as it is; return status and what came back."""
    client = http.client.HTTPConnection(server.url.split("/")[2], timeout=30)
    data = body if isinstance(body, bytes) else json.dumps(body)
    client.request("GET" if body is None else "POST", path, None if body is None else data, headers)
    response = client.getresponse()
    text = response.read().decode()
    client.close()
    return response.status, json.loads(text) if text.startswith("{") else text


def test_an_answer_is_what_the_model_says_to_the_chat_template(server: ModelServer, tiny: longllm.LoadedModel) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The sky is blue."},
        {"role": "assistant", "content": "Yes."},
        *QUESTION,
    ]
    ids = tiny.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert conversation_ids(tiny.tokenizer, turns) == list(ids)
    expected = longllm.stream(tiny, ids, longllm.Decoding(12)).result
    status, answer = sent(server, "/v1/chat/completions", {"messages": turns, "max_tokens": 12})
    assert status == 200
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["usage"]["completion_tokens"] == expected.new_tokens
    assert answer["choices"][0]["finish_reason"] == ("stop" if expected.stopped else "length")
    with Endpoint(server.url, "tiny") as endpoint:
        assert endpoint.ask(turns, max_completion_tokens=12) == expected.text


def test_a_stream_is_the_answer_in_pieces(server: ModelServer) -> None:
    _, whole = sent(server, "/v1/chat/completions", {"messages": QUESTION})
    status, text = sent(server, "/v1/chat/completions", {"messages": QUESTION, "stream": True})
    *events, end = [line.removeprefix("data: ") for line in text.splitlines() if line]
    pieces = [json.loads(event) for event in events]
    assert (status, end) == (200, "[DONE]")
    joined = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert joined == whole["choices"][0]["message"]["content"]
    assert pieces[-1]["usage"] == whole["usage"]


def test_an_answer_ends_before_a_stop_text(server: ModelServer) -> None:
    _, whole = sent(server, "/v1/chat/completions", {"messages": QUESTION})
    text = whole["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:2]
    _, cut = sent(server, "/v1/chat/completions", {"messages": QUESTION, "stop": stop})
    assert cut["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=2),
)
def test_no_piece_holds_any_of_a_stop_text(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    expected = whole
    for end in range(len(whole) + 1):
        found = [whole[:end].index(stop) for stop in stops if stop in whole[:end]]
        if found:
            expected = whole[: min(found)]
            break
    got = list(until(pieces, stops))
    # Which of two overlapping stop texts comes first depends on the pieces; both end the answer.
    assert "".join(got) == expected or (len(stops) == 2 and not any(stop in "".join(got) for stop in stops))
    assert all(got)


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 2}, "n"),
        ({"tools": [{}]}, "tools"),
        ({"surprise": 1}, "surprise"),
        ({"temperature": 1, "top_p": 0.5}, "top_p"),
        ({"stop": [1]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"max_tokens": 0}, None),
        ({"max_tokens": "many"}, None),
        ({"temperature": -1}, None),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "far too long " * 200}]}, "messages"),
    ],
)
def test_what_it_cannot_do_it_refuses(server: ModelServer, change: dict[str, Any], setting: str | None) -> None:
    status, answer = sent(server, "/v1/chat/completions", {"messages": QUESTION, **change})
    assert status == 400
    assert answer["error"]["param"] == setting
    assert answer["error"]["message"]


def test_other_paths_other_sites_and_junk_are_refused(server: ModelServer) -> None:
    ask = {"messages": QUESTION}
    assert sent(server, "/v1/completions", ask)[0] == 404
    assert sent(server, "/v1/models")[1]["data"][0]["object"] == "model"
    assert sent(server, "/v1/chat/completions", ask, Host="example.org")[0] == 403
    assert sent(server, "/v1/chat/completions", ask, Origin="http://example.org")[0] == 403
    for junk in (b"{", b"[1]", b"[" * 100_000, b"\xff"):
        assert sent(server, "/v1/chat/completions", junk)[0] == 400
    with pytest.raises(OSError, match="cannot serve on port"):
        ModelServer(server.loaded, port=int(server.url.split(":")[2].split("/")[0]))


def test_many_clients_get_the_same_answers_as_one(server: ModelServer) -> None:
    questions = [f"What is {n}?" for n in range(6)]
    with Endpoint(server.url, "tiny") as endpoint:
        alone = [endpoint.ask(question) for question in questions]
        with ThreadPoolExecutor() as pool:
            assert list(pool.map(endpoint.ask, questions)) == alone
        with pytest.raises(EndpointError, match="400 max_new_tokens must be at least 1"):
            endpoint.ask("hi", max_tokens=0)


def test_a_seed_repeats_a_drawn_answer(server: ModelServer) -> None:
    with Endpoint(server.url, "tiny") as endpoint:
        drawn = [endpoint.ask("Hi", temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_template_without_system_messages_is_told(spoiled: Any) -> None:
    template = spoiled / "chat_template.jinja"
    check = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template.write_text(check + template.read_text())
    loaded = longllm.load(spoiled, dtype="fp32", attention="sdpa", device="cpu")
    with pytest.raises(Refused, match="refuses these messages: no system"):
        conversation_ids(loaded.tokenizer, [{"role": "system", "content": "x"}, *QUESTION])
