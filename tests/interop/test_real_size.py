"""The paper's 1B model at full size with random weights: memory of the import, and the same logits in PyTorch.

    make test-large

Each step runs in a process of its own, so that its memory can be measured. The test needs 20 GB of memory and 25 GB of
disk, and prints its results as JSON.
"""

import json
import os
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

from tests.interop import real_size

# Frame of the programs below. It samples anonymous memory 50 times per second; the base is the memory after imports.
MEASURED = """
import json, sys, threading, time
import jax
{imports}
jax.devices()

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

base = peak = anonymous()

def sample():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.02)

threading.Thread(target=sample, daemon=True).start()
start_time = time.monotonic()
{work}
seconds = round(time.monotonic() - start_time)
print(json.dumps({{"seconds": seconds, "base_gb": base / 1e9, "peak_over_base_gb": (peak - base) / 1e9}}))
"""

IMPORT = MEASURED.format(
    imports="from alignvlm_jax.interop.import_hf import import_huggingface",
    work="""
vision, language, out, dtype = sys.argv[1:]
import_huggingface(vision, language, out, dtype=dtype, max_tiles=1, log=lambda note: None)
""",
)

RUN_JAX = MEASURED.format(
    imports="""
import dataclasses
import numpy as np
from alignvlm_jax.data.images import open_image
from alignvlm_jax.inference.generate import pad_prompts
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.models.alignvlm import AlignVLM
from alignvlm_jax.checkpoints.weights import restore_params
from alignvlm_jax.checkpoints.workdir import read_run_config
""",
    work="""
source, page, out = sys.argv[1:]
config = read_run_config(source)
model = dataclasses.replace(
    config.model,
    vision=dataclasses.replace(config.model.vision, dtype="float32"),
    language=dataclasses.replace(config.model.language, dtype="float32"),
)
params = restore_params(source)
chat = ChatTokenizer.from_folder(source + "/tokenizer")
(prompt,) = Reader(model, params, chat, config.data.tiling).prompts(open_image(page), ["What is the total?"])
batch = pad_prompts([prompt], rows=1, tile_size=model.vision.image_size, pad_id=chat.pad_id)
logits = jax.jit(AlignVLM(model).apply)({"params": params}, batch).logits[0, : len(prompt.tokens)]
np.savez(out, tokens=prompt.tokens, logits=np.asarray(logits[::16]), last=np.asarray(logits[-8:]))
""",
)

RUN_TORCH = MEASURED.format(
    imports="import numpy as np, PIL.Image, torch, transformers",
    work="""
folder, page, out = sys.argv[1:]
options = {"trust_remote_code": True}
model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options).eval()
processor = transformers.AutoProcessor.from_pretrained(folder, **options)
content = [{"type": "image", "image": PIL.Image.open(page)}, {"type": "text", "text": "What is the total?"}]
inputs = processor.apply_chat_template(
    [[{"role": "user", "content": content}]],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
with torch.no_grad():
    logits = model(**inputs).logits[0]
np.savez(out, tokens=inputs["input_ids"][0].numpy(), logits=logits[::16].numpy(), last=logits[-8:].numpy())
""",
)


def run(program: str, *arguments) -> dict:
    """Runs one of the measured programs; returns the measurements that it prints."""
    # The XLA flags of the tests are removed: they make compilation fast and programs slow.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """So400m/14 at 384 px and Llama-3.2-1B in bfloat16 shards; deleted after the tests."""
    folder = tmp_path_factory.mktemp("real_size")
    real_size.write_vision(folder / "vision")
    real_size.write_language(folder / "language")
    yield folder
    subprocess.run(["rm", "-r", folder], check=True)


def parameter_bytes(dtype: str) -> int:
    """Returns the size of the two backbones, with transformers' parameter counts, and of ALIGN."""
    words, width, encoder = real_size.LLAMA_1B["vocab_size"], 2048, 1152
    align = encoder * width + width + 2 * width + words * width + 2 * words
    return (1_235_814_400 + real_size.SO400M_PARAMETERS + align) * {"float32": 4, "bfloat16": 2}[dtype]


@pytest.mark.large
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_importing_needs_the_memory_of_the_parameters_and_two_gigabytes(folders, dtype):
    out = folders / f"start_{dtype}"
    figures = run(IMPORT, folders / "vision", folders / "language", out, dtype)
    figures |= {"what": f"import {dtype}", "parameters_gb": parameter_bytes(dtype) / 1e9}
    print(json.dumps(figures))
    assert figures["peak_over_base_gb"] * 1e9 <= parameter_bytes(dtype) + 2e9
    # A smaller value would mean that the parameters were not part of the measurement.
    assert figures["peak_over_base_gb"] * 1e9 >= 0.95 * parameter_bytes(dtype)


@pytest.mark.large
def test_one_image_gives_the_same_logits_in_jax_and_in_pytorch(folders):
    out = folders / "start_bfloat16"
    if not out.exists():
        run(IMPORT, folders / "vision", folders / "language", out, "bfloat16")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)
    PIL.Image.fromarray(pixels).resize((300, 380)).save(folders / "page.png")
    start_time = time.monotonic()
    export = [sys.executable, "-m", "alignvlm_jax", "export", "--checkpoint", out, "--out", folders / "exported"]
    exported = subprocess.run(export, capture_output=True, text=True)
    assert exported.returncode == 0, exported.stderr[-3000:]
    print(json.dumps({"what": "export bfloat16", "seconds": round(time.monotonic() - start_time)}))
    for name, program, source in (("jax", RUN_JAX, out), ("torch", RUN_TORCH, folders / "exported")):
        figures = run(program, source, folders / "page.png", folders / f"{name}.npz")
        print(json.dumps({"what": f"one image, {name}, float32", **figures}))
    ours, theirs = np.load(folders / "jax.npz"), np.load(folders / "torch.npz")
    np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
    errors = {
        name: float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in ("logits", "last")
    }
    print(json.dumps({"what": "relative error of logits", **errors}))
    assert max(errors.values()) < 1e-4
    # Logits that are the same at all positions would prove nothing.
    assert np.std(theirs["last"], axis=0).mean() > 0.01 * np.std(theirs["last"])
