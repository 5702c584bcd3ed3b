"""A save is one step, a load is one read, and a file says what it is."""

import copy
import gc
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import peft
import peft.peft_model
import pytest
import saved_adapters
import torch
from conftest import assert_different, assert_equal
from layer_table import randomize
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from test_files import (
    CONFIG,
    VALUES,
    WEIGHTS,
    Model,
    X,
    adapted,
    assert_untouched,
    edit_config,
    edit_weights,
    load_config,
    mutated,
    remains,
)
from torch import nn

from peft_lotra import LoTRAConfig, hotswap_adapter
from peft_lotra.files.collected import loads_a_file, remapped

another_save = pytest.mark.filterwarnings("ignore:.*is of another save than:UserWarning")


@pytest.fixture
def two():
    """A base, and two adapters of it that differ in ranks and in `alpha`."""
    base = Model()
    first = adapted(base, r=2)
    second = adapted(base, r=3, alpha=0.5)
    assert_different(first(X), second(X))
    return base, first, second


def loaded(base, path, **kwargs):
    return PeftModel.from_pretrained(copy.deepcopy(base), path, **kwargs)(X)


# One transaction -----------------------------------------------------------------------------------------------------


@another_save
@pytest.mark.parametrize("step", range(7))
def test_a_save_that_ends_at_any_step_leaves_the_old_or_the_new_adapter(two, step, tmp_path, monkeypatch):
    base, first, second = two
    first.save_pretrained(tmp_path)
    left = step

    def counted(call):
        def instead(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return call(*args, **kwargs)

        return instead

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            second.save_pretrained(tmp_path)
        except KeyboardInterrupt:
            ended = False
        else:
            ended = True
    y = loaded(base, tmp_path)
    old, new = torch.equal(y, first(X)), torch.equal(y, second(X))
    assert old or new
    assert ended == (step > 4)  # two files are synced and three renamed, of which the third is the card
    assert new or step < 3
    assert not ended or {file.name for file in tmp_path.iterdir()} == {"README.md", CONFIG, WEIGHTS}


def test_a_new_adapter_file_beside_an_old_config_is_the_new_adapter(two, tmp_path):
    base, first, second = two
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    shutil.copyfile(tmp_path / "second" / WEIGHTS, tmp_path / "first" / WEIGHTS)
    with pytest.warns(UserWarning, match=f"{CONFIG} in .* is of another save than .*: the config in the adapter file"):
        y = loaded(base, tmp_path / "first")
    assert_equal(y, second(X), 0)


def test_a_damaged_config_in_the_header_is_noticed(two, tmp_path):
    base, first, _ = two
    first.save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    assert content.count(rb"\"alpha\": 1.0") == 1
    (tmp_path / WEIGHTS).write_bytes(content.replace(rb"\"alpha\": 1.0", rb"\"alpha\": 2.0"))
    edit_config(tmp_path, digest="0" * 64)
    with (
        pytest.warns(UserWarning, match="is of another save than"),
        pytest.raises(ValueError, match="do not fit the `digest`"),
    ):
        loaded(base, tmp_path)


@pytest.mark.parametrize("safe", [[True, False], [False, True]])
def test_the_last_save_counts_whatever_its_format(two, safe, tmp_path):
    base, first, second = two
    first.save_pretrained(tmp_path, safe_serialization=safe[0])
    second.save_pretrained(tmp_path, safe_serialization=safe[1])
    assert_equal(loaded(base, tmp_path), second(X), 0)


def test_a_limit_on_the_size_of_files_leaves_the_old_adapter(two, tmp_path):
    base, first, second = two
    first.save_pretrained(tmp_path)
    second.add_module("large", nn.Linear(1, 1))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(OSError, match="`save_directory` .* cannot be saved there .* make room, or choose another"):
            second.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert_equal(loaded(base, tmp_path), first(X), 0)
    assert not list(tmp_path.glob(".saving-*"))


def test_a_directory_that_cannot_be_made(two):
    with pytest.raises(OSError, match="`save_directory` '/proc/adapter': the adapter cannot be saved there"):
        two[1].save_pretrained("/proc/adapter")


def test_links_are_replaced_and_not_written_through(two, tmp_path):
    base, first, second = two
    first.save_pretrained(tmp_path / "kept")
    (tmp_path / "linked").mkdir()
    for name in (WEIGHTS, CONFIG):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "kept" / name)
    second.save_pretrained(tmp_path / "linked")
    assert_equal(loaded(base, tmp_path / "kept"), first(X), 0)
    assert_equal(loaded(base, tmp_path / "linked"), second(X), 0)


