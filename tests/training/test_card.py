"""The model card."""

import yaml

from training import model_card


def test_a_card_has_what_hubs_read_and_what_people_do() -> None:
    card = model_card(
        "tiny-32k",
        "Reaches 32K.",
        facts={"base": "tiny", "command": "`longscope train`"},
        figures=[{"length": "4K", "before": 1, "after": 2}, {"length": "8K", "after": 3}],
        notes=["Not measured beyond 32K."],
        metadata={"license": "apache-2.0", "base_model": "tiny"},
    )
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {"license": "apache-2.0", "base_model": "tiny"}
    assert body.removeprefix("\n").split("\n\n") == [
        "# tiny-32k",
        "Reaches 32K.",
        "- **base**: tiny\n- **command**: `longscope train`",
        "| length | before | after |\n|---|---|---|\n| 4K | 1 | 2 |\n| 8K | – | 3 |",
        "- Not measured beyond 32K.\n",
    ]
