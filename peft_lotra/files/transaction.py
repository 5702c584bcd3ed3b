"""A PeftModel with LoTRA adapters writes each adapter as a whole, and loads the bytes that it has checked."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError

from ..calls.exclusion import changing
from .adapter_file import CONFIG_KEY, naming, set_metadata
from .collected import loads_a_file
from .model_card import CARD, add_tags, begin_card

_ATTEMPTS = 4
_UNFINISHED = ".saving-"  # begins the name of a folder in which a save is prepared
_OLD = 3600.0  # seconds after which such a folder is left over from a process that was killed


def _between_calls(name: str) -> Any:
    """A method as PEFT's class has it, or else the tuner, but between the calls of other threads."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        theirs = getattr(super(WholeAdapters, self), name, None) or getattr(self.base_model, name)
        with changing(self.base_model.model):
            return theirs(*args, **kwargs)

    in_peft = getattr(PeftModel, name, None)
    return wraps(in_peft)(method) if in_peft else method


class WholeAdapters:
    """`save_pretrained` and `load_adapter` of a PeftModel, for adapters in files.

    PEFT writes the adapter file and then the config. Here, both are written into a hidden folder first, and the
    adapter file has a copy of the config in its header. Renaming the adapter file is the one step that replaces the
    earlier adapter: a process that is killed before it leaves the earlier adapter, and one that is killed after it
    leaves the new one, both complete. (A .bin file has no header: `safe_serialization=False` has two such steps.)
    """

    _of: type[PeftModel]  # the class of the PeftModel, without these methods

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _restored, (self._of,), self.__dict__  # the class itself has no name that could be imported

    def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, of which it takes all arguments. See the class for what differs.

        Raises:
            OSError: if the directory cannot be written to. What was there is as it was.
        """
        save = super().save_pretrained  # type: ignore[misc]
        if not kwargs.get("is_main_process", True) or os.path.isfile(save_directory):
            save(save_directory, *args, **kwargs)  # which collects tensors with the first process, or raises
            return
        try:
            os.makedirs(save_directory, exist_ok=True)
            _remove_old(Path(save_directory))
            with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=save_directory) as folder:
                begin_card(self, Path(save_directory, CARD), Path(folder, CARD), args, kwargs)
                save(folder, *args, **kwargs)
                add_tags(Path(folder, CARD))
                for part in [path.parent for path in sorted(Path(folder).rglob(CONFIG_NAME))]:
                    _replace(part, Path(save_directory, part.relative_to(folder)))
                os.replace(Path(folder, CARD), Path(save_directory, CARD))  # a link is replaced, not followed
        except (OSError, SafetensorError) as error:  # safetensors has a type of its own for what the file system says
            raise OSError(
                f"`save_directory` {os.fspath(save_directory)!r}: the adapter cannot be saved there ({error}). What "
                "was there is as it was: make room, or choose another directory"
            ) from error

    add_adapter, delete_adapter, set_adapter = map(_between_calls, ("add_adapter", "delete_adapter", "set_adapter"))
    merge_adapter, unmerge_adapter = map(_between_calls, ("merge_adapter", "unmerge_adapter"))

    def load_adapter(self: Any, model_id: str | os.PathLike, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's, of which it takes all arguments; what is loaded is what was checked, and not read again.

        Calls of other threads see the adapter when it is loaded.

        Raises:
            ValueError: also if the model has an adapter of this name that means something else.
        """
        with changing(self.base_model.model):
            token = loads_a_file.set(True)
            try:
                with naming(os.path.join(model_id, kwargs.get("subfolder") or "")):
                    return self._load(model_id, adapter_name, *args, **kwargs)
            finally:
                loads_a_file.reset(token)
                if adapter_name in self.peft_config:
                    self.peft_config[adapter_name]._saved = None

    def _load(self: Any, model_id: str | os.PathLike, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config.get(adapter_name)
        # `PeftModel.from_pretrained` has just read the file, and gives a key mapping. For any other adapter that the
        # model has already, PEFT would not look at the saved config.
        is_read = config is not None and config._saved is not None and kwargs.get("key_mapping") is not None
        if config is not None and not is_read:
            given = {key: kwargs[key] for key in self._split_kwargs(kwargs)[0]}
            config.take_saved(type(config).from_pretrained(os.fspath(model_id), **given))
        for left in reversed(range(_ATTEMPTS)):
            try:
                return super().load_adapter(model_id, adapter_name, *args, **kwargs)  # type: ignore[misc]
            except (RuntimeError, OSError, SafetensorError):
                # PEFT reads a file again that is checked already, by its name twice, and it may be replaced then.
                config = self.peft_config.get(adapter_name)
                if not left or config is None or config._saved is None:
                    raise


@cache
def with_whole_adapters(cls: Any) -> Any:
    """The subclass of a PeftModel's class with these methods, under its name."""
    if issubclass(cls, WholeAdapters):
        return cls
    return type(cls.__name__, (WholeAdapters, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__, "_of": cls})


def _restored(cls: type[PeftModel]) -> Any:
    made: Any = cls
    return object.__new__(with_whole_adapters(made))


def _remove_old(directory: Path) -> None:
    for folder in directory.glob(f"{_UNFINISHED}*"):
        with suppress(FileNotFoundError):  # another process has just removed it
            if time.time() - folder.stat().st_mtime > _OLD:
                shutil.rmtree(folder, ignore_errors=True)


def _replace(new: Path, target: Path) -> None:
    """Replace the adapter of a directory by the one that was written into the folder `new`."""
    target.mkdir(exist_ok=True)
    weights = new / SAFETENSORS_WEIGHTS_NAME
    if weights.exists():
        set_metadata(weights, CONFIG_KEY, (new / CONFIG_NAME).read_text())
    else:
        weights = new / WEIGHTS_NAME
    for path in (weights, new / CONFIG_NAME):  # both are on the disk before one of them has its name
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(weights, target / weights.name)
    os.replace(new / CONFIG_NAME, target / CONFIG_NAME)
    other = {SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME} - {weights.name}
    (target / other.pop()).unlink(missing_ok=True)  # of an earlier save, which would be loaded in place of this one
