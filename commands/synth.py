"""``longscope synth requests | run | assemble``: training data written by any OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from longllm.rate import Limits, Price
from longllm.synthesis.corpus import Fitness
from longllm.synthesis.dialogues import Assembly
from longllm.synthesis.requests import Recipe


def requests(
    source: str,
    *,
    out: str,
    recipe: Recipe = Recipe(),  # noqa: B008
    fitness: Fitness = Fitness(),  # noqa: B008
    tokenizer: str = "smollm2-135m-instruct",
    exclude: str = "",
) -> Iterator[str | dict[str, Any]]:
    """Cut a corpus into what a language model is to be asked about, and write the requests; nothing is sent yet.

    Five kinds (families): questions about single chunks, about whole texts, about several texts of one kind side by
    side, six set questions about papers, biographies of a book's characters:

        longscope synth requests books/ --out out/one --fitness.least 64000 --fitness.most 80000 --recipe.take 2000
        longscope synth requests books/ --out out/bio --recipe.family biography --recipe.take 150 --exclude out/one
        longscope synth requests sotu --out out/side --recipe.family cluster --recipe.context 32000
        longscope synth run out/one --url http://127.0.0.1:8000/v1 --model NAME
        longscope synth assemble out/one

    A batch service can send OUT/requests.jsonl as well (--recipe.service true --recipe.model NAME); its results file
    is OUT/results.jsonl then. Several folders after --exclude are parted by commas: --exclude out/one,out/bio.

    Args:
        source: JSON Lines with "text", a file, a folder of files, or texts of the catalog: sotu, moby-dick,
            moby-dick/chapters
        out: the folder of this stage; what is there already of the same stage is left as it is
        recipe: what is asked about which part of how many texts
        fitness: which texts are fit
        tokenizer: whose tokens are counted: a model of the catalog or a folder
        exclude: folders of other stages (A,B), none of whose texts is taken again
    """
    from longllm.synthesis import prepare, token_counter

    stages = [folder for folder in exclude.split(",") if folder]
    facts = prepare(
        source, out, recipe, token_counter(tokenizer), fitness=fitness, exclude=stages, tokenizer_name=tokenizer
    )
    left = counted(facts["left_out"])
    yield f"{out}: {facts['requests']:,} requests about {facts['documents']:,} texts"
    yield f" ({facts['context_tokens']:,} tokens of them; left out: {left})\n"
    yield {**facts, "folder": out}


def run(
    folder: str,
    *,
    url: str,
    model: str,
    key_variable: str = "OPENAI_API_KEY",
    limits: Limits = Limits(),  # noqa: B008
    price: Price = Price(),  # noqa: B008
) -> Iterator[str | dict[str, Any]]:
    """Send the requests of a folder to an OpenAI-compatible endpoint; what has been answered is never sent again.

    Interrupted, the same command goes on; requests that failed are tried again. Tokens and cost of every answer go to
    FOLDER/usage.jsonl:

        longscope synth run out/one --url https://api.openai.com/v1 --model gpt-4.1-mini --price.prompt 0.4
        longscope synth run out/one --url http://127.0.0.1:8000/v1 --model NAME --limits.concurrency 64

    Args:
        folder: where ``longscope synth requests`` wrote
        url: the endpoint: what comes before /chat/completions
        model: the name that the endpoint knows the model by
        key_variable: the environment variable with the key, where the endpoint wants one
        limits: how many requests at once and in a minute, and how often to try
        price: of a million tokens, for the log
    """
    from longllm import batch
    from longllm.endpoint import Endpoint

    place = Path(folder).expanduser()
    if not (place / "requests.jsonl").is_file():
        raise FileNotFoundError(f"there is no {place / 'requests.jsonl'}: longscope synth requests writes it")
    with Endpoint(
        url, model, key_variable=key_variable, limits=limits, price=price, usage_log=place / "usage.jsonl"
    ) as endpoint:
        facts = batch.run(endpoint, place / "requests.jsonl", place / "results.jsonl", progress=True)
    tokens = facts["prompt_tokens"] + facts["completion_tokens"]
    yield f"{facts['answered']:,} of {facts['requests']:,} requests answered now, {facts['before']:,} before"
    yield f", {facts['failed']:,} failed; {tokens:,} tokens, cost {facts['cost']:.4f}\n"
    if facts["failed"]:
        yield "the failed ones are tried again when the same command is given again\n"
    yield {**facts, "folder": folder}


def assemble(
    folder: str,
    *,
    assembly: Assembly = Assembly(),  # noqa: B008
    tokenizer: str = "",
    results: str = "",
    out: str = "",
) -> Iterator[str | dict[str, Any]]:
    """Make training conversations of the answers in a folder, and say what was dropped and why.

    Consecutive chunks of a text are put together again up to the target length; the questions about one context become
    one conversation. It can be given as often as wanted, with other settings and files:

        longscope synth assemble out/one --assembly.target 16000 --out out/one-16k.jsonl

    Args:
        folder: where ``longscope synth requests`` and ``run`` wrote
        assembly: length of the contexts, number and order of the questions
        tokenizer: whose tokens are counted; that of the requests unless given
        results: another results file, such as a batch service's
        out: file of training rows (JSON Lines); FOLDER/train.jsonl unless given
    """
    from longllm.synthesis import assemble as put_together
    from longllm.synthesis import token_counter

    place = Path(folder).expanduser()
    if not (place / "recipe.json").is_file():
        raise FileNotFoundError(f"there is no {place / 'recipe.json'}: longscope synth requests writes it")
    name = tokenizer or json.loads((place / "recipe.json").read_text(encoding="utf-8"))["tokenizer"]
    facts = put_together(place, token_counter(name), assembly, results=results, out=out)
    yield f"{facts['file']}: {facts['rows']:,} conversations, {facts['pairs']:,} questions, {facts['tokens']:,} tokens"
    yield f" ({facts['shortest']:,} to {facts['longest']:,} each)\n"
    yield f"{facts['used']:,} of {facts['requests']:,} requests used; dropped: {counted(facts['dropped'])}; "
    yield f"pairs dropped: {counted(facts['pairs_dropped'])}\n"
    yield facts


def counted(numbers: Mapping[str, int]) -> str:
    """Return numbers by reason in words.

    >>> counted({"too long": 1200, "empty": 1})
    '1,200 too long, 1 empty'
    >>> counted({})
    'none'
    """
    return ", ".join(f"{number:,} {reason}" for reason, number in numbers.items()) or "none"