def test_what_a_killed_process_left_is_removed_when_it_is_old(two, tmp_path):
    old, new = tmp_path / ".saving-old", tmp_path / ".saving-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / WEIGHTS).write_text("half")
    os.utime(old, (time.time() - 4000,) * 2)
    two[1].save_pretrained(tmp_path)
    assert [old.exists(), new.exists()] == [False, True]


def test_other_processes_write_nothing(two, tmp_path):
    two[1].save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# One read ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def replaced_between(two, tmp_path, monkeypatch):
    """The second adapter is saved over the first one when PEFT reads the weights, after it has read the config."""
    read = peft.peft_model.load_peft_weights

    def late(*args, **kwargs):
        two[2].save_pretrained(tmp_path)
        return read(*args, **kwargs)

    two[1].save_pretrained(tmp_path)
    monkeypatch.setattr(peft.peft_model, "load_peft_weights", late)
    return tmp_path


@pytest.mark.parametrize("meta", [False, True])
def test_what_was_checked_is_loaded(two, meta, replaced_between):
    assert_equal(loaded(two[0], replaced_between, low_cpu_mem_usage=meta), two[1](X), 0)


def test_what_was_checked_is_moved_to_the_device_of_what_peft_has_read(two, tmp_path):
    base, first, _ = two
    first.save_pretrained(tmp_path)
    config = first.peft_config["default"]
    config.take_saved(LoTRAConfig.from_pretrained(tmp_path))
    read = {key: tensor.to("meta") for key, tensor in get_peft_model_state_dict(first).items()}
    token = loads_a_file.set(True)
    try:
        found = remapped(first, config, "default", read)
    finally:
        loads_a_file.reset(token)
    assert {tensor.device.type for tensor in found.values()} == {"meta"}
    assert len(found) > 2


def test_what_was_checked_is_loaded_beside_another_adapter(two, replaced_between):
    model = adapted(two[0])
    model.load_adapter(replaced_between, "second")
    model.set_adapter("second")
    assert_equal(model(X), two[1](X), 0)


def test_what_was_checked_is_loaded_over_an_adapter(two, replaced_between):
    model = adapted(two[0], r=2)
    model.load_adapter(replaced_between, "default")
    assert_equal(model(X), two[1](X), 0)


def test_what_was_checked_is_swapped_in(two, tmp_path, monkeypatch):
    base, first, second = two
    first.save_pretrained(tmp_path)
    checked = LoTRAConfig.from_pretrained

    def late(*args, **kwargs):
        config = checked(*args, **kwargs)
        second.save_pretrained(tmp_path)
        return config

    slot = adapted(base, r=3)
    monkeypatch.setattr(LoTRAConfig, "from_pretrained", late)
    hotswap_adapter(slot, tmp_path)
    assert_equal(slot(X), first(X))


def test_an_adapter_that_means_something_else_is_not_loaded_over_another(two, tmp_path):
    base, first, _ = two
    adapted(base, r=2, alpha=0.5).save_pretrained(tmp_path)
    before = first(X)
    with pytest.raises(ValueError, match=r"differs in \['alpha'\] from the adapter whose weights it should replace"):
        first.load_adapter(tmp_path, "default")
    assert_equal(first(X), before, 0)


def test_an_adapter_of_another_method_is_not_loaded_over_another(two, tmp_path):
    LoraConfig(r=2, target_modules=["head"]).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="it is a LoraConfig, and the adapter of this name a LoTRACon"):
        two[1].load_adapter(tmp_path, "default")


