"""What a checkpoint is said to be, against counts made from its files by their own library."""

import json
from math import prod

import pytest
from safetensors import safe_open
from tiny_host import CONFIG, write_host

from bridge.checkpoint import CheckpointTensors, open_checkpoint
from bridge.initialise import init
from bridge.inspect import summarise


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A host, a Bridge model of it, and an adapter on it."""
    root = tmp_path_factory.mktemp("inspect")
    host = write_host(root / "host")
    init(host, root / "model", heads=2, head_dim=4, layers="0,2", dtype="bfloat16")
    init(host, root / "adapter", heads=2, head_dim=4, adapter=True)
    return root


@pytest.fixture
def unread(monkeypatch):
    """Fails where a tensor is read."""

    def refuse(self, name, *_):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(CheckpointTensors, "__getitem__", refuse)
    monkeypatch.setattr("bridge.safetensors_io.SafetensorsFile.__getitem__", refuse)
    monkeypatch.setattr("bridge.safetensors_io.SafetensorsFile.read_into", refuse)


def sizes(path):
    """Name to number of parameters, by the safetensors library."""
    with safe_open(path / "model.safetensors", framework="numpy") as file:
        return {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_counts_are_those_of_the_file(made, unread):
    summary = summarise(open_checkpoint(made / "model", headers_only=True))
    parameters = sizes(made / "model")
    bridge = sum(n for name, n in parameters.items() if ".bridge." in name)
    assert summary.bridge_parameters == bridge > 0
    assert summary.host_parameters == sum(parameters.values()) - bridge
    assert summary.share == bridge / summary.host_parameters
    assert summary.bytes == 2 * sum(parameters.values())
    assert summary.disk_bytes == (made / "model" / "model.safetensors").stat().st_size


def test_groups_part_the_tensors(made):
    summary = summarise(open_checkpoint(made / "model"))
    parameters = sizes(made / "model")
    groups = summary.groups
    assert list(groups) == ["embedding", "norms", "attention", "FFN", "Bridge", "head"]
    assert sum(g.tensors for g in groups.values()) == len(parameters)
    assert sum(g.parameters for g in groups.values()) == sum(parameters.values())
    assert sum(g.bytes for g in groups.values()) == summary.bytes
    assert groups["Bridge"].tensors == 2 * 5  # two layers: norm, q, k, v, o
    assert groups["FFN"].parameters == 3 * 3 * 16 * 24
    assert all(g.dtypes == ["bfloat16"] for g in groups.values())


def test_a_plain_host_has_no_share(made):
    summary = summarise(open_checkpoint(made / "host"))
    assert (summary.bridge_parameters, summary.share) == (0, 0)
    assert summary.to_json()["bridge"] is None


def test_an_adapter_is_inspected_without_reading_its_base(made, unread):
    summary = summarise(open_checkpoint(made / "adapter", headers_only=True))
    assert summary.disk_bytes == (made / "adapter" / "model.safetensors").stat().st_size
    assert summary.bytes == 4 * (summary.host_parameters + summary.bridge_parameters)
    assert summary.to_json()["adapter_base"] == str(made / "host")


def test_a_tied_head_stored_twice_is_not_compared(tmp_path, unread):
    host = write_host(tmp_path / "tied")
    config = json.loads((host / "config.json").read_text()) | {"tie_word_embeddings": True}
    (host / "config.json").write_text(json.dumps(config))
    summary = summarise(open_checkpoint(host, headers_only=True))
    assert "head" not in summary.groups
    with pytest.raises(AssertionError, match="was read"):
        open_checkpoint(host)


def test_memory_counts_the_prompt_once(made):
    summary = summarise(open_checkpoint(made / "model"))
    token = 2 * CONFIG["num_hidden_layers"] * CONFIG["num_key_value_heads"] * 4  # keys and values
    one, eight = summary.memory(1, 100, 50), summary.memory(8, 100, 50)
    assert one.prompt_cache == eight.prompt_cache == token * 100 * 2
    assert eight.row_caches == 8 * one.row_caches == token * 8 * 50 * 2
    assert eight.total == eight.weights + eight.prompt_cache + eight.row_caches
    assert eight.weights == summary.bytes
    wide = summary.memory(8, 100, 50, "float32")
    assert (wide.weights, wide.total) == (2 * eight.weights, 2 * eight.total)
    assert summary.memory(8, 100, 50, "bfloat16") == eight


def test_its_json_is_json(made):
    said = json.loads(json.dumps(summarise(open_checkpoint(made / "model")).to_json()))
    assert said["bridge"]["layers"] == [0, 2]
    assert said["groups"]["Bridge"]["parameters"] == said["bridge_parameters"]
