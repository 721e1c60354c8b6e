"""Merging: one folder with weights and context in it, or none."""

import errno
import shutil
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

import longllm
from longllm.context import Context
from longllm.merge import merge

THETA = 2e8
PROBE = torch.arange(3, 43).unsqueeze(0)


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    """Return the logits [40, vocab] of a probe."""
    with torch.inference_mode():
        return model(input_ids=PROBE).logits[0]


def listing(folder: Path) -> list[str]:
    """Return what a folder holds, hidden entries included."""
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(scope="module")
def made(tiny_chat: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of each kind, and their base models, by name."""
    root = tmp_path_factory.mktemp("made")
    found = {}
    for tied in (False, True):
        word = "tied" if tied else "untied"
        base = tiny_chat.build(root / f"base-{word}", tie_word_embeddings=tied, initializer_range=0.2)
        context = Context({"rope_type": "default", "rope_theta": THETA}, 4096, str(base), trained=True)
        found[f"base {word}"] = base
        for kind, settings in {
            "lora": {},
            "embedding": {"modules_to_save": ["embed_tokens"]},
            "tokens": {"trainable_token_indices": [1, 2, 70]},
        }.items():
            found[f"{kind} {word}"] = tiny_chat.adapter(root / f"{kind}-{word}", base, context, **settings)
    return found


@pytest.mark.parametrize("kind", ["lora", "embedding", "tokens"])
@pytest.mark.parametrize("word", ["tied", "untied"])
def test_merged_answers_as_attached_and_theta_survives(
    made: dict[str, Path], tmp_path: Path, kind: str, word: str
) -> None:
    adapter, out = made[f"{kind} {word}"], tmp_path / "merged"
    done = merge(adapter, out, dtype="fp32", max_shard_size="60KB")
    attached = longllm.load(adapter, dtype="fp32", attention="sdpa", device="cpu", merge=False)
    # Any library loads it, without us.
    plain, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    wanted = logits(attached.model)
    assert (logits(plain) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert plain.model.rotary_emb.inv_freq[1].item() == pytest.approx(THETA**-0.25)
    assert plain.config.max_position_embeddings == 4096
    # Save, load, merge, save and load again: nothing wears off.
    again = longllm.load(out, dtype="fp32", attention="sdpa", device="cpu")
    again.model.save_pretrained(tmp_path / "again")
    again.tokenizer.save_pretrained(tmp_path / "again")
    last = longllm.load(tmp_path / "again", dtype="fp32", attention="sdpa", device="cpu")
    torch.testing.assert_close(logits(last.model), logits(plain), rtol=0, atol=0)
    assert last.model.model.rotary_emb.inv_freq[1].item() == pytest.approx(THETA**-0.25)
    assert again.trained_length == last.trained_length == done.trained_length == 4096
    assert again.stop_ids == attached.stop_ids
    assert "model.safetensors.index.json" in done.files
    assert len([name for name in done.files if name.startswith("model-")]) > 1
    assert listing(tmp_path) == ["again", "merged"]


@pytest.mark.parametrize(("asked", "expected"), [("base", torch.bfloat16), ("fp16", torch.float16)])
def test_the_weights_have_the_type_of_the_base_or_the_asked_one(
    made: dict[str, Path], tmp_path: Path, asked: str, expected: torch.dtype
) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(made["base untied"], dtype="bfloat16")
    base.save_pretrained(tmp_path / "half")
    transformers.AutoTokenizer.from_pretrained(made["base untied"]).save_pretrained(tmp_path / "half")
    done = merge(made["lora untied"], tmp_path / "merged", base=tmp_path / "half", dtype=asked)
    assert done.dtype == str(expected).removeprefix("torch.")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {weight.dtype for weight in model.parameters()} == {expected}
    assert model.model.rotary_emb.inv_freq[1].item() == pytest.approx(THETA**-0.25)


def test_a_context_is_given_for_an_adapter_that_brings_none(
    made: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = Path(shutil.copytree(made["embedding untied"], tmp_path / "bare"))
    (bare / "context.json").unlink()
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    done = merge(bare, tmp_path / "merged", context=Context(yarn, 2048))
    assert not caplog.text
    loaded = longllm.load(tmp_path / "merged", attention="sdpa", dtype="fp32")
    # Trained under YaRN, so that what YaRN claims is what was trained; the configuration keeps it.
    assert done.trained_length == loaded.trained_length == 2048
    assert loaded.model.config.rope_parameters["rope_type"] == "yarn"
    merge(bare, tmp_path / "without")
    assert "has no context.json" in caplog.text


def test_all_stop_tokens_are_in_the_generation_configuration(made: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(made["base untied"], tmp_path / "base"))
    settings = transformers.GenerationConfig.from_pretrained(base)
    settings.eos_token_id = 0  # as Llama-3's: the end of the text, not that of the turn
    settings.save_pretrained(base)
    merge(made["lora untied"], tmp_path / "merged", base=base)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [0, 2]


def test_a_folder_with_something_in_it_is_replaced_only_by_force(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    merge(made["lora tied"], out)  # empty: nothing to lose
    (out / "notes.txt").write_text("mine")
    before = listing(out)
    with pytest.raises(ValueError, match="not empty"):
        merge(made["lora tied"], out)
    assert listing(out) == before
    merge(made["lora tied"], out, force=True)
    assert "notes.txt" not in listing(out)
    assert listing(tmp_path) == ["merged"]


@pytest.mark.parametrize(
    ("adapter", "options", "said"),
    [
        ("base tied", {}, "nothing to merge"),
        ("lora tied", {"dtype": "int4"}, "dtype must be one of"),
        ("embedding untied", {"base": "lora tied"}, "is an adapter itself"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    made: dict[str, Path], tmp_path: Path, adapter: str, options: dict, said: str
) -> None:
    options = {key: made.get(value, value) for key, value in options.items()}
    with pytest.raises(ValueError, match=said):
        merge(made[adapter], tmp_path / "merged", **options)
    assert listing(tmp_path) == []


def test_neither_base_nor_adapter_nor_a_file_is_overwritten(made: dict[str, Path], tmp_path: Path) -> None:
    for place in ("base tied", "lora tied"):
        before = listing(made[place])
        with pytest.raises(ValueError, match="holds the base model or the adapter"):
            merge(made["lora tied"], made[place], force=True)
        assert listing(made[place]) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        merge(made["lora tied"], tmp_path / "file", force=True)


def test_a_disk_without_room_is_said_before_anything_is_loaded(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100, 90, 10))
    monkeypatch.setattr("longllm.merge.assemble", lambda *parts: pytest.fail("the model was loaded"))
    with pytest.raises(OSError, match="not enough disk space") as caught:
        merge(made["lora tied"], tmp_path / "deep" / "merged")
    assert caught.value.errno == errno.ENOSPC
    assert listing(tmp_path / "deep") == []


@pytest.mark.parametrize("moment", ["weights", "tokeniser", "rename"])
def test_an_error_on_the_way_leaves_the_old_folder_and_nothing_else(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    out = tmp_path / "merged"
    merge(made["lora tied"], out)
    before = {name: (out / name).read_bytes() for name in listing(out)}

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    real = Path.rename

    def stuck(self: Path, target: Path) -> Path:
        return full() if ".new-" in self.name else real(self, target)

    if moment == "weights":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    elif moment == "tokeniser":
        monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
    else:
        monkeypatch.setattr(Path, "rename", stuck)
    with pytest.raises(OSError, match="not enough disk space"):
        merge(made["embedding tied"], out, force=True)
    assert listing(tmp_path) == ["merged"]
    assert {name: (out / name).read_bytes() for name in listing(out)} == before