def test_a_users_own_tensors_are_loaded_after_a_config_from_a_file(two, tmp_path):
    base, first, _ = two
    first.save_pretrained(tmp_path)
    state = {key: tensor + 1 for key, tensor in get_peft_model_state_dict(first).items()}
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig.from_pretrained(tmp_path))
    set_peft_model_state_dict(model, state)
    for key, tensor in get_peft_model_state_dict(model).items():
        assert_equal(tensor, state[key], 0)


def test_a_file_that_has_changed_since_its_config_was_read_is_read_again(two, tmp_path):
    base, first, _ = two
    first.save_pretrained(tmp_path)
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig.from_pretrained(tmp_path))
    later = adapted(base, r=2)
    later.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default")
    assert_equal(model(X), later(X), 0)


def test_files_of_the_hub_are_checked(two, tmp_path, monkeypatch):
    """From the Hub's cache, since no test needs a network."""
    base, first, _ = two
    snapshot = tmp_path / "models--someone--adapter" / "snapshots" / ("0" * 40)
    first.save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_equal(loaded(base, "someone/adapter", cache_dir=tmp_path), first(X), 0)
    edit_weights(snapshot, lambda weights: next(iter(weights.values())).add_(1), signed=True)
    with pytest.raises(ValueError, match="do not fit the `digest`"):
        loaded(base, "someone/adapter", cache_dir=tmp_path)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"peft_type": "NEVER"}', "\udcff"])
def test_a_config_that_is_none(two, text, tmp_path):
    base, first, _ = two
    first.save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_bytes(text.encode(errors="surrogateescape"))
    model = adapted(base)
    before = remains(model)
    with pytest.raises((ValueError, TypeError), match=re.escape(str(tmp_path))):
        model.load_adapter(tmp_path, "second")
    assert remains(model)[0] == before[0]


# The PeftModel -------------------------------------------------------------------------------------------------------


def test_the_model_is_copied_pickled_and_freed(two):
    _, first, _ = two
    for other in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert type(other) is type(first)
        assert isinstance(other, PeftModel)
        assert_equal(other(X), first(X), 0)
    assert repr(first).startswith("PeftModel(")
    gc.disable()
    try:
        model = adapted(Model())
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


# The card ------------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_adapter_needs(two, tmp_path, monkeypatch):
    base, first, _ = two
    first.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for part in ("- kan\n- lotra\n- peft\n", 'pip install "peft-lotra', "a `Model`", "- **License:**", "2502.06153"):
        assert part in text
    assert "**default**: 1 coefficient tensors with 48 coefficients; ranks (2, 2, 2)" in text
    numbers = sum(tensor.numel() for tensor in get_peft_model_state_dict(first).values())
    assert f"{numbers} trained and {numbers} stored numbers" in text
    monkeypatch.chdir(tmp_path)
    names = {"base": copy.deepcopy(base)}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert_equal(names["model"](X), first(X), 0)


def test_the_card_of_another_name_loads(two, tmp_path, monkeypatch):
    base, first, _ = two
    first.add_adapter("heat at 2", LoTRAConfig(r=1, freeze_factors=True))
    first.save_pretrained(tmp_path, selected_adapters=["heat at 2"])
    text = (tmp_path / "README.md").read_text()
    numbers = get_peft_model_state_dict(first, adapter_name="heat at 2")
    core = sum(tensor.numel() for key, tensor in numbers.items() if "core" in key)
    assert f"{core} trained and {sum(t.numel() for t in numbers.values())} stored numbers" in text
    monkeypatch.chdir(tmp_path)
    names = {"base": copy.deepcopy(base)}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert list(names["model"].peft_config) == ["heat at 2"]


