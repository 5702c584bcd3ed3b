"""A PeftModel with LoTRA adapters writes each adapter as a whole, and loads the bytes that it has checked."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError

from ..calls.exclusion import changing
from .adapter_file import CONFIG_KEY, set_metadata
from .collected import loads_a_file
from .config_file import UNFINISHED
from .model_card import CARD, add_tags, begin_card

_ATTEMPTS = 4
_OLD = 3600.0  # seconds after which such a folder is left over from a process that was killed


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
        with _said(save_directory):
            os.makedirs(save_directory, exist_ok=True)
            _remove_old(Path(save_directory))
            with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=save_directory) as folder:
                begin_card(self, Path(save_directory, CARD), Path(folder, CARD), args, kwargs)
                save(folder, *args, **kwargs)
                add_tags(Path(folder, CARD))
                for part in [path.parent for path in sorted(Path(folder).rglob(CONFIG_NAME))]:
                    _replace(part, Path(save_directory, part.relative_to(folder)))
                _move(Path(folder, CARD), Path(save_directory, CARD))

    def add_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, between the calls of other threads."""
        with changing(self.base_model.model):
            super().add_adapter(*args, **kwargs)  # type: ignore[misc]

    def delete_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, between the calls of other threads."""
        with changing(self.base_model.model):
            super().delete_adapter(*args, **kwargs)  # type: ignore[misc]

    def set_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, between the calls of other threads."""
        with changing(self.base_model.model):
            super().set_adapter(*args, **kwargs)  # type: ignore[misc]

    def merge_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        """As the tuner's, between the calls of other threads."""
        with changing(self.base_model.model):
            self.base_model.merge_adapter(*args, **kwargs)

    def unmerge_adapter(self: Any) -> None:
        """As the tuner's, between the calls of other threads."""
        with changing(self.base_model.model):
            self.base_model.unmerge_adapter()

    def load_adapter(self: Any, model_id: str | os.PathLike, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's, of which it takes all arguments; what is loaded is what was checked, and not read again.

        Calls of other threads see the adapter when it is loaded.

        Raises:
            ValueError: also if the model has an adapter of this name that means something else.
        """
        with changing(self.base_model.model):
            return self._load_adapter(model_id, adapter_name, *args, **kwargs)

    def _load_adapter(self: Any, model_id: str | os.PathLike, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config.get(adapter_name)
        # `PeftModel.from_pretrained` has just read the file, and gives a key mapping. For any other adapter that the
        # model has already, PEFT would not look at the saved config.
        is_read = config is not None and config._saved is not None and kwargs.get("key_mapping") is not None
        token = loads_a_file.set(True)
        try:
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
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            directory = os.path.join(model_id, kwargs.get("subfolder") or "")
            if directory in str(error):
                raise
            # PEFT looks for the `peft_type` in the config before it asks this package.
            kind, said = (type(error), error) if type(error) in (ValueError, TypeError) else (ValueError, repr(error))
            raise kind(f"the adapter in {directory}: {said}") from error
        finally:
            loads_a_file.reset(token)
            if adapter_name in self.peft_config:
                self.peft_config[adapter_name]._saved = None


def with_whole_adapters(cls: Any) -> Any:
    """The subclass of a PeftModel's class with these methods, under its name."""
    return cls if issubclass(cls, WholeAdapters) else _subclass(cls)


@cache
def _subclass(cls: Any) -> Any:
    return type(cls.__name__, (WholeAdapters, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__, "_of": cls})


def _restored(cls: type[PeftModel]) -> Any:
    made = with_whole_adapters(cls)
    return made.__new__(made)


@contextmanager
def _said(directory: str | os.PathLike) -> Iterator[None]:
    """Errors of the file system name the directory. safetensors has a type of its own for them."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError):
            raise
        raise OSError(
            f"`save_directory` {os.fspath(directory)!r}: the adapter cannot be saved there ({error}). What was there "
            "is as it was: make room, or choose another directory"
        ) from error


def _remove_old(directory: Path) -> None:
    for folder in directory.glob(f"{UNFINISHED}*"):
        try:
            if time.time() - folder.stat().st_mtime > _OLD:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:  # another process has just removed it
            continue


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
    _move(weights, target / weights.name)
    _move(new / CONFIG_NAME, target / CONFIG_NAME)
    other = {SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME} - {weights.name}
    (target / other.pop()).unlink(missing_ok=True)  # of an earlier save, which would be loaded in place of this one


def _move(path: Path, target: Path) -> None:
    os.replace(path, target)  # a link is replaced, not followed
