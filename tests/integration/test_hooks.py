"""``from_pretrained`` takes our arguments whichever package is imported first, and importing ours costs little."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from transformers_kt.assets import bundled_model

MODEL = str(bundled_model())
LOAD = f"model = AutoModelForCausalLM.from_pretrained({MODEL!r}, kt_rules='auto'); assert model.kt_report.nbytes"
READ = f"assert AutoConfig.from_pretrained(None, gguf_path={MODEL!r}).num_hidden_layers == 4"
SPLIT = f"assert len(AutoTokenizer.from_pretrained(None, gguf_path={MODEL!r})) == 512"


def in_fresh_process(code: str) -> Any:
    """What ``code`` leaves in ``said``."""
    lines = f"import sys\n{code}\nimport json\nprint(json.dumps(said))"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "code",
    [
        f"import transformers_kt\nfrom transformers import AutoModelForCausalLM\n{LOAD}",
        f"from transformers import AutoModelForCausalLM\nimport transformers_kt\n{LOAD}",
        f"import transformers\nimport transformers_kt\nfrom transformers import AutoModelForCausalLM\n{LOAD}",
        f"import transformers_kt\nfrom transformers import AutoTokenizer\n{SPLIT}",
        f"from transformers import AutoTokenizer\nimport transformers_kt\n{SPLIT}",
        f"import transformers_kt\nfrom transformers import AutoConfig\n{READ}",
        "import transformers_kt, transformers_kt.integration.from_pretrained\n"
        f"from transformers import AutoModelForCausalLM, AutoConfig, AutoTokenizer\n{LOAD}\n{READ}\n{SPLIT}",
        "import importlib, transformers_kt\nimportlib.reload(transformers_kt)\n"
        f"from transformers import AutoModelForCausalLM\nimportlib.reload(transformers_kt)\n{LOAD}",
        "import importlib, transformers_kt\nfrom transformers.models.auto import tokenization_auto\n"
        f"AutoTokenizer = importlib.reload(tokenization_auto).AutoTokenizer\n{SPLIT}",
    ],
    ids=lambda code: code.replace("\n", "; ")[:70],
)
def test_the_order_of_imports_does_not_matter(code: str) -> None:
    in_fresh_process(f"{code}\nsaid = None")


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    """Measured: 0.2 s and 27 MB of Python, numpy and the gguf package."""
    said = in_fresh_process(
        # The peak of this program alone: that of getrusage counts what the process was before it.
        "import transformers_kt\nfacts = dict(line.split(':') for line in open('/proc/self/status'))\n"
        "said = [int(facts['VmHWM'].split()[0]) / 1024, sorted(sys.modules)]"
    )
    megabytes, modules = said
    assert not {"torch", "transformers", "huggingface_hub.hf_api"} & set(modules)
    assert megabytes < 100


def test_every_public_name_is_there_when_asked_for() -> None:
    import transformers_kt

    for name in transformers_kt.__all__:
        assert getattr(transformers_kt, name) is not None
        assert name in dir(transformers_kt)
    with pytest.raises(AttributeError, match="no attribute 'KtConfg'"):
        transformers_kt.KtConfg  # noqa: B018


def test_a_module_of_transformers_keeps_its_loader_and_its_source() -> None:
    said = in_fresh_process(
        "import inspect, transformers_kt\nfrom transformers.models.auto import tokenization_auto as module\n"
        "said = [type(module.__loader__).__name__, 'class AutoTokenizer' in inspect.getsource(module)]"
    )
    assert said == ["SourceFileLoader", True]


def test_a_saved_config_of_ours_is_refused_in_our_words_without_our_arguments(tmp_path: Any) -> None:
    said = in_fresh_process(
        f"""
import json, pathlib, transformers_kt
facts = json.loads(pathlib.Path({MODEL!r}, "config.json").read_text())
folder = pathlib.Path({str(tmp_path)!r})
(folder / "config.json").write_text(json.dumps({{**facts, "quantization_config": {{"quant_method": "kt"}}}}))
(folder / "model.safetensors").write_bytes(bytes([2, 0, 0, 0, 0, 0, 0, 0]) + b"{{}}")
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(folder)
except transformers_kt.KtError as error:
    said = str(error)
"""
    )
    assert "Name it with gguf_path=" in said
