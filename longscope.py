"""The front door: a table from command name to function, resolved only when that command is called.

A command is an ordinary typed function in ``commands/``. It returns or yields; it never prints:

* a ``str`` is for people and goes to stdout as it comes (an answer streams token by token);
* a ``dict`` is the machine-readable result, printed as one line, the last on stdout, under ``--json``
  (which leaves the ``str`` pieces out).

Its signature is the command line: required parameters are positional, keyword-only ones are options (required
if without default), a ``bool`` is ``--flag`` or ``--no_flag``, a required ``list[str]`` takes several words;
dashes may stand for underscores. Its docstring is the help. ``ValueError``, ``TypeError``, ``ImportError``
and ``OSError`` become one line on stderr and exit code 2; with LONGSCOPE_DEBUG=1 the traceback is shown.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

__version__ = "0.1.0"

#: command name (one or two words) -> ("module:function", one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "ask": ("commands.ask:ask", "answer a question about a document with a long-context model"),
    "chat": ("commands.chat:chat", "talk with a model in the terminal, about a document if you like"),
    "merge": ("commands.merge:merge", "put an adapter into its base model and save an ordinary model folder"),
    "models": ("commands.models:models", "list the models and data sets the catalog knows, with licences"),
    "fetch": ("commands.fetch:fetch", "download a model or data set of the catalog, verified and converted"),
    "doctor": (
        "commands.doctor:doctor",
        "show versions, processor features and the attention paths that work",
    ),
    "eval passkey": ("commands.eval_passkey:passkey", "find a number again that a long text states once"),
    "eval needle": ("commands.eval_needle:needle", "needle in a haystack: a grid of lengths and depths, with heat map"),
    "eval topic": ("commands.eval_topic:topic", "name the first topic of a long record of conversations (LongEval)"),
    "eval ruler": ("commands.eval_ruler:ruler", "needles, variables, word counts and questions at any length (RULER)"),
    "eval grid": ("commands.eval_grid:grid", "ask for needles at all depths and a pass key, each text read once"),
    "eval compare": ("commands.eval_grid:compare", "put finished grids next to each other: table and heat maps"),
    "train longllm": (
        "commands.train_longllm:train_longllm",
        "extend a model's context by LoRA or QLoRA",
    ),
    "train beacon": ("commands.train_beacon:train_beacon", "train beacons, which hold what a model has read"),
    "plan": ("commands.plan:plan", "predict memory and time of a training run, and what makes it fit"),
    "synth requests": (
        "commands.synth:requests",
        "write requests for questions and answers about a corpus, for any OpenAI-compatible endpoint",
    ),
    "synth run": ("commands.synth:run", "send such requests: limits, retries, cost log, resume"),
    "synth assemble": ("commands.synth:assemble", "make training conversations of the answers"),
    "synth offline": (
        "commands.synth_offline:synth_offline",
        "make long questions and answers from real texts, without a language model",
    ),
    "synth texts": ("commands.synth_texts:synth_texts", "cut real texts into rows of plain text, to pre-train on"),
    "eval longbench": ("commands.eval_longbench:longbench", "LongBench v1: 21 long-context tasks, parity scores"),
    "eval infinitebench": ("commands.eval_infinitebench:infinitebench", "InfiniteBench: 12 tasks beyond 100K tokens"),
    "eval mmlu": ("commands.eval_mmlu:mmlu", "MMLU by the likelihood of the options: short-context knowledge"),
    "eval perplexity": (
        "commands.eval_perplexity:perplexity",
        "perplexity of long texts by sliding windows and by length of context",
    ),
    "eval generation": ("commands.eval_generation:generation", "answers to conversations, scored by ROUGE"),
    "serve": ("commands.serve:serve", "serve a model to OpenAI-compatible programs, on this machine alone"),
    "demo": ("commands.demo:demo", "open the workbench in a browser, on this machine alone"),
    "tour": ("commands.tour:tour", "run every system's main job once and write out/tour/index.html"),
}
HELP = ("-h", "--help", "help")


class ReaderLeft(Exception):
    """The program that read stdout (``head``, ``less``) is gone: not an error, but the end."""


def usage(verb: str = "") -> str:
    """Return the top-level help text, or only the commands that start with ``verb``.

    >>> "longscope ask" in usage()
    True
    """
    chosen = {name: line for name, (_, line) in COMMANDS.items() if verb in ("", name.split()[0])}
    width = max(map(len, chosen))
    lines = [
        "usage: longscope COMMAND [options]      (longscope COMMAND --help explains one command)",
        "",
        "A workbench for long-context language models and multimodal retrieval.",
        "",
        *(f"  longscope {name:<{width}}  {line}" for name, line in chosen.items()),
        "",
        "Every command takes --json: one line of JSON, the last on stdout, instead of text.",
        'try: longscope ask --doc sotu/1963 "Who gave his life over the island of Cuba?"',
    ]
    return "\n".join(lines)


def verbs() -> set[str]:
    """Return the first words of the two-word commands."""
    return {name.split()[0] for name in COMMANDS if " " in name}


def hint(typed: str, names: Iterable[str]) -> str:
    """Return ``" (did you mean X?)"`` for the names that look like ``typed``, or nothing.

    >>> hint("fetsh", ["ask", "fetch"])
    ' (did you mean fetch?)'
    """
    from difflib import get_close_matches

    close = get_close_matches(typed, list(names))
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def resolve(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split the command line into the command's name (one or two words) and its arguments.

    Raises:
        ValueError: if no command of the table starts the line.

    >>> resolve(["fetch", "sotu"])
    ('fetch', ['sotu'])
    """
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in COMMANDS:
            return name, list(words[count:])
    if words[0].startswith("-"):
        raise ValueError(f"options come after the command, got {words[0]!r} first; see longscope --help")
    typed = " ".join(words[:2]) if words[0] in verbs() else words[0]
    close = hint(" ".join(words[:2]), COMMANDS) or hint(typed, [*COMMANDS, *verbs()])
    raise ValueError(f"unknown command {typed!r}{close}; the commands are: {', '.join(COMMANDS)}")


