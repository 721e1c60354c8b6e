"""What the reference gets wrong, done right: the deviations listed in beacon/windows.py that no other test is about.

Batches of unequal length: test_beacon_rows. Tokens kept whole, seeds: test_beacon_options. Beams, masks, embeddings:
test_beacon_generate. What is refused: test_beacon_config, test_beacon_refusals.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import beacon.windows

spec = importlib.util.spec_from_file_location("naive_beacon", Path(__file__).with_name("naive_beacon.py"))
slow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(slow)
IDS = torch.randint(1, 97, (1, 45), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("changes", [{"param": ()}, {"param": ("q",)}, {"sink_size": 2}, {"pos": "append"}], ids=str)
def test_joint_windows_are_the_serial_ones_for_every_projection_and_sink(changes):
    one, two = (slow.Engine(slow.stock("qwen2"), slow.settings(parallel_window=p, **changes)) for p in (1, 2))
    assert torch.equal(two.read(IDS), one.read(IDS))


@pytest.mark.parametrize("pieces", [[45], [3, 4, 38], [1] * 45], ids=len)
@pytest.mark.parametrize("sink", [1, 5])
def test_a_sink_duplicates_nothing_in_whatever_pieces_a_prompt_comes(sink, pieces):
    model = slow.stock("llama")
    whole, thin = (slow.Engine(model, slow.settings(ratio=(ratio,), sink_size=sink)) for ratio in (0, 2))
    cache = whole.cache()
    torch.testing.assert_close(whole.read(IDS, pieces=pieces, cache=cache), model(IDS).logits, rtol=0, atol=1e-9)
    assert cache.held == [45]
    cache = thin.cache()
    torch.testing.assert_close(thin.read(IDS, pieces=pieces, cache=cache), thin.read(IDS), rtol=0, atol=1e-9)
    # Five windows of four beacons, then five raw tokens and two beacons.
    assert (cache.plans[0].sink, cache.held) == (sink, [sink + 20 + 7])


def test_whether_the_last_window_gets_beacons_is_for_the_mode_of_the_model_to_say():
    engine = slow.Engine(slow.fresh("llama"), slow.settings())
    held = {}
    for mode in (True, False):
        engine.model.train(mode)
        cache = engine.cache()
        engine.read(IDS, cache=cache)
        held[mode] = cache.held
    assert held == {True: [20 + 5], False: [20 + 7]}


def test_the_list_of_deviations_names_the_tests_that_exist():
    listed = re.findall(r"^\* \*\*(.+?)\*\*", beacon.windows.__doc__, re.MULTILINE)
    assert len(listed) == 9
    assert __doc__ is not None
    for name in set(re.findall(r"test_beacon_\w+", __doc__)):
        assert Path(__file__).with_name(f"{name}.py").is_file()
