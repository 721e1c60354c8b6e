"""Memory and time of a training or inference run before it starts, and which settings make it fit.

Everything is arithmetic on a model's configuration: no model is built, torch is not imported.
"""

from longllm.planning.knobs import Advice, Change, advise, advise_inference, longest, roomiest
from longllm.planning.memory import Memory, Setting, inference_memory, training_memory
from longllm.planning.probe import calibrated, measured_speed, probe
from longllm.planning.sizes import Sizes, read_sizes
from longllm.planning.work import Speed, Work, step_work

__all__ = [
    "Advice",
    "Change",
    "Memory",
    "Setting",
    "Sizes",
    "Speed",
    "Work",
    "advise",
    "advise_inference",
    "calibrated",
    "inference_memory",
    "longest",
    "measured_speed",
    "probe",
    "read_sizes",
    "roomiest",
    "step_work",
    "training_memory",
]
