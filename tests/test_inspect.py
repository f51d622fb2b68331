"""What a checkpoint is said to be, against counts made from its files by their own library."""

import json
from math import prod
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny_host import CONFIG, write_host
from typer.testing import CliRunner

from bridge.checkpoints.conversion import convert
from bridge.checkpoints.initialise import init
from bridge.checkpoints.reading import CheckpointTensors, open_checkpoint
from bridge.checkpoints.sizes import PAPER_SHARES, inspect, summarise
from bridge.errors import BridgeError
from bridge_cli.main import app
from bridge_cli.text import size


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
    monkeypatch.setattr("bridge.checkpoints.safetensors_io.SafetensorsFile.__getitem__", refuse)
    monkeypatch.setattr("bridge.checkpoints.safetensors_io.SafetensorsFile.read_into", refuse)


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
    assert summary.disk_bytes == (made / "adapter" / "bridge.safetensors").stat().st_size
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


# Any form


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """A Bridge model in every form and packing, wide enough to be packed; adapters of it too."""
    root = tmp_path_factory.mktemp("forms")
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    host = write_host(root / "host", **wide)
    init(host, root / "torch", heads=2, head_dim=32, layers="0,2", dtype="bfloat16")
    for form in ("jax", "mlx"):
        convert(root / "torch", root / form, form)
        convert(root / "torch", root / f"{form}-adapter", form, adapter=True)
    for bits in (4, 8):
        convert(root / "torch", root / f"packed-{bits}", "mlx", quantize=bits)
    return root


def stored_bytes(path, part=""):
    """Bytes of all tensors whose names contain `part`, by the safetensors library."""
    widths, total = {"BF16": 2, "U32": 4}, 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            total += sum(
                prod(stored.get_shape()) * widths[stored.get_dtype()]
                for name, stored in slices.items()
                if part in name
            )
    return total


@pytest.mark.parametrize("form", ["torch", "jax", "mlx", "packed-4", "packed-8"])
def test_every_form_is_the_same_model(forms, unread, form):
    summary, torch = inspect(forms / form), inspect(forms / "torch")
    assert summary.host_parameters == torch.host_parameters
    assert summary.bridge_parameters == torch.bridge_parameters
    assert [(n, g.tensors, g.parameters) for n, g in summary.groups.items()] == [
        (n, g.tensors, g.parameters) for n, g in torch.groups.items()
    ]
    said = summary.to_json()
    assert said["form"] == ("mlx" if "packed" in form else form)
    assert said["dtype"] == "bfloat16" and not said["planned"]


@pytest.mark.parametrize("form", ["torch", "jax", "mlx", "packed-4", "packed-8"])
def test_sizes_are_those_of_the_files(forms, form):
    summary = inspect(forms / form)
    assert summary.bytes == stored_bytes(forms / form)
    assert summary.groups["Bridge"].bytes == stored_bytes(forms / form, ".bridge.")
    assert summary.groups["FFN"].bytes == stored_bytes(forms / form, ".mlp.")
    files = (forms / form).glob("*.safetensors")
    assert summary.disk_bytes == sum(file.stat().st_size for file in files)
    assert summary.memory(4, 100, 50).weights == summary.bytes
    unpacked = 2 * (summary.host_parameters + summary.bridge_parameters)
    assert summary.memory(4, 100, 50, "bfloat16").weights == unpacked
    assert (summary.bytes < unpacked) == ("packed" in form)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_said_to_be(forms, bits):
    summary = inspect(forms / f"packed-{bits}")
    assert summary.to_json()["quantization"] == {
        "bits": bits,
        "group_size": 64,
        "mode": "affine",
    }
    assert summary.groups["FFN"].dtypes == [f"{bits}-bit"]
    assert summary.groups["Bridge"].dtypes == summary.groups["norms"].dtypes == ["bfloat16"]
    matrix = summary.tensors["model.layers.0.mlp.up_proj.weight"]
    assert matrix == {"dtype": "BF16", "shape": [128, 64], "bits": bits, "group_size": 64}


@pytest.mark.parametrize("form", ["jax", "mlx"])
def test_an_adapter_of_any_form_names_its_base(forms, form):
    said = inspect(forms / f"{form}-adapter").to_json()
    assert (said["adapter_base"], said["form"]) == (str(forms / "torch"), form)
    assert said["bytes"] == inspect(forms / "torch").bytes


# A config alone


HOSTS = Path(__file__).parent / "data"
# Parameters as Hugging Face counts them in the published weights.
PUBLISHED = {"qwen-1.5b": 1_777_088_000, "qwen-7b": 7_615_616_512, "llama-8b": 8_030_261_248}


def paper_host(name):
    return HOSTS / f"deepseek-r1-distill-{name}.json"


