"""LoTRA: low tensor-rank adaptation of Kolmogorov–Arnold networks, as a PEFT method.

Importing this package registers LoTRA with PEFT, for `get_peft_model`, `PeftModel.from_pretrained` and the rest.
"""

from .analysis import activation_curves, coefficient_updates, effective_coefficients, update_spectrum
from .coefficients import infer_coefficients, register_kan_layer, registered_kan_layers, verify_coefficients
from .config import LoTRAConfig
from .extraction import extract_adapter
from .gauss_newton import GaussNewtonResult, fit_gauss_newton
from .hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from .initialization import initialize_lotra_weights
from .layer import LoTRALayer
from .lora_conversion import convert_to_lora, save_as_lora
from .model import LoTRAModel
from .optimizers import create_lotra_optimizer, lotra_parameter_groups
from .plotting import plot_activations, plot_spectrum
from .ranks import suggest_ranks
from .registration import register
from .slim import slim_kan
from .spectrum import Spectrum
from .standin import PerformanceWarning

__version__ = "0.1.0"

__all__ = [
    "GaussNewtonResult",
    "LoTRAConfig",
    "LoTRALayer",
    "LoTRAModel",
    "PerformanceWarning",
    "Spectrum",
    "activation_curves",
    "coefficient_updates",
    "convert_to_lora",
    "create_lotra_optimizer",
    "effective_coefficients",
    "extract_adapter",
    "fit_gauss_newton",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "infer_coefficients",
    "initialize_lotra_weights",
    "lotra_parameter_groups",
    "plot_activations",
    "plot_spectrum",
    "register_kan_layer",
    "registered_kan_layers",
    "save_as_lora",
    "slim_kan",
    "suggest_ranks",
    "update_spectrum",
    "verify_coefficients",
]

register(LoTRAConfig, LoTRAModel)
