"""``longscope merge`` and ``longscope chat`` as a user meets them."""

import io
import json
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import longllm
import longscope
from commands.chat import Talk, chat
from commands.doctor import doctor
from commands.merge import merge
from longllm.context import Context

THETA = 2e8


@pytest.fixture(scope="module")
def adapter(tiny_chat: ModuleType, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that takes the tiny model from 512 to 4,096 tokens."""
    context = Context({"rope_type": "default", "rope_theta": THETA}, 4096, str(tiny_folder), trained=True)
    return tiny_chat.adapter(tmp_path_factory.mktemp("adapter") / "whale", tiny_folder, context)


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Chat with lines from a pipe; return the text and the record."""

    def run(lines: list[str], **options: object) -> tuple[str, dict[str, Any]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        *pieces, record = chat(**{"dtype": "fp32", "attention": "sdpa", "max_new_tokens": 6, **options})
        return "".join(pieces), record

    return run


def test_merge_writes_a_model_that_needs_no_flag(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    *pieces, record = merge(adapter=str(adapter), out=str(out), dtype="fp32", max_shard_size="50KB")
    assert f"wrote  {out}" in "".join(pieces)
    assert record["rope_parameters"] == {"rope_type": "default", "rope_theta": THETA}
    assert (record["max_position_embeddings"], record["trained_length"]) == (4096, 4096)
    assert record["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    json.dumps(record)
    loaded = longllm.load(out, dtype="fp32")
    assert loaded.model.model.rotary_emb.inv_freq[1].item() == pytest.approx(THETA**-0.25)


def test_bad_lines_of_merge_are_one_clear_error_and_leave_nothing(
    adapter: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    lines = {
        "not empty": ["--adapter", adapter, "--out", tmp_path / "full"],
        "nothing to merge": ["--adapter", tiny_folder, "--out", tmp_path / "out"],
        "unknown name 'gone'": ["--adapter", "gone", "--out", tmp_path / "out"],
        "rope must be KIND:NUMBER": ["--adapter", adapter, "--out", tmp_path / "out", "--rope", "spiral:2"],
        "a length (99) needs the RoPE settings": ["--adapter", adapter, "--out", tmp_path / "out", "--length", "99"],
        "required: --out": ["--adapter", adapter],
        "int4": ["--adapter", adapter, "--out", tmp_path / "out", "--dtype", "int4"],
    }
    for said, words in lines.items():
        assert longscope.main(["merge", *map(str, words)]) == 2, said
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_chat_through_a_pipe(piped: Any, adapter: Path, tmp_path: Path) -> None:
    document = tmp_path / "whale.txt"
    document.write_text("The whale is white and the sea is wide. " * 5)
    saved = tmp_path / "chat.json"
    lines = ["", "/help", f"/doc {document}", "Who?", "And?", "/undo", "/stats", f"/save {saved}", "/reset", "/stats"]
    text, record = piped([*lines, f"/load {saved}", "Go on.", "/again", "/quit", "never said"], model=str(adapter))
    assert "/undo       take the last message" in text
    assert "[read whale: " in text
    assert "[taken back: And?]" in text
    assert "[1 turns, " in text
    assert "of 4,096 tokens (trained on 4,096)" in text
    assert "[0 turns, 0 of 4,096 tokens" in text
    assert record["errors"] == []
    assert [entry["content"] for entry in record["messages"] if entry["role"] == "user"][1] == "Go on."
    assert (record["turns"], record["limit"]) == (2, 4096)
    answers = [entry["content"] for entry in record["messages"] if entry["role"] == "assistant"]
    assert answers[0] in text
    json.dumps(record)


def test_a_mistake_ends_the_line_and_not_the_chat(piped: Any, tiny_folder: Path) -> None:
    lines = ["/nope", "/doc", "/doc ./gone.txt", "/undo", "/again", "/load ./gone.json", "/save", "x " * 600, "hello"]
    text, record = piped(lines, model=str(tiny_folder))
    assert text.count("! ") == len(record["errors"]) == 8
    for said in ("unknown command /nope", "/doc needs a file", "gone.txt", "context ends at 512"):
        assert said in text
    assert record["turns"] == 1


def test_a_document_and_a_system_message_come_first(piped: Any, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sea.md").write_text("# The sea\n\nIt is wide.")
    text, record = piped(["Is it?"], model=str(tiny_folder), doc=str(tmp_path / "sea.md"), system="Be brief.")
    assert text.startswith("[read The sea: ")
    assert record["messages"][0] == {"role": "system", "content": "Be brief."}
    assert record["messages"][1]["content"].startswith("# The sea")


def test_other_positions_are_put_on_and_their_length_is_not_called_trained(piped: Any, tiny_folder: Path) -> None:
    text, record = piped(["x " * 300, "x " * 300, "/stats"], model=str(tiny_folder), rope="yarn:4")
    assert (record["limit"], record["trained_length"]) == (2048, 512)
    assert text.count("more than the 512 the model was trained for") == 1


def test_bad_options_of_chat_are_one_clear_error(
    tiny_folder: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = {
        "max_new_tokens must be at least 1": ["--max-new-tokens", "0"],
        "gone.txt": ["--doc", tmp_path / "gone.txt"],
        "is an adapter itself": ["--model", adapter, "--adapter", adapter],
        "is not an adapter": ["--model", tiny_folder, "--adapter", tiny_folder],
        "rope must be": ["--model", tiny_folder, "--rope", "yarn"],
    }
    for said, words in lines.items():
        assert longscope.main(["chat", *map(str, words)]) == 2, said
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_ctrl_c_ends_the_answer_and_not_the_chat(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    loaded = longllm.load(tiny_folder, dtype="fp32", attention="sdpa")
    talk = Talk(longllm.ChatSession(loaded, decoding=longllm.Decoding(max_new_tokens=300)))
    usual = signal.getsignal(signal.SIGINT)
    pieces = []
    for piece in talk.answered("hello"):
        pieces.append(piece)
        if len(pieces) == 4:
            signal.raise_signal(signal.SIGINT)
    assert 4 <= talk.session.turns[0].result.new_tokens < 10
    assert "[ended after" in "".join(pieces)
    assert signal.getsignal(signal.SIGINT) is usual
    assert list(talk.answered("go on"))
    # While a document is read, nothing of it is kept; a second Ctrl-C is the program's.
    hook = loaded.model.register_forward_pre_hook(lambda module, args: signal.raise_signal(signal.SIGINT))
    talk.session.reset()
    assert "".join(talk.answered("what does the sea")) == "[stopped while reading: nothing of it was kept]\n"
    hook.remove()
    assert talk.session.ids == ()
    answer = talk.answered("hello")
    next(answer)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    answer.close()
    assert signal.getsignal(signal.SIGINT) is usual


def test_ctrl_c_while_the_front_door_prints_ends_the_answer(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/stats\n"))
    real, said = longscope.say, []

    def say(text: str) -> None:
        real(text)
        said.append(text)
        if len(said) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(longscope, "say", say)
    words = ["chat", "--model", str(tiny_folder), "--max-new-tokens", "400", "--dtype", "fp32", "--attention", "sdpa"]
    assert longscope.main(words) == 0
    out = capsys.readouterr().out
    assert "[ended after" in out
    assert "[1 turns, " in out
    assert len(said) < 10


def test_doctor_shows_what_an_adapter_puts_in_force(adapter: Path, tiny_folder: Path) -> None:
    *pieces, record = doctor(model=str(adapter))
    model = record["model"]
    assert model["adapter"]["base"] == str(tiny_folder)
    assert (model["trained_length"], model["claimed_length"]) == (4096, 4096)
    assert f"the second is {THETA**-0.25:.4f}, that of theta 200,000,000" in model["effective_rope"]["inv_freq"]
    assert model["stop_tokens"] == {"<|im_end|>": 2}
    assert "effective rope" in "".join(pieces)


def test_quantised_chat_keeps_the_adapter_beside_the_weights(piped: Any, adapter: Path) -> None:
    pytest.importorskip("bitsandbytes")
    loaded = longllm.load(adapter, dtype="fp32", quantised=True)
    assert {weight.dtype for weight in loaded.model.parameters()} >= {torch.uint8}
    _, record = piped(["hello"], model=str(adapter), quantised=True)
    assert record["turns"] == 1
