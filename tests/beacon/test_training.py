"""Training beacons: what is minimised, what learns, and runs from start to end on a tiny model."""

import dataclasses
import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import beacon
from beacon.distillation import distilled_cross_entropy
from beacon.recipe import Beacons, Objective, Recipe, Texts
from beacon.scoring import row_losses, shifted
from beacon.train import Collator, Learner, beacons_to_train, train_beacons
from longllm.recipe import Base
from longllm.samples import load_samples
from training import Keeping, Optimisation

ROOT = Path(__file__).parents[2]


def module(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    spec.loader.exec_module(found := importlib.util.module_from_spec(spec))
    return found


hardship = module("hardship", ROOT / "tests" / "training" / "hardship.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return module("tiny_chat", ROOT / "tests" / "longllm" / "tiny_chat.py").build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows of two sentences said over and over, in an order that must be remembered; and some held out."""
    draws, place = random.Random(0), tmp_path_factory.mktemp("rows")
    words = ["whale", "sea", "grass", "sky", "captain", "key"]

    def row():
        chain = draws.sample(words, 4)
        return {"text": " ".join(f"The {chain[at % 4]} is {chain[(at + 1) % 4]}." for at in range(30))}

    for name, count in (("train", 40), ("eval", 4)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row()) + "\n" for _ in range(count)))
    return place


def recipe(folder, files, **changes):
    made = Recipe(
        base=Base(str(folder), dtype="fp32"),
        beacons=Beacons(window=16, ratio=(2, 4), rank=4),
        data=Texts((str(files / "train.jsonl"),), (str(files / "eval.jsonl"),), max_length=72),
        optimisation=Optimisation(learning_rate=0.01, max_steps=30),
        keeping=Keeping(log_every=5, eval_every=10, save_every=7),
    )
    for path, value in changes.items():
        section, name = path.split("__")
        made = dataclasses.replace(made, **{section: dataclasses.replace(getattr(made, section), **{name: value})})
    return made


