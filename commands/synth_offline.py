"""``longscope synth offline``: long questions and answers from the catalog's texts, without a language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longllm.synthesis.offline import Mixture


def synth_offline(
    *,
    out: str,
    model: str = "smollm2-135m-instruct",
    mixture: Mixture = Mixture(),  # noqa: B008
) -> Iterator[str | dict[str, Any]]:
    """Make training rows of long questions and answers from real texts, without a language model.

    The texts are State of the Union addresses and the first part of Moby-Dick. The rest of the novel and some
    addresses are held out for evaluation. Validation rows come from texts of their own:

        longscope synth offline --out out/train.jsonl
        longscope synth offline --out out/held-out.jsonl --mixture.part validation --mixture.rows 60

    Args:
        out: file of training rows (JSON Lines); one that exists is replaced
        model: whose tokens are counted: a folder or a name of the catalog
        mixture: how many rows of what kinds and lengths
    """
    import catalog
    from longllm.loading import tokenizer_of
    from longllm.synthesis.offline import synthesise

    yield f"making {mixture.rows:,} rows …\n"
    facts = synthesise(tokenizer_of(catalog.path(model), None), mixture, out)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in facts["kinds"].items())
    yield f"{facts['file']}: {facts['rows']:,} rows ({kinds}), {facts['questions']:,} questions, "
    yield f"{facts['tokens']:,} tokens, {facts['shortest']:,} to {facts['longest']:,} a row, {facts['seconds']} s\n"
    yield facts
