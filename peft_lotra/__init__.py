"""LoTRA: low tensor-rank adaptation of Kolmogorov–Arnold networks, as a PEFT method.

Importing this package registers LoTRA with PEFT, for `get_peft_model`, `PeftModel.from_pretrained` and the rest.
"""

from .coefficients import register_kan_layer, registered_kan_layers
from .config import LoTRAConfig
from .layer import LoTRALayer
from .model import LoTRAModel
from .registration import register
from .standin import PerformanceWarning

__version__ = "0.1.0"

__all__ = [
    "LoTRAConfig",
    "LoTRALayer",
    "LoTRAModel",
    "PerformanceWarning",
    "register_kan_layer",
    "registered_kan_layers",
]

register(LoTRAConfig, LoTRAModel)