def parse(name: str, arguments: Sequence[str]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the function of command ``name`` and its arguments (plus ``json``), read from the command line.

    Raises:
        ValueError: naming the option that is unknown, missing or of the wrong type.
    """
    module, _, attribute = COMMANDS[name][0].partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    # Imported here: these cost more time than all of `longscope --help`.
    import argparse
    import inspect

    import docstring_parser
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    document = inspect.getdoc(function) or COMMANDS[name][1]
    layout = (argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter)
    parser = jsonargparse.ArgumentParser(
        prog=f"longscope {name}",
        description=re.split(r"\n+(?=(?:Args|Returns|Yields|Raises|Examples?):\n|>>> )", document)[0],
        formatter_class=type("HelpLayout", layout, {}),
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of text")
    parameters = inspect.signature(function).parameters
    special: dict[str, dict[str, Any]] = {}
    for key, parameter in parameters.items():
        kind = inspect.formatannotation(parameter.annotation).strip("'")
        required, positional = parameter.default is parameter.empty, parameter.kind < parameter.KEYWORD_ONLY
        if kind == "bool" and not required:
            switch = jsonargparse.ActionYesNo(no_prefix="no_")
            special[f"--{key}"] = {"action": switch, "default": parameter.default}
        elif kind == "list[str]" and required and positional:
            special[key] = {"nargs": "+", "type": str}
    skip: set[str | int] = {key.lstrip("-") for key in special}
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=skip)
    told = {item.arg_name: item.description for item in docstring_parser.parse(document).params}
    for key, settings in special.items():
        parser.add_argument(key, help=told.get(key.lstrip("-")), **settings)
    # Dashes and underscores mean the same in an option's name: --max-new-tokens, --max_new_tokens.
    words = [re.sub(r"(?<=^--)[\w.-]+(?==|$)", lambda m: m[0].replace("-", "_"), word) for word in arguments]
    if "--config" in words:  # first, so that the rest of the line overrides the file wherever it stands
        place = words.index("--config")
        words = words[place : place + 2] + words[:place] + words[place + 2 :]
    try:
        options = parser.instantiate(parser.parse_args(words))
    except argparse.ArgumentError as error:
        named = [key for key in parameters if parameters[key].kind == inspect.Parameter.KEYWORD_ONLY]
        raise ValueError(f"{explain(str(error), named)} (see longscope {name} --help)") from error
    options.pop("config", None)
    return function, dict(vars(options))


def explain(message: str, options: Sequence[str]) -> str:
    """Put the parser library's message in the words of the command line.

    >>> explain("unrecognized arguments: --modle x", ["model"])
    'unrecognized arguments: --modle x (did you mean --model?)'
    >>> explain("the following arguments are required: question, doc", ["doc"])
    'the following arguments are required: question, --doc'
    """
    message = re.sub(r'Parser key "([^"]+)":\s*', r"\1: ", message)
    message = re.sub(r"<class '([\w.]+)'>", r"\1", message).replace("typing.", "")
    message = re.sub(r"Expected an? (.+)\. Got value: ", r"expected \1, got ", message)
    for name in options:
        message = re.sub(rf"(^|required: (?:.*, )?){name}(?=[:,]|$)", rf"\g<1>--{name}", message)
    unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
    return message + (hint(unknown[1], [f"--{name}" for name in options]) if unknown else "")


def emit(result: Any, wants_json: bool) -> None:
    """Print what a command returned or yielded: text as it comes, or only the last ``dict`` as one line.

    Raises:
        ReaderLeft: if stdout was closed by its reader.
    """
    pieces: Iterable[Any] = [result] if isinstance(result, (str, dict)) or result is None else result
    record: dict[str, Any] = {}
    last = "\n"
    try:
        for piece in pieces:
            if isinstance(piece, dict):
                record = piece
            elif piece and not wants_json:
                say(piece)
                last = piece
    finally:
        if not last.endswith("\n"):
            say("\n")
    if wants_json:
        say(json.dumps(record, ensure_ascii=False, default=str) + "\n")


def say(text: str) -> None:
    """Write to stdout at once. Only here does a broken pipe mean that the reader has left."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError as error:
        # Point stdout elsewhere, so that the interpreter's own last flush is silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ReaderLeft from error


def run(words: Sequence[str]) -> None:
    """Print help, the version, or what the command that ``words`` name gives."""
    if words[0] in HELP and len(words) > 1:
        words = [*words[1:], "--help"]
    if words[0] in HELP:
        say(usage() + "\n")
    elif words[0] in ("-V", "--version"):
        say(f"longscope {__version__}\n")
    elif words[0] in verbs() and words[1:2] in ([], ["--help"]):
        say(usage(words[0]) + "\n")
    else:
        try:
            function, arguments = parse(*resolve(words))
        except SystemExit:  # the parser has printed --help or --print_config
            say("")
        else:
            wants_json = bool(arguments.pop("json"))
            emit(function(**arguments), wants_json)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit code (0 done, 2 bad input, 130 interrupted)."""
    words = list(sys.argv[1:] if words is None else words)
    try:
        run(words or ["--help"])
    except ReaderLeft:
        return 0
    except (ValueError, TypeError, ImportError, OSError) as error:
        if os.environ.get("LONGSCOPE_DEBUG"):
            raise
        print(f"longscope: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("longscope: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
