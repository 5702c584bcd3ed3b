"""LoTRA: low tensor-rank adaptation of Kolmogorov–Arnold networks, as a PEFT method.

Importing this package registers LoTRA with PEFT, for `get_peft_model`, `PeftModel.from_pretrained` and others.
"""

from . import registration as _registration
from .adapters.base import base_state_dict
from .adapters.extraction import extract_adapter
from .adapters.family import adapter_at, at_task, load_task, save_task
from .adapters.family_growth import add_task, change_range, family_from, normalize_codes, remove_task, rename_task
from .adapters.hotswap import hotswap_adapter
from .adapters.task_fit import fit_task
from .adapters.task_noise import task_noise
from .analysis.summary import summary
from .coefficients import register_kan_layer
from .config.lotra_config import LoTRAConfig
from .inference.search import infer_coefficients
from .inference.verify import verify_coefficients
from .layers.lotra import LoTRALayer
from .model import LoTRAModel
from .standin import PerformanceWarning
from .training.gauss_newton import fit_gauss_newton
from .training.initialization import initialize_lotra_weights
from .training.learning_rates import create_lotra_optimizer
from .training.losses import OutputLoss
from .training.optimizer import GaussNewton

__version__ = "0.1.0"

__all__ = [
    "GaussNewton",
    "LoTRAConfig",
    "LoTRALayer",
    "LoTRAModel",
    "OutputLoss",
    "PerformanceWarning",
    "adapter_at",
    "add_task",
    "at_task",
    "base_state_dict",
    "change_range",
    "create_lotra_optimizer",
    "extract_adapter",
    "family_from",
    "fit_gauss_newton",
    "fit_task",
    "hotswap_adapter",
    "infer_coefficients",
    "initialize_lotra_weights",
    "load_task",
    "normalize_codes",
    "register_kan_layer",
    "remove_task",
    "rename_task",
    "save_task",
    "summary",
    "task_noise",
    "verify_coefficients",
]

_registration.register(LoTRAConfig, LoTRAModel)
