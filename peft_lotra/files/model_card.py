"""The README.md that is written beside an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

import peft
from peft import PeftModel

from ..tucker.decomposition import CORE
from .adapter_file import is_tucker_key
from .config_file import ConfigFile
from .slots import slots_of

CARD = "README.md"
_TAGS = ("- kan\n", "- lotra\n", "- peft\n")
_OURS = "<!-- peft_lotra replaces this text with each save. Remove this line to keep it as you changed it. -->"
_TEXT = """\
{ours}

# LoTRA adapter for {base}

A low tensor-rank update of the coefficient tensors of a Kolmogorov–Arnold network,
A + alpha · G ×₁ U1 ×₂ U2 ×₃ U3, for the library [PEFT](https://github.com/huggingface/peft).

- **License:** [More Information Needed]
- **Base model:** {base}

{adapters}## How to load it

```
pip install "peft-lotra>={version}"
```

```python
import peft_lotra  # tells PEFT what LoTRA is; without it, PEFT raises KeyError: 'LOTRA'
from peft import PeftModel

model = PeftModel.from_pretrained(base, {directory!r}{name})  # base: the {cls} that the adapter was trained on
```

A base with other coefficients gives a warning. The file's tensors are checked against a digest. `load_adapter` of
transformers models does not check it.

## Citation

```bibtex
@article{{lotra,
  title = {{Low Tensor-Rank Adaptation of Kolmogorov--Arnold Networks}},
  journal = {{arXiv preprint arXiv:2502.06153}},
  year = {{2025}}
}}
```

### Framework versions

- PEFT {peft}
- peft-lotra {version}
"""


def begin_card(model: Any, earlier: Path, path: Path, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Write the card to which PEFT adds: a user's own, or one of the adapters that are about to be saved."""
    text = earlier.read_text(encoding="utf-8") if earlier.exists() else _OURS
    if _OURS in text:
        names = kwargs.get("selected_adapters", args[1] if len(args) > 1 else None)
        own = [name for name, config in model.peft_config.items() if isinstance(config, ConfigFile)]
        known = [name for name in names or () if name in own] or own
        text = f"---\nlibrary_name: peft\ntags:\n{''.join(_TAGS)}---\n{_text(model, known)}"
    path.write_text(text, encoding="utf-8")


def add_tags(path: Path) -> None:
    """Add this method's tags. PEFT, which replaces tags by those of the model, has just written one tag to a line."""
    begin, end, rest = path.read_text(encoding="utf-8").partition("\n---")
    if missing := [tag for tag in _TAGS if tag not in f"{begin}\n"]:
        begin, _, others = begin.partition("\ntags:")
        path.write_text(f"{begin}\ntags:\n{''.join(missing).rstrip()}{others}{end}{rest}", encoding="utf-8")


@cache
def _version() -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("peft-lotra")
    return "0"  # the package is not installed, but on the path


def _text(model: PeftModel, names: list[str]) -> str:
    base = model.get_base_model()
    kind, known_as = type(base).__name__, getattr(base, "name_or_path", None) or ""
    return _TEXT.format(
        ours=_OURS,
        base=f"`{known_as}`" if known_as else f"a `{kind}`",
        cls=kind,
        adapters="".join(_lines(model, name) for name in names),
        directory="." if "default" in names else names[0],
        name="" if "default" in names else f", {names[0]!r}",
        peft=peft.__version__,
        version=_version(),
    )


def _lines(model: PeftModel, name: str) -> str:
    """What an adapter is, for people."""
    config: Any = model.peft_config[name]
    targets = [target for _, target in config.saved_targets()]
    sizes = {key: prod(slot.shape) for key, (_, slot) in slots_of(model, name, config.bias).items()}
    frozen = sum(size for key, size in sizes.items() if is_tucker_key(key) and f".{CORE}" not in f".{key}")
    trained = sum(sizes.values()) - (frozen if config.freeze_factors else 0)
    ranks = sorted({str(target.ranks) for target in targets})
    total = sum(prod(target.spec.layout.canonical_shape) for target in targets)
    lines = [
        f"**{name}**: {len(targets)} coefficient tensors with {total:,} coefficients; ranks {_some(ranks, 4)}\n",
        f"- {trained:,} trained and {sum(sizes.values()):,} stored numbers",
    ]
    if (family := config.kind) is not None:
        lines += [f"- a family: {parameter} from {a:g} to {b:g}" for parameter, (a, b) in family.ranges.items()]
        if family.tasks:
            codes = f" with codes of {family.code}" if family.code else ""
            lines.append(f"- a family of {len(family.tasks)} tasks{codes}: {_some(family.tasks, 20)}")
    return "\n".join([*lines, "", ""])


def _some(names: Sequence[str], most: int) -> str:
    return ", ".join([*names[:most], *["…"] * (len(names) > most)])
