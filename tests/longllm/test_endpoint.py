"""The endpoint client and the batch run, against a real server with faults."""

import asyncio
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longllm import batch
from longllm.endpoint import Endpoint
from longllm.rate import Limits, Price, Window
from longllm.replies import EndpointError

SERVER = runpy.run_path(str(Path(__file__).with_name("chat_server.py")))
ChatServer, Fault, refusal = SERVER["ChatServer"], SERVER["Fault"], SERVER["refusal"]
ROOT = Path(__file__).parents[2]
#: short pauses; nothing else differs from the defaults
FAST = {"pause": 0.01, "attempts": 3}


def echo(body: dict[str, Any], before: int) -> str:
    return "you said: " + body["messages"][-1]["content"]


def first(*faults: Any) -> Any:
    """Meet every request with these faults, one after the other, before it is answered."""
    return lambda body, before: faults[before] if before < len(faults) else echo(body, before)


def requests_file(path: Path, count: int, **settings: Any) -> Path:
    lines = [
        {"custom_id": f"r{number}", "messages": [{"role": "user", "content": f"say {number}"}], **settings}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_question_is_answered_and_its_use_logged(tmp_path: Path) -> None:
    log = tmp_path / "usage.jsonl"
    with (
        ChatServer(echo) as server,
        Endpoint(server.url, "m", "secret", price=Price(prompt=1e5, completion=2e5), usage_log=log) as endpoint,
    ):
        assert endpoint.ask("hello", max_tokens=7) == "you said: hello"
        assert endpoint.ask([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]) == "you said: u"
    assert server.bodies[0] == {
        "model": "m", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 7
    }  # fmt: skip
    assert server.headers[0]["authorization"] == "Bearer secret"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["prompt_tokens"], line["completion_tokens"], line["cost"]) for line in lines] == [(10, 5, 2.0)] * 2
    assert (endpoint.usage.requests, endpoint.usage.cost) == (2, 4.0)


@pytest.mark.parametrize(
    "fault",
    [
        refusal(500, "oops"),
        refusal(429, "slow down"),
        Fault(200, b"{not json"),
        Fault(200, b"[" * 100_000),
        Fault(200, b'{"choices": []}'),
        Fault(200, b'{"error": {"message": "upstream"}}'),
        Fault(200, b'{"choices": [', drop=True),
        Fault(503, b"<html>busy</html>"),
    ],
    ids=["500", "429", "malformed", "deep", "no choice", "error with 200", "dropped", "html"],
)
def test_a_passing_fault_is_tried_again(fault: Any) -> None:
    with ChatServer(first(fault, fault)) as server, Endpoint(server.url, "m", limits=Limits(**FAST)) as endpoint:
        assert endpoint.ask("hi") == "you said: hi"
        assert endpoint.usage.attempts == 3
    with ChatServer(first(fault, fault, fault)) as server, Endpoint(server.url, "m", limits=Limits(**FAST)) as endpoint:
        with pytest.raises(EndpointError, match="failed after 3 attempts") as caught:
            endpoint.ask("hi")
        assert len(caught.value.errors) == 3


def test_retry_after_holds_back_every_request() -> None:
    limited = Fault(429, b"{}", {"retry-after": "0.4"})
    replies = lambda body, before: limited if len(server.bodies) == 1 else echo(body, before)  # noqa: E731
    with ChatServer(replies) as server, Endpoint(server.url, "m", limits=Limits(**FAST)) as endpoint:
        endpoint.ask("a")
        with ThreadPoolExecutor() as pool:
            list(pool.map(endpoint.ask, "bcd"))
        assert server.times[1] - server.times[0] >= 0.4
    with ChatServer(first(Fault(429, b"{}", {"retry-after": "9999"}))) as server, Endpoint(server.url, "m") as endpoint:
        with pytest.raises(EndpointError, match=r"asks for a pause of 9999 s, more than the 300 s allowed"):
            endpoint.ask("a")
        assert len(server.bodies) == 1


