"""The contract catches every injected fault, by the invariant that is about it, and passes the sound cache."""

import pytest

from bench.contract import FAULTS, SOUND, tiny_model, verdict

#: what must catch a fault: the invariant whose business it is
EXPECTED = {
    "silent no-op": "bytes fell",
    "position drift": "true positions",
    "first sample only": "bytes fell",
    "first sample's ranking for all": "bytes fell on every sample",
    "memory kept behind a view": "bytes fell",
    "drops at ratio 1": "ratio 1 is the plain model",
    "values beside wrong keys": "a slot is the token it claims to be",
    "compact positions, keys not turned": "a slot is the token it claims to be",
    "dropped prefix stays in one layer": "a dropped prefix is gone",
    "padding attended": "a row is itself in any batch",
}
IDS = [7 * step % 63 + 1 for step in range(128)]


@pytest.mark.parametrize("fault", FAULTS)
def test_an_injected_fault_is_caught(fault: str) -> None:
    kind, positions = FAULTS[fault]
    invariant, said = verdict(tiny_model(), IDS, kind, positions)
    assert invariant == EXPECTED[fault], said
    assert "contract broken" in said


@pytest.mark.parametrize("name", SOUND)
def test_the_sound_cache_passes(name: str) -> None:
    kind, positions = SOUND[name]
    assert verdict(tiny_model(), IDS, kind, positions) == ("-", "passed")
