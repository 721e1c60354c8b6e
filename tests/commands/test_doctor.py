"""``longscope doctor``: what it says is what the libraries themselves say."""

import json
import math
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

import longscope
from commands import doctor as doctor_module
from commands.doctor import doctor


def examined(**options: str) -> tuple[str, dict[str, Any]]:
    """Return the text and the record of one examination."""
    *pieces, record = doctor(**options)
    return "".join(pieces), record


def test_it_reports_this_machine() -> None:
    text, record = examined()
    assert record["versions"]["python"] == platform.python_version()
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["attention"]["reference"] == "ok"
    assert record["extras"].keys() >= {"read", "train", "cuda"}
    for title in ("versions", "machine", "attention", "extras", "catalog"):
        assert f"\n{title}\n" in f"\n{text}"
    json.dumps(record)


def test_a_missing_or_old_package_of_an_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor_module._version
    fake = {"pypdf": None, "beautifulsoup4": "3.0"}
    monkeypatch.setattr(doctor_module, "_version", lambda name: fake[name] if name in fake else real(name))
    read = examined()[1]["extras"]["read"]
    assert "pypdf is missing" in read
    assert "beautifulsoup4 is 3.0, needs >=4.12" in read


def test_it_examines_a_model(tiny_folder: Path) -> None:
    text, record = examined(model=str(tiny_folder))
    model = record["model"]
    assert (model["usable"], model["architecture"], model["trained_length"]) == ("yes", "LlamaForCausalLM", 512)
    assert model["stop_tokens"] == {"<|im_end|>": 2}
    # Head size 8 and base 10,000: the slowest of four frequencies is 10000 ** (-6 / 8).
    assert f"6.3 to {2 * math.pi * 10000**0.75:,.0f} tokens" in model["effective_rope"]["inv_freq"]
    assert "chat template" in text


def test_a_model_that_cannot_be_used_is_a_finding_and_an_unknown_name_an_error(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    assert longscope.main(["doctor", "--model", str(tmp_path), "--json"]) == 0
    out, _ = capsys.readouterr()
    assert out.count("\n") == 1
    assert json.loads(out)["model"]["usable"].startswith("no: ")
    assert longscope.main(["doctor", "--model", "no-such-model"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