def test_a_slow_server_times_out_and_a_missing_one_is_named() -> None:
    limits = Limits(attempts=2, pause=0.01, timeout=0.1)
    with ChatServer(echo, delay=0.5) as server, Endpoint(server.url, "m", limits=limits) as endpoint:
        with pytest.raises(EndpointError, match=r"no answer within 0\.1 s"):
            endpoint.ask("hi")
        url = server.url
    with Endpoint(url, "m", limits=limits) as endpoint, pytest.raises(EndpointError, match="connection failed"):
        endpoint.ask("hi")


@pytest.mark.parametrize(
    ("fault", "words", "hopeless"),
    [
        (refusal(401, "bad key"), r"401 bad key \(the key comes from the argument or from OPENAI_API_KEY\)", True),
        (refusal(404, "no model m"), "404 no model m", True),
        (refusal(429, "pay first", code="insufficient_quota"), "429 pay first", True),
        (refusal(400, "context too long", param="messages"), "400 context too long", False),
    ],
)
def test_a_lasting_fault_is_not_tried_again(fault: Any, words: str, hopeless: bool) -> None:
    with ChatServer(first(fault)) as server, Endpoint(server.url, "m", limits=Limits(**FAST)) as endpoint:
        with pytest.raises(EndpointError, match=words) as caught:
            endpoint.ask("hi", response_format={"type": "json_object"})
        assert (len(server.bodies), caught.value.hopeless) == (1, hopeless)


def test_settings_that_the_server_does_not_know_are_left_out_from_then_on() -> None:
    def picky(body: dict[str, Any], before: int) -> Any:
        if "response_format" in body:
            return refusal(400, "response_format is not supported")
        if "max_tokens" in body:
            return refusal(400, "use max_completion_tokens", param="max_tokens", code="unsupported_parameter")
        return echo(body, before)

    with ChatServer(picky) as server, Endpoint(server.url, "m") as endpoint:
        for word in ("one", "two"):
            assert endpoint.ask(word, response_format={"type": "json_object"}, max_tokens=9) == f"you said: {word}"
        assert len(server.bodies) == 4
        assert server.bodies[-1]["max_completion_tokens"] == 9


def test_a_400_with_another_cause_does_not_cost_later_requests_their_response_format() -> None:
    replies = lambda body, before: refusal(400, "too long") if len(str(body)) > 500 else echo(body, before)  # noqa: E731
    with ChatServer(replies) as server, Endpoint(server.url, "m") as endpoint:
        with pytest.raises(EndpointError, match="400 too long"):
            endpoint.ask("x" * 500, response_format={"type": "json_object"})
        endpoint.ask("short", response_format={"type": "json_object"})
        assert "response_format" in server.bodies[-1]


def test_any_path_query_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "from-environment")
    with ChatServer(echo) as server:
        address = server.url.replace("/v1", "/openai/deployments/d/chat/completions?api-version=1")
        with Endpoint(address, "m", key_variable="MY_KEY") as endpoint:
            endpoint.ask("hi")
        assert server.paths == ["/openai/deployments/d/chat/completions?api-version=1"]
        assert server.headers[0]["api-key"] == "from-environment"


@pytest.mark.parametrize("address", ["localhost:8000/v1", "ftp://host/v1", "http://", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="an endpoint is an http or https address"):
        Endpoint(address, "m")


@pytest.mark.parametrize("field", ["concurrency", "attempts", "timeout", "pause", "patience", "tokens_per_minute"])
def test_limits_without_meaning_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*, got -1"):
        Limits(**{field: -1})


def test_no_more_requests_at_once_than_allowed_and_any_loop_may_ask() -> None:
    async def many(endpoint: Endpoint) -> list[dict[str, Any]]:
        bodies = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(12)]
        return await asyncio.gather(*map(endpoint.complete, bodies))

    with ChatServer(echo, delay=0.03) as server, Endpoint(server.url, "m", limits=Limits(concurrency=3)) as endpoint:
        answers = asyncio.run(many(endpoint))
        assert [answer["choices"][0]["message"]["content"] for answer in answers] == [
            f"you said: {n}" for n in range(12)
        ]
        assert server.busiest == 3


