"""Pickles run code when they are read: a base or an adapter that comes with one is refused, and it stays unread."""

import io
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny

from fedmira.adapters import Layout
from fedmira.errors import ModelError, StoreError
from fedmira.export.peft_folder import export_adapter, read_adapter
from fedmira.model.base.load import load_base
from fedmira.model.base.source import load_tokenizer


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.marker), "w")


def torch_file(payload: Payload, *, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": payload}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def zipped_by_hand(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(payload))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


KINDS: dict[str, Callable[[Payload], bytes]] = {
    **{f"protocol {version}": lambda one, version=version: pickle.dumps(one, version) for version in range(6)},
    "torch zip": lambda one: torch_file(one, zipped=True),
    "torch before zip": lambda one: torch_file(one, zipped=False),
    "zip by hand": zipped_by_hand,
}
NAMES = ("pytorch_model.bin", "MODEL.PT", "w.pth", "optimizer.pkl", "s.pickle", "last.ckpt", "adapter_model.bin")
FILES = [(name, kind) for name in NAMES for kind in KINDS]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code-has-run"


def test_more_than_fifty_pickles_are_tried() -> None:
    assert len(FILES) > 50


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_file_runs_its_code_when_torch_reads_it(kind: str, tmp_path: Path, marker: Path) -> None:
    (tmp_path / "file").write_bytes(KINDS[kind](Payload(marker)))
    with suppress(Exception):
        torch.load(tmp_path / "file", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(("name", "kind"), FILES)
def test_a_base_with_a_pickle_is_refused_unread(name: str, kind: str, saved: Path, marker: Path) -> None:
    (saved / name).write_bytes(KINDS[kind](Payload(marker)))
    beside = rf"holds pickles beside its safetensors: {name}\. FedMira reads only safetensors; remove the pickles"
    alone = rf"holds {name} and no safetensors; pickles can run code and are refused\. Convert the weights"
    for fault in (beside, alone):
        for door in (load_tokenizer, lambda folder: load_base(folder, dtype="float32", device="cpu")):
            with pytest.raises(ModelError, match=fault):
                door(str(saved))
        (saved / "model.safetensors").unlink(missing_ok=True)
    assert not marker.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_under_the_name_of_the_weights_is_refused_unread(kind: str, saved: Path, marker: Path) -> None:
    (saved / "model.safetensors").write_bytes(KINDS[kind](Payload(marker)))
    with pytest.raises(ModelError, match="weights cannot be loaded: SafetensorError"):
        load_base(str(saved), dtype="float32", device="cpu")
    assert not marker.exists()


def test_of_many_pickles_five_are_named_and_folders_are_not_files(saved: Path) -> None:
    for number in range(8):
        (saved / f"{number}.bin").touch()
    (saved / "0.bin").unlink()
    (saved / "0.bin").mkdir()
    with pytest.raises(ModelError, match=r": 1\.bin, 2\.bin, 3\.bin, 4\.bin, 5\.bin and 2 more\. FedMira"):
        load_tokenizer(str(saved))


@pytest.fixture(scope="module")
def layout() -> Layout:
    return tiny.layout(tiny.base("llama"), 2)


@pytest.fixture
def adapter(tmp_path: Path, layout: Layout) -> Path:
    """The folder of an exported adapter."""
    export_adapter(
        tmp_path / "adapter",
        tiny.adapters(layout, [2], dtype=torch.float32),
        base_model="tiny",
        target_modules=["q_proj", "v_proj"],
        fan_in_fan_out=False,
        card={},
    )
    return tmp_path / "adapter"


@pytest.mark.parametrize(("name", "kind"), FILES)
def test_an_adapter_with_a_pickle_is_refused_unread(
    name: str, kind: str, adapter: Path, layout: Layout, marker: Path
) -> None:
    (adapter / name).write_bytes(KINDS[kind](Payload(marker)))
    with pytest.raises(StoreError, match=rf"holds pickles, which can run code: {name}\. .*remove the pickles"):
        read_adapter(adapter, layout)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(StoreError, match=rf"holds pickles.* {name}"):
        read_adapter(adapter, layout)
    assert not marker.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_under_the_name_of_an_adapter_is_refused_unread(
    kind: str, adapter: Path, layout: Layout, marker: Path
) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(KINDS[kind](Payload(marker)))
    with pytest.raises(StoreError, match=r"adapter_model\.safetensors' is damaged, or not a safetensors file"):
        read_adapter(adapter, layout)
    assert not marker.exists()


def test_the_config_of_an_adapter_has_no_effect(adapter: Path, layout: Layout) -> None:
    """Only tensors are read: a config that names code, another base or no LoRA at all changes nothing."""
    expected = read_adapter(adapter, layout)
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "EVIL", "auto_mapping": {"base_model_class": "os", "parent_library": "os.system"}, '
        '"base_model_name_or_path": "/elsewhere", "!!python/object/apply:os.system": ["true"]}'
    )
    assert torch.equal(read_adapter(adapter, layout), expected)


def test_a_truncated_or_misshapen_adapter_is_refused(adapter: Path, layout: Layout) -> None:
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(StoreError, match="damaged"):
        read_adapter(adapter, layout)
    flat = whole.replace(b'"shape":[2,16]', b'"shape":[32]  ', 1)
    assert flat != whole
    path.write_bytes(flat)
    with pytest.raises(StoreError, match=r"lora_A\.weight' is \(32,\), at most \(2, 16\) fits"):
        read_adapter(adapter, layout)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, layout: Layout) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match=r"holds no adapter_model\.safetensors"):
            read_adapter(folder, layout)
