"""Float32 results on a CPU do not depend on batch, slice, threads or actors, whatever the kernels.

tests/same_bits.py says what is compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest

ROOT = Path(__file__).parent.parent
# What torch's own loops, oneDNN and MKL may use of the CPU; each chooses other kernels.
SETTINGS = {
    "all": {},
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "SSE": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Odd widths; and a layer of each of CLIPSeg's own shapes, with the kernels of a job."""
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    layer = {"num_hidden_layers": 1}
    wide = {"projection_dim": 512, "reduce_dim": 64, "decoder_num_attention_heads": 4}
    wide |= {"decoder_intermediate_size": 2048, "use_complex_transposed_convolution": True}
    wide |= {"extract_layers": [0]}
    full = checkpoints.clipseg_config(text | layer, vision | layer, **wide)
    folders = []
    # Of 26 tokens and 50, as a CLIP B/32 has: images run in groups; of 101: alone.
    for name, config, side in (("small", None, 80), ("groups", full, 112), ("wide", full, 160)):
        folder = tmp_path_factory.mktemp("models") / name
        checkpoints.save(checkpoints.small_clipseg(config), folder)
        checkpoints.write_vocabulary(folder)
        processor = {"image_processor_type": "ViTImageProcessor", "size": side}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        folders.append(folder)
    return folders


@pytest.mark.parametrize("setting", SETTINGS)
def test_results_are_the_same_to_the_last_bit(setting: str, models: list[Path]) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | SETTINGS[setting]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/same_bits.py"), *map(str, models)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