@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.integers(1, 80), st.floats(0, 40, allow_subnormal=False)), min_size=1, max_size=60),
)
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
def test_the_budget_of_a_minute_is_never_exceeded_and_everybody_gets_a_turn(
    budget: int, wishes: list[tuple[int, float]]
) -> None:
    window, now, spent = Window(budget), 0.0, []
    for cost, idle in wishes:
        now += idle
        waits = 0
        while (wait := window.delay(cost, now)) > 0:
            now, waits = now + wait, waits + 1
            assert waits <= 3, "waiting as long as told is not enough"
        window.take(cost, now)
        spent.append((now, min(cost, budget)))
    for end, _ in spent:
        assert sum(cost for at, cost in spent if end - 60 + 1e-6 < at <= end) <= budget


def test_a_request_beyond_the_tokens_per_minute_is_sent_all_the_same() -> None:
    limits = Limits(tokens_per_minute=10, requests_per_minute=2)
    with ChatServer(echo) as server, Endpoint(server.url, "m", limits=limits) as endpoint:
        assert endpoint.ask("x" * 1000, max_tokens=5000).startswith("you said")


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    requests, out = requests_file(tmp_path / "requests.jsonl", 5), tmp_path / "out" / "results.jsonl"
    bad = lambda body, before: refusal(422, "no") if body["messages"][0]["content"] == "say 3" else echo(body, before)  # noqa: E731
    with ChatServer(bad) as server, Endpoint(server.url, "m", limits=Limits(**FAST)) as endpoint:
        report = batch.run(endpoint, requests, out)
        assert (report["answered"], report["failed"], report["before"]) == (4, 1, 0)
    results = dict(batch.read_results(out))
    assert results["r3"]["errors"] == ["422 no"]
    with out.open("a") as file:
        file.write('{"custom_id": "r9", "resp')  # a run killed while it wrote
    with ChatServer(echo) as server, Endpoint(server.url, "m") as endpoint:
        report = batch.run(endpoint, requests, out)
        assert (report["requests"], report["answered"], report["failed"], report["before"]) == (5, 1, 0, 4)
        assert [body["messages"][0]["content"] for body in server.bodies] == ["say 3"]
    results = dict(batch.read_results(out))
    assert sorted(results) == [f"r{number}" for number in range(5)]
    assert all("response" in record for record in results.values())


def test_a_client_killed_in_mid_run_pays_no_request_twice_but_those_under_way(tmp_path: Path) -> None:
    requests, out = requests_file(tmp_path / "requests.jsonl", 30), tmp_path / "results.jsonl"
    program = (
        "import sys; from longllm import batch; from longllm.endpoint import Endpoint, Limits\n"
        "batch.run(Endpoint(sys.argv[1], 'm', limits=Limits(concurrency=3)), sys.argv[2], sys.argv[3])"
    )
    with ChatServer(echo, delay=0.05) as server:
        client = subprocess.Popen([sys.executable, "-c", program, server.url, requests, out], cwd=ROOT)
        limit = time.monotonic() + 60
        while not (out.exists() and out.read_bytes().count(b"\n") >= 8) and time.monotonic() < limit:
            time.sleep(0.01)
        os.kill(client.pid, signal.SIGKILL)
        client.wait()
        kept = {name for name, _ in batch.read_results(out)}
        assert 8 <= len(kept) < 30
        with Endpoint(server.url, "m", limits=Limits(concurrency=3)) as endpoint:
            report = batch.run(endpoint, requests, out)
        assert report["before"] == len(kept)
    twice = {text for text, count in server.answered.items() if count > 1}
    assert len(server.answered) == 30
    assert not twice & {f"say {name[1:]}" for name in kept}
    assert len(twice) <= 3
    assert len(list(batch.read_results(out))) == 30