@pytest.mark.parametrize(
    ("name", "share"), [("qwen-1.5b", "5.0%"), ("qwen-7b", "2.7%"), ("llama-8b", "3.3%")]
)
def test_the_papers_hosts_from_their_configs(name, share):
    summary = inspect(paper_host(name))
    assert summary.host_parameters == PUBLISHED[name]
    assert f"{summary.share:.1%}" == share
    assert summary.planned and summary.to_json()["bridge"]["num_heads"] == 8
    assert summary.dtype == "bfloat16"
    assert summary.bytes == 2 * (summary.host_parameters + summary.bridge_parameters)


def test_which_inner_width_gives_the_papers_range():
    """The paper says 2.8 to 5.1 % and not its inner width. 512 gives 2.7 to 5.0, a tenth of a point
    less at both ends; 522 to 531 give what it says, and Llama-8B, which lies between, 3.4."""

    def ends(inner):
        shares = [inspect(paper_host(n), heads=1, head_dim=inner).share for n in PUBLISHED]
        return f"{min(shares):.1%}", f"{max(shares):.1%}"

    assert ends(512) == ("2.7%", "5.0%")
    said = tuple(f"{share:.1%}" for share in PAPER_SHARES)
    assert [inner for inner in range(500, 560) if ends(inner) == said] == list(range(522, 532))
    assert f"{inspect(paper_host('llama-8b'), heads=8, head_dim=66).share:.1%}" == "3.4%"


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("form", ["file", "directory"])
def test_a_config_foretells_what_init_makes(made, tmp_path, kind, form):
    (tmp_path / "alone").mkdir()
    config = tmp_path / "alone" / "config.json"
    config.write_bytes((made / "host" / "config.json").read_bytes())
    (tmp_path / "alone" / "tokenizer.json").write_text("{}")
    blocks = {"heads": 3, "head_dim": 5, "kind": kind, "layers": "1-2"}
    foretold = inspect(config if form == "file" else config.parent, **blocks)
    became = init(made / "host", tmp_path / "made", **blocks)
    assert foretold.bridge_parameters == became.bridge_parameters
    assert foretold.share == became.share
    real = inspect(tmp_path / "made")
    assert foretold.config == real.config
    assert (foretold.bytes, foretold.groups) == (real.bytes, real.groups)
    assert foretold.tensors == real.tensors
    assert foretold.memory(8, 10, 20) == real.memory(8, 10, 20)
    assert (foretold.disk_bytes, foretold.planned, real.planned) == (0, True, False)


def test_a_bridge_config_alone_keeps_its_blocks_unless_others_are_asked(made):
    config = made / "model" / "config.json"
    own, other = inspect(config), inspect(config, heads=7)
    assert own.config == inspect(made / "model").config and not own.planned
    assert other.planned and other.to_json()["bridge"]["num_heads"] == 7
    assert other.to_json()["bridge"]["layers"] == [0, 1, 2]


def test_blocks_are_not_asked_of_weights_nor_a_base_of_a_config(made):
    with pytest.raises(BridgeError, match=r"has weights.*config\.json"):
        inspect(made / "model", heads=4)
    with pytest.raises(BridgeError, match="config alone"):
        inspect(made / "model" / "config.json", made / "host")
    with pytest.raises(BridgeError, match=r"bridge\.kind"):
        inspect(made / "host" / "config.json", kind="other")
    with pytest.raises(BridgeError, match="layers"):
        inspect(made / "host" / "config.json", layers="3")
    with pytest.raises(BridgeError, match=r"bridge\.num_heads"):
        inspect(made / "host" / "config.json", heads=0)


@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "model-00001-of-00002.safetensors"]
)
def test_lost_weights_are_not_taken_for_a_config_alone(made, tmp_path, name):
    (tmp_path / "config.json").write_bytes((made / "host" / "config.json").read_bytes())
    (tmp_path / name).write_text("{}")
    with pytest.raises(BridgeError):
        inspect(tmp_path)


@pytest.mark.parametrize("columns", [80, 120])
def test_what_the_command_prints(made, forms, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))

    def printed(*arguments):
        said = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
        assert said.exit_code == 0, said.output
        assert max(map(len, said.output.splitlines())) <= columns
        return " ".join(said.output.split())

    said = printed(paper_host("qwen-1.5b"))
    assert "would add 28 attention blocks of 8 x 64, after layers 0-27" in said
    assert "1.8 B host + 88.1 M Bridge (5.0% of the host; in the paper 2.8% to 5.1%)" in said
    assert "no weights; counted as bfloat16" in said
    said = printed(paper_host("llama-8b"), "--kind", "mlp", "--heads", 4, "--layers", "0-3")
    assert "would add 4 mlp blocks of 4 x 64, after layers 0-3" in said
    said = printed(forms / "packed-4", "--width", 16)
    assert f"weights {size(stored_bytes(forms / 'packed-4'))} (4-bit)" in said
    assert "form mlx" in said and "4-bit in groups of 64, scales in bfloat16" in said
    assert "adapter on" in printed(forms / "mlx-adapter")
    assert "no blocks" in printed(made / "host")