def test_the_card_names_tasks_and_ranges(tmp_path):
    kwargs = {"family": {"T": (250.0, 400.0), "fluid": ["water", "ammonia", "argon"]}, "family_code": 2}
    adapted(Model(), **kwargs).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "- a family: T from 250 to 400\n" in text
    assert "- a family of 3 tasks with codes of 2: water, ammonia, argon\n" in text


def test_a_users_own_card_is_kept(two, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n# My adapter\n")
    two[1].save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for part in ("# My adapter", "license: mit", "- lotra"):
        assert part in text
    assert "How to load it" not in text


def test_the_card_is_of_the_last_save(two, tmp_path):
    two[1].save_pretrained(tmp_path)
    two[2].save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "ranks (None, 3, 3)" in text
    assert "(2, 2, 2)" not in text


# Names ---------------------------------------------------------------------------------------------------------------

TAKEN = ("0", "layers", "head", "lotra_U1", "lotra_core", "lotra_codes", "base_layer", "base_model", "model")
TAKEN += ("modules_to_save", "weight", "bias")


@pytest.mark.parametrize("name", TAKEN)
def test_names_of_modules_are_refused(name):
    base = Model()
    before = remains(base)
    message = f"`adapter_name` '{name}' is in names of tensors, .* for example 'adapter_{name}' or '{name}_task'"
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, LoTRAConfig(r=1), adapter_name=name)
    assert remains(base)[0] == before[0]
    model = adapted(base, modules_to_save=["head"])
    with pytest.raises(ValueError, match=message):
        model.add_adapter(name, LoTRAConfig(r=1))
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["1", "DEFAULT", "-1", "ß", "a b", "layer", "adapter_0", "0_task", "core"])
def test_names_are_saved_and_loaded(name, tmp_path):
    base = Model()
    model = adapted(base, modules_to_save=["head"])
    model.add_adapter(name, LoTRAConfig(r=3, bias="none", family=["a", "b"], family_code=1, modules_to_save=["head"]))
    randomize(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    again.load_adapter(tmp_path / name, name)
    for adapter in ("default", name):
        before, after = (get_peft_model_state_dict(m, adapter_name=adapter) for m in (model, again))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


# Versions ------------------------------------------------------------------------------------------------------------


def test_a_newer_format_is_refused(two, tmp_path):
    base, first, _ = two
    first.save_pretrained(tmp_path)
    assert load_config(tmp_path)["file_format"] == 1
    edit_config(tmp_path, file_format=2)
    with pytest.raises(ValueError, match="`file_format` is 2, .* up to 1: `pip install -U peft-lotra`"):
        loaded(base, tmp_path)
    edit_config(tmp_path, file_format=...)
    assert_equal(loaded(base, tmp_path), first(X), 0)


@pytest.mark.parametrize("kind", saved_adapters.KINDS)
def test_adapters_that_earlier_versions_saved(kind):
    path = saved_adapters.SAVED / kind
    expected = torch.load(path / "output.pt")
    assert_equal(saved_adapters.load(kind, path), expected)
    base = saved_adapters.KINDS[kind][0]()
    assert_different(base(saved_adapters.IMAGES if kind == "positions" else saved_adapters.X), expected)


def test_every_kind_is_among_the_saved_adapters():
    assert {path.name for path in saved_adapters.SAVED.iterdir()} == {*saved_adapters.KINDS}


# Without the import --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(peft.__version__ != "0.21.2" or not shutil.which("git"), reason="the patch is for this PEFT")
def test_the_patch_that_is_proposed_to_peft(tmp_path):
    proposal = (Path(__file__).parents[1] / "examples" / "peft_entry_points.md").read_text()
    (tmp_path / "patch").write_text(proposal.split("```diff\n")[1].split("```")[0])
    code = """if True:
        import sys, torch
        from collections import OrderedDict
        from kan_layers import ChebyKANLayer
        from peft import PeftModel
        from torch import nn
        base = nn.Sequential(OrderedDict(layer=ChebyKANLayer(3, 4, 3), head=nn.Linear(4, 2))).double()
        assert "peft_lotra" not in sys.modules
        print(sorted(PeftModel.from_pretrained(base, "saved/plain").peft_config))
    """
    shutil.copytree(Path(peft.__file__).parent, tmp_path / "peft")
    info = tmp_path / "some_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[peft.methods]\nlotra = peft_lotra\n")
    folders = [tmp_path, Path(__file__).parents[1], Path(__file__).parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-W", "ignore", "-c", code]

    def run():
        return subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)

    assert "KeyError: 'LOTRA'" in run().stderr
    subprocess.run(["git", "apply", "-p2", "patch"], cwd=tmp_path, check=True)
    done = run()
    assert done.stdout == "['default']\n", done.stderr


