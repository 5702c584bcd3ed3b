"""LoTRA: low tensor-rank adaptation of Kolmogorov–Arnold networks, as a PEFT method.

Importing this package registers LoTRA with PEFT, for `get_peft_model`, `PeftModel.from_pretrained` and others.
"""

from . import registration as _registration
from .adapters.extraction import extract_adapter
from .adapters.family import adapter_at, at_task, load_task, save_task
from .adapters.family_growth import add_task, change_range, family_from
from .adapters.from_lora import adapter_from_lora
from .adapters.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from .adapters.lora_conversion import convert_to_lora, save_as_lora
from .adapters.slim import slim_kan
from .analysis.summary import summary
from .analysis.updates import update_spectrum
from .coefficients import register_kan_layer, registered_kan_layers
from .config.lotra_config import LoTRAConfig
from .inference.search import infer_coefficients
from .inference.verify import verify_coefficients
from .layers.lotra import LoTRALayer
from .model import LoTRAModel
from .standin import PerformanceWarning
from .training.gauss_newton import GaussNewtonResult, fit_gauss_newton
from .training.initialization import initialize_lotra_weights
from .training.learning_rates import create_lotra_optimizer, lotra_parameter_groups
from .training.losses import OutputLoss
from .training.optimizer import GaussNewton
from .tucker.ranks import suggest_ranks

__version__ = "0.1.0"

__all__ = [
    "GaussNewton",
    "GaussNewtonResult",
    "LoTRAConfig",
    "LoTRALayer",
    "LoTRAModel",
    "OutputLoss",
    "PerformanceWarning",
    "adapter_at",
    "add_task",
    "adapter_from_lora",
    "at_task",
    "change_range",
    "convert_to_lora",
    "create_lotra_optimizer",
    "extract_adapter",
    "family_from",
    "fit_gauss_newton",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "infer_coefficients",
    "initialize_lotra_weights",
    "load_task",
    "lotra_parameter_groups",
    "register_kan_layer",
    "registered_kan_layers",
    "save_as_lora",
    "save_task",
    "slim_kan",
    "suggest_ranks",
    "summary",
    "update_spectrum",
    "verify_coefficients",
]

_registration.register(LoTRAConfig, LoTRAModel)