def test_a_run_ends_when_the_rest_would_fail_as_well(tmp_path: Path) -> None:
    requests = requests_file(tmp_path / "requests.jsonl", 40)
    with ChatServer(lambda *_: refusal(401, "bad key")) as server, Endpoint(server.url, "m") as endpoint:
        with pytest.raises(EndpointError, match="401 bad key"):
            batch.run(endpoint, requests, tmp_path / "a.jsonl")
        assert len(server.bodies) <= 16
    limits = Limits(attempts=1, give_up=5)
    with (
        ChatServer(lambda *_: refusal(500, "oops")) as server,
        Endpoint(server.url, "m", limits=limits) as endpoint,
        pytest.raises(EndpointError, match=r"5 requests in a row have failed, the last one: .*500 oops"),
    ):
        batch.run(endpoint, requests, tmp_path / "b.jsonl")
    assert all("errors" in record for _, record in batch.read_results(tmp_path / "b.jsonl"))


def test_results_of_other_requests_and_a_second_writer_are_refused(tmp_path: Path) -> None:
    requests, out = requests_file(tmp_path / "requests.jsonl", 2), tmp_path / "results.jsonl"
    with ChatServer(echo) as server, Endpoint(server.url, "m") as endpoint:
        batch.run(endpoint, requests, out)
        other = requests_file(tmp_path / "other.jsonl", 2, temperature=1)
        with pytest.raises(ValueError, match=r"answers another request 'r0' than .*other\.jsonl asks"):
            batch.run(endpoint, other, out)
        with out.open("a") as file:
            batch._alone(file, out)
            with pytest.raises(OSError, match="another run is writing"):
                batch.run(endpoint, requests, out)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: no request .JSONDecodeError"),
        ("[]", "line 2: no request .TypeError|AttributeError"),
        ('{"messages": []}', "line 2: no request .KeyError: 'custom_id'"),
        ('{"custom_id": 3, "messages": []}', "line 2: custom_id 3 is no text"),
        ('{"custom_id": "r0", "messages": []}', "line 2: custom_id 'r0' is used twice"),
        ('{"custom_id": "x", "messages": "hi"}', "line 2: custom_id 'x' is no text, or messages is no list"),
    ],
)
def test_a_bad_request_line_is_named_before_anything_is_sent(tmp_path: Path, line: str, words: str) -> None:
    requests = requests_file(tmp_path / "requests.jsonl", 1)
    requests.write_text(requests.read_text() + line + "\n")
    with ChatServer(echo) as server, Endpoint(server.url, "m") as endpoint:
        with pytest.raises(ValueError, match=words):
            batch.run(endpoint, requests, tmp_path / "out.jsonl")
        assert not server.bodies


def test_the_layout_of_batch_services_is_read_too(tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    (tmp_path / "r.jsonl").write_text(
        json.dumps({"custom_id": "a", "method": "POST", "url": "/v1", "body": body}) + "\n"
    )
    assert list(batch.read_requests(tmp_path / "r.jsonl")) == [("a", body)]
    done = {"choices": [{"message": {"content": "x"}}]}
    lines = [
        {"custom_id": "a", "response": {"status_code": 200, "body": done}, "error": None},
        {"custom_id": "b", "response": {"status_code": 500, "body": "oops"}, "error": None},
        {"custom_id": "c", "response": None, "error": {"code": "expired"}},
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = dict(batch.read_results(tmp_path / "s.jsonl"))
    assert found["a"]["response"] == done
    assert found["b"]["errors"] == ["500 oops"]
    assert found["c"]["errors"] == ["no answer {'code': 'expired'}"]


@pytest.mark.parametrize("line", ["{", "[]", '{"custom_id": "a"}', '{"custom_id": "a", "response": {"choices": []}}'])
def test_a_damaged_result_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "results.jsonl").write_text('{"custom_id": "x", "errors": []}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2: no result"):
        list(batch.read_results(tmp_path / "results.jsonl"))


def test_a_finished_endpoint_can_be_used_again_and_unfinished_work_ends_with_it() -> None:
    with ChatServer(echo, delay=0.2) as server:
        endpoint = Endpoint(server.url, "m")
        work = endpoint._submit(endpoint.complete({"messages": [{"role": "user", "content": "slow"}]}))
        time.sleep(0.05)
        endpoint.close()
        with pytest.raises((EndpointError, asyncio.CancelledError, BaseException)):
            work.result(timeout=5)
        assert endpoint.ask("again") == "you said: again"
        endpoint.close()