def outcome(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    told = [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]
    return load_file(out / "beacons" / "beacons.safetensors"), told


def parts(folder, **wish):
    """Return the tiny model, beacons to train and their config."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    return (model, *beacons_to_train(model, Beacons(**{"window": 16, "ratio": (4,), **wish})))


def test_a_run_learns_and_its_beacons_are_loaded_again(folder, files, tmp_path):
    facts = train_beacons(recipe(folder, files), tmp_path)
    weights, lines = outcome(tmp_path)
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [10, 20, 30]
    assert set(evaluations[0]) == {"step", "eval_loss", "eval_loss_x2", "eval_loss_x4"}
    assert facts["finished"]
    assert facts["best"]["loss"] == min(line["eval_loss"] for line in evaluations)
    # Untrained, read by the same evaluation.
    held_out = samples_of(folder, files, "eval")
    model, fresh, config = parts(folder, rank=4, ratio=(2, 4))
    before = beacon.train.evaluation(held_out, config)
    with beacon.installed(model, config, fresh), torch.no_grad():
        untrained = before(Learner(model, fresh, config, Objective()).eval())["loss"]
    assert facts["best"]["loss"] < untrained - 0.3
    model, *_ = parts(folder)
    loaded = beacon.load_beacons(tmp_path / "beacons", model)
    assert loaded.rank == 4
    with beacon.installed(model, loaded.config, loaded), torch.no_grad():
        again = before(Learner(model, loaded, loaded.config, Objective()).eval())
    assert again == pytest.approx({name: value for name, value in facts["best"].items() if name != "step"}, abs=1e-6)
    for name in ("README.md", "facts.json", "config.json"):
        assert (tmp_path / "beacons" / name).is_file()
    assert json.loads((tmp_path / "run.json").read_text())["outcome"]["steps"] == 30
    assert weights["model.beacon_embed_tokens.weight"].shape == (1, 32)


def samples_of(folder, files, name):
    from longllm.loading import tokenizer_of

    return load_samples(tokenizer_of(folder, None), (str(files / f"{name}.jsonl"),), max_length=72)


def test_a_run_in_pieces_ends_as_one_in_one_go(folder, files, tmp_path):
    wish = recipe(folder, files, optimisation__max_steps=12, beacons__ratio_mix="instance-random")
    assert not train_beacons(dataclasses.replace(wish, keeping=Keeping(save_every=5, minutes=1e-9)), tmp_path / "cut")[
        "finished"
    ]
    assert train_beacons(wish, tmp_path / "cut")["resumed"] == 1
    train_beacons(wish, tmp_path / "straight")
    for one, other in zip(outcome(tmp_path / "cut"), outcome(tmp_path / "straight"), strict=True):
        if isinstance(one, dict):
            assert all(torch.equal(one[name], other[name]) for name in other)


def test_another_recipe_is_refused_in_the_folder_of_a_run(folder, files, tmp_path):
    wish = recipe(folder, files, optimisation__max_steps=2)
    train_beacons(wish, tmp_path)
    with pytest.raises(ValueError, match=r"recipe\.beacons\.rank 4 there and 2 here"):
        train_beacons(dataclasses.replace(wish, beacons=dataclasses.replace(wish.beacons, rank=2)), tmp_path)


def test_fine_tuning_goes_on_from_pre_trained_beacons_on_conversations(folder, files, tmp_path):
    train_beacons(recipe(folder, files, optimisation__max_steps=3), tmp_path / "first")
    talk = [{"role": "user", "content": "The key is 7. " * 12 + "What is it?"}, {"role": "assistant", "content": "7"}]
    (tmp_path / "talks.jsonl").write_text((json.dumps({"conversations": talk}) + "\n") * 4)
    wish = recipe(folder, files, beacons__ratio=(2,), beacons__start=str(tmp_path / "first" / "beacons"))
    wish = dataclasses.replace(
        wish,
        data=Texts((str(tmp_path / "talks.jsonl"),), max_length=200),
        keeping=Keeping(),
        beacons=dataclasses.replace(wish.beacons, rank=0, window=0),
    )
    facts = train_beacons(wish, tmp_path / "second")
    assert (facts["ratios"], facts["rank"], facts["window"]) == ([2], 4, 16)
    # What is learned are the assistant's words alone.
    lines = (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["targets"] < 60
    with pytest.raises(ValueError, match=r"have window 16: beacons\.window asks for 8"):
        train_beacons(dataclasses.replace(wish, beacons=dataclasses.replace(wish.beacons, window=8)), tmp_path / "no")


@pytest.mark.parametrize(
    ("wish", "learning"),
    [
        ({}, "embed k q v"),
        ({"learn": ("embedding",)}, "embed"),
        ({"learn": ("k", "v"), "param": ("k", "v", "o")}, "k v"),
        ({"rank": 2, "learn": ("v",)}, "v"),
    ],
    ids=str,
)
def test_what_learns_is_what_the_recipe_names(folder, wish, learning):
    _, weights, _ = parts(folder, **wish)
    named = {name for name, each in weights.released_parameters().items() if each.requires_grad}
    kinds = {"embed" if "embed" in name else name.split("beacon_")[1][0] for name in named}
    assert " ".join(sorted(kinds)) == learning


def test_beacons_learn_in_fp32_beside_a_model_in_bf16(folder):
    model, *_ = parts(folder)
    model.to(torch.bfloat16)
    for rank in (0, 4):
        weights, config = beacons_to_train(model, Beacons(window=16, ratio=(4,), rank=rank))
        ids = torch.randint(3, 90, (1, 60))
        with beacon.installed(model, config, weights):
            found = beacon.losses(model, ids, ids, config)
            found.mean.backward()
        assert found.mean.dtype == weights.embed_tokens.grad.dtype == torch.float32
        assert float(weights.embed_tokens.grad.abs().sum()) > 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_distillation_is_the_dense_writing(share, temperature):
    hidden, teacher = (torch.randn(11, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, targets = torch.randn(17, 6, dtype=torch.float64), torch.randint(0, 17, (11,))
    targets[3] = -100
    found = distilled_cross_entropy(hidden, teacher, weight, targets, share=share, temperature=temperature, chunk=4)
    student, taught = hidden @ weight.T, (teacher @ weight.T).detach()
    sharp = torch.nn.functional.cross_entropy(student, targets, reduction="sum")
    truth = torch.softmax(taught / temperature, -1)
    apart = (truth * (truth.log() - torch.log_softmax(student / temperature, -1))).sum(-1)[targets >= 0].sum()
    expected = (1 - share) * sharp + share * temperature**2 * apart
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for factor in (1.0, 0.25):
        again = distilled_cross_entropy(hidden, teacher, weight, targets, share=share, temperature=temperature, chunk=4)
        mine = torch.autograd.grad(factor * again, hidden)[0]
        theirs = torch.autograd.grad(factor * expected, hidden, retain_graph=True)[0]
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_the_teacher_reads_the_whole_text_without_beacons(folder):
    model, weights, config = parts(folder)
    ids = torch.randint(3, 90, (1, 60))
    alone = model.get_decoder()(input_ids=ids).last_hidden_state
    with beacon.installed(model, config, weights):
        rule = Objective(distil=1.0)
        targets = shifted(ids, config, rule, training=True)
        far = row_losses(model, ids, targets, beacon.BeaconCache(model, config), rule)
        # Nothing is compressed at ratio 0: student and teacher read the same.
        whole = dataclasses.replace(config, ratio=(0,))
        near = row_losses(model, ids, targets, beacon.BeaconCache(model, whole), rule)
        states = model.get_decoder()(input_ids=ids, past_key_values=beacon.BeaconCache(model, config)).last_hidden_state
    head = model.get_output_embeddings().weight
    expected = distilled_cross_entropy(states[0], alone[0], head, targets[0], share=1.0)
    torch.testing.assert_close(far[0], expected, rtol=1e-4, atol=1e-4)
    assert float(far.detach()) > 1 > 1e-3 > float(near.detach())


def test_windows_that_count_and_windows_without_beacons_are_a_choice(folder):
    model, weights, config = parts(folder)
    ids = torch.randint(3, 90, (1, 40))
    counted = {}
    with beacon.installed(model, config, weights), torch.no_grad():
        for first in ("auto", "count", "skip"):
            model.train()
            counted[first] = int(beacon.losses(model, ids, ids, config, Objective(first_window=first)).counted)
        model.eval()
        in_use = beacon.losses(model, ids, ids, config).rows
        model.train()
        reference = beacon.losses(model, ids, ids, config).rows
        as_in_use = beacon.losses(model, ids, ids, config, Objective(last_window="beacons")).rows
        plain = beacon.losses(model, ids, ids, config, Objective(last_window="plain")).rows
    assert counted == {"auto": 39, "count": 39, "skip": 23}
    assert torch.equal(as_in_use, in_use)
    assert torch.equal(plain, reference)
    assert not torch.allclose(reference, in_use)


def test_a_batch_of_unequal_rows_costs_what_the_rows_cost_alone(folder, files):
    model, weights, config = parts(folder)
    (files / "mixed.jsonl").write_text(
        "".join(json.dumps({"text": "The sea is wide. " * count}) + "\n" for count in (9, 5, 9))
    )
    collate = Collator(samples_of(folder, files, "mixed"), config, Objective())
    assert collate.windows == [3, 2, 3]
    learner = Learner(model, weights, config, Objective()).train()
    with beacon.installed(model, config, weights), torch.no_grad():
        batch = collate([0, 1, 2], ["a", "b", "c"])
        assert [len(group["ids"]) for group in batch["groups"]] == [1, 2]
        together = learner(batch["groups"], 0)
        alone = [collate([row], ["a"]) for row in range(3)]
        each = sum(learner(one["groups"], 0) for one in alone)
    assert batch["weight"] == sum(one["weight"] for one in alone)
    torch.testing.assert_close(together, each)


def test_ratios_are_drawn_anew_for_every_step_and_process(folder, files):
    _, _, config = parts(folder)
    collate = Collator(samples_of(folder, files, "train"), config, Objective())
    seeds = {collate([0], [word])["seed"] for word in ("0/0/0", "0/0/1", "0/1/0")}
    assert len(seeds) == 3
    assert collate([0], ["0/0/1"])["seed"] in seeds


def test_two_processes_train_as_one_with_twice_the_batch(folder, files, tmp_path):
    # At one ratio: which is drawn for a row depends on the other rows of its pass.
    wish = recipe(folder, files, optimisation__max_steps=4, beacons__ratio=(4,), data__strict=True)
    wish = dataclasses.replace(wish, keeping=Keeping())
    one = dataclasses.replace(wish, optimisation=dataclasses.replace(wish.optimisation, batch_size=2))
    train_beacons(one, tmp_path / "one")
    hardship.run_pair(train_beacons, wish, tmp_path / "two")
    (alone, _), (shared, _) = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    # Adam makes steps of 0.01 of whatever gradient there is, so rounding shows.
    assert all(torch.allclose(alone[name], shared[name], atol=2e-4) for name in alone)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Beacons(learn=("mlp",)), "learn must name some of embedding, q, k, v, o, got 'mlp'"),
        (lambda: Beacons(learn=()), "nothing would be trained"),
        (lambda: Beacons(rank=-1), "must be 0 or more"),
        (lambda: Beacons(window=10, ratio=(3, 4)), "nothing to choose from"),
        (lambda: Texts(min_length=9, max_length=3), "got 9, 3"),
        (lambda: Texts(ratios=(-2,)), "ratios must be 0 or more"),
        (lambda: Objective(distil=1.5), "distil must lie between 0 and 1"),
        (lambda: Objective(first_window="all"), "first_window must be one of auto, count, skip"),
        (lambda: Recipe(base=Base(dtype="fp16")), "its gradients overflow"),
        (lambda: Recipe(base=Base(recompute="offload")), "recompute whole windows"),
        (lambda: Recipe(base=Base(nf4=True)), "set beacons.rank, or nf4 off"),
        (lambda: Recipe(keeping=Keeping(eval_every=5)), "needs data.evaluate"),
        (lambda: train_beacons(Recipe(), Path("nowhere")), "data.train must name at least one file"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_nothing_to_learn_and_nothing_to_judge_are_refused(folder, files, tmp_path):
    with pytest.raises(ValueError, match=r"beacons\.learn \(o\) names nothing that these beacons have"):
        parts(folder, learn=("o",))
    wish = recipe(folder, files, beacons__window=512, objective__last_window="beacons")
    with pytest.raises(ValueError, match=r"no row of data\.evaluate has targets after its first window of 512 tokens"):
        train_beacons(wish, tmp_path)
    with pytest.raises(ValueError, match="40 of 40 rows fill no more than a window of 512 tokens"):
        train_beacons(recipe(folder, files, beacons__window=512), tmp_path)


def test_a_full_disk_loses_nothing(folder, files, tmp_path):
    wish = recipe(folder, files, optimisation__max_steps=4, keeping__save_every=2, keeping__eval_every=0)
    train_beacons(dataclasses.replace(wish, keeping=Keeping(save_every=2, minutes=1e-9)), tmp_path)
    with hardship.full_disk(3000), pytest.raises(OSError, match="could not be written"):
        train_beacons(wish, tmp_path)
    assert train_beacons(wish, tmp_path)["finished"]
