"""KV-cache compression for long texts: methods behind one interface, their ledger and their contract.

::

    with beacon.compressing(model):
        cache = beacon.CompressedCache(model, beacon.method("snapkv"), beacon.Budget(ratio=8))
        model.generate(**inputs, past_key_values=cache)
        print(cache.ledger())

Activation Beacon, whose memory is trained rather than chosen::

    with beacon.installed(model, config, weights):
        model.generate(**inputs)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beacon.backbones import BACKBONES as BACKBONES
    from beacon.beacon_cache import BeaconCache as BeaconCache
    from beacon.budget import Budget as Budget
    from beacon.budget import parse_bytes as parse_bytes
    from beacon.cache import CompressedCache as CompressedCache
    from beacon.checkpoint import load_beacons as load_beacons
    from beacon.checkpoint import save_beacons as save_beacons
    from beacon.checkpoint import save_released as save_released
    from beacon.config import BeaconConfig as BeaconConfig
    from beacon.config import MemoryOptions as MemoryOptions
    from beacon.contract import ContractError as ContractError
    from beacon.contract import verify as verify
    from beacon.install import compressing as compressing
    from beacon.install import installed as installed
    from beacon.ledger import Ledger as Ledger
    from beacon.methods import METHODS as METHODS
    from beacon.methods import method as method
    from beacon.methods.activation_beacon import use_beacons as use_beacons
    from beacon.plan import RowPlan as RowPlan
    from beacon.reading import CHUNK as CHUNK
    from beacon.reading import read as read
    from beacon.recipe import Recipe as Recipe
    from beacon.saved import SavedCache as SavedCache
    from beacon.saved import fingerprint as fingerprint
    from beacon.saved import load_cache as load_cache
    from beacon.saved import save_cache as save_cache
    from beacon.scoring import Losses as Losses
    from beacon.scoring import losses as losses
    from beacon.scoring import score as score
    from beacon.steering import steer as steer
    from beacon.steering import steered_ratios as steered_ratios
    from beacon.steering import window_weights as window_weights
    from beacon.train import train_beacons as train_beacons
    from beacon.weights import BeaconWeights as BeaconWeights

# Public name -> its module, imported when the name is first used.
_HOME = {
    "BACKBONES": "backbones",
    "BeaconCache": "beacon_cache",
    "BeaconConfig": "config",
    "BeaconWeights": "weights",
    "Budget": "budget",
    "CHUNK": "reading",
    "CompressedCache": "cache",
    "ContractError": "contract",
    "Ledger": "ledger",
    "Losses": "scoring",
    "METHODS": "methods",
    "MemoryOptions": "config",
    "Recipe": "recipe",
    "RowPlan": "plan",
    "SavedCache": "saved",
    "compressing": "install",
    "fingerprint": "saved",
    "installed": "install",
    "load_beacons": "checkpoint",
    "load_cache": "saved",
    "losses": "scoring",
    "method": "methods",
    "parse_bytes": "budget",
    "read": "reading",
    "save_beacons": "checkpoint",
    "save_cache": "saved",
    "save_released": "checkpoint",
    "score": "scoring",
    "steer": "steering",
    "steered_ratios": "steering",
    "train_beacons": "train",
    "use_beacons": "methods.activation_beacon",
    "verify": "contract",
    "window_weights": "steering",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'beacon' has no attribute {name!r}")
    return getattr(importlib.import_module(f"beacon.{_HOME[name]}"), name)