# Anything at all -----------------------------------------------------------------------------------------------------


def flipped(draw, content):
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def with_header(change):
    """A change of the header of a safetensors file, whose length stays right."""

    def changed(draw, content):
        end = 8 + int.from_bytes(content[:8], "little")
        header = change(draw, json.loads(content[8:end]))
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[end:]

    return changed


def other_config(draw, header):
    """The config in the header is something else, or has another value in a field."""
    config = json.loads(header["__metadata__"]["lotra_config"])
    field = draw.choice(sorted(config))
    said = draw.choice(
        [json.dumps(mutated(draw, config)), json.dumps(config | {field: draw.choice(VALUES)}), "", "[]"]
    )
    return {**header, "__metadata__": {"format": "pt", "lotra_config": said}}


def other_names(draw, header):
    old, new = (
        draw.choice(sorted(header)),
        draw.choice(["__class__", "../../x", "x" * 10**5, "\0", "a.b.lotra_core", ""]),
    )
    return {new if key == old else key: value for key, value in header.items()}


WEIGHT_CHANGES = [
    flipped,
    lambda draw, content: content[: draw.randrange(len(content))],
    lambda draw, content: content + bytes(draw.randrange(1, 50)),
    lambda draw, content: (10 ** draw.randrange(3, 19)).to_bytes(8, "little") + content[8:],
    with_header(other_config),
    with_header(other_names),
    with_header(lambda draw, header: b"[" * 10**5),
    with_header(lambda draw, header: header | {"extra": {"dtype": "F64", "shape": [10**12], "data_offsets": [0, 8]}}),
]
CONFIG_CHANGES = [
    flipped,
    lambda draw, content: content[: draw.randrange(len(content))],
    lambda draw, content: json.dumps(mutated(draw, json.loads(content))).encode(),
    lambda draw, content: b'{"peft_type": "LORA"}',
    lambda draw, content: b"[" * 10**5,
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("seed", range(5))
def test_a_thousand_changes_of_files(seed, two, tmp_path):
    """Each is loaded as what was saved, or refused by an error that names the file."""
    base, first, second = two
    first.save_pretrained(tmp_path / "adapter")
    second.save_pretrained(tmp_path / "other")
    model, y, draw = adapted(base), first(X).detach(), random.Random(seed)
    before, path = remains(model), tmp_path / "adapter"
    whole = {name: (path / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    others = {name: (tmp_path / "other" / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    for _ in range(200):
        name = draw.choice([WEIGHTS, CONFIG])
        if draw.random() < 0.05:
            content, expected = others[name], [y, second(X)]
        else:
            content, expected = (
                draw.choice(WEIGHT_CHANGES if name == WEIGHTS else CONFIG_CHANGES)(draw, whole[name]),
                [y],
            )
        (path / name).write_bytes(content)
        refusal = None
        try:
            model.load_adapter(path, "new")
        except (ValueError, TypeError) as error:
            refusal = str(error)
        if refusal is not None:
            assert str(path) in refusal
            assert list(model.peft_config) == ["default"]
        else:
            model.set_adapter("new")
            loads = model(X)
            unsigned = name == CONFIG and "digest" not in json.loads(content)
            assert unsigned or any(torch.equal(loads, z) for z in expected)
            model.set_adapter("default")
            model.delete_adapter("new")
        (path / name).write_bytes(whole[name])
    assert_untouched(model, before)
