"""Measures how fast images are cut into tiles, per second and core, compared with transformers' image processors.

All contenders cut each image into the same number of tiles of the same size:

    LLaVA-OneVision   384 pixels, its anyres rule; our rule anyres_max_9 cuts the same tiles, pixel by pixel
    Idefics3          364 pixels; our rule ovis, or internvl for small images, with the same number of cells

The image processors convert to RGB, resize, cut, scale and normalize to float32, channels first. Our code checks the
size, turns the image upright, converts to RGB, resizes and cuts. Its pixels stay uint8, because the device normalizes
them. "ours + float32" also normalizes on the host.

The time is the CPU time of one thread. It is measured both from decoded images, where an image processor starts, and
from the bytes of the files, which both sides decode with PIL. The contenders take turns, and the best of several rounds
counts for each image.
"""

import argparse
import io
import platform
import time
from collections.abc import Callable

import numpy as np
import PIL
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import tqdm

from alignvlm_jax.data.images import open_image
from alignvlm_jax.data.rgb import to_rgb
from alignvlm_jax.data.tiling import TilingConfig, cut_tiles, plan_tiles

BAR = 2.0  # required speed relative to the fastest image processor
# Name, width, height and format of each image: scanned pages, pages and charts drawn by a program, photographs.
IMAGES = (
    ("scan, 150 dpi", 1240, 1754, "JPEG"),
    ("scan, 200 dpi", 1654, 2339, "JPEG"),
    ("grey scan, 200 dpi", 1654, 2339, "JPEG"),
    ("page", 1700, 2200, "PNG"),
    ("chart", 800, 600, "PNG"),
    ("photograph", 640, 480, "JPEG"),
    ("photograph", 1024, 768, "JPEG"),
)

Cut = Callable[[PIL.Image.Image], np.ndarray]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--quick", action="store_true", help="smoke test: two small images, one round")
    parser.add_argument("--rounds", type=int, default=5, help="number of timed rounds; the best counts (default: 5)")


def run(args: argparse.Namespace) -> dict | None:
    """Measures, and prints a table for each image processor; returns None if transformers is not installed."""
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f'{error}: the image processors of transformers are missing: pip install -e ".[torch]"')
        return None
    torch.set_num_threads(1)
    processors, torchvision = _processors()
    images = [draw_image(*image, seed=i) for i, image in enumerate(IMAGES)]
    if args.quick:
        images = images[4:6]
    figures = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "transformers": transformers.__version__,
        "torchvision": torchvision,
        "bar": BAR,
        "pictures": [f"{name}, {width} x {height} {kind}" for name, width, height, kind in IMAGES],
    }
    print(f"pillow {PIL.__version__}, transformers {transformers.__version__}, torchvision: {torchvision}")
    for name, (side, backends) in processors.items():
        figures[name] = _compare(name, side, backends, images, rounds=1 if args.quick else args.rounds)
    return figures


def draw_image(name: str, width: int, height: int, kind: str, *, seed: int) -> bytes:
    """Returns an image file that resembles a real one: text, with grain if scanned, or the smooth colors of a photo."""
    generator = np.random.default_rng(seed)
    if name == "photograph":
        colors = generator.integers(0, 256, (height // 40, width // 40, 3), np.uint8)
        image = PIL.Image.fromarray(colors).resize((width, height), PIL.Image.Resampling.BICUBIC)
    else:
        image = PIL.Image.new("RGB", (width, height), "white")
        draw, font = PIL.ImageDraw.Draw(image), PIL.ImageFont.load_default(height // 90)
        for y in range(height // 20, height - height // 20, height // 60):
            words = ["".join(chr(c) for c in generator.integers(97, 123, n)) for n in generator.integers(1, 11, 11)]
            draw.text((width // 20, y), " ".join(words), fill=(20, 20, 40), font=font)
    if name.startswith("grey"):
        image = image.convert("L")
    if kind == "JPEG":
        grain = generator.normal(0, 4, (height, width, 1)[: len(np.shape(image))])
        image = PIL.Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def _processors() -> tuple[dict[str, tuple[int, dict[str, Cut]]], str]:
    """Returns the tile size and the processors of each model, by backend, and torchvision's version or its error."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    llava, idefics = {"PIL": LlavaOnevisionImageProcessorPil()}, {"PIL": Idefics3ImageProcessorPil()}
    try:
        import torchvision
        from transformers.models.idefics3.image_processing_idefics3 import Idefics3ImageProcessor
        from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor

        llava["torchvision"], idefics["torchvision"] = LlavaOnevisionImageProcessor(), Idefics3ImageProcessor()
        version = torchvision.__version__
    except (ImportError, RuntimeError) as error:  # RuntimeError: a build for another version of torch
        version = f"not available ({str(error).splitlines()[0]})"

    def cuts(backends):
        def cut(processor):
            return lambda image: np.asarray(processor(image, return_tensors="pt")["pixel_values"][0])

        return {name: cut(processor) for name, processor in backends.items()}

    return {"LLaVA-OneVision": (384, cuts(llava)), "Idefics3": (364, cuts(idefics))}, version


def _compare(name: str, side: int, backends: dict[str, Cut], files: list[bytes], *, rounds: int) -> dict:
    """Times all contenders on the tiles of one model; prints a table and returns the results."""
    # The image processor decides the number of tiles. Our rule is configured to cut as many.
    decoded = [_open_ours(file) for file in files]
    counts = [len(backends["PIL"](image)) for image in decoded]
    plans = [_config(name, side, image.size, count) for image, count in zip(decoded, counts, strict=True)]

    def ours(image, config):
        return cut_tiles(to_rgb(image, keep_gray=True), plan_tiles(*image.size, config), side)[0]

    def ours_float(image, config):
        tiles = ours(image, config).transpose(0, 3, 1, 2)
        return np.multiply(tiles, 1 / 127.5, dtype=np.float32, order="C") - np.float32(1)

    contenders = {f"theirs, {backend}": (lambda image, _, cut=cut: cut(image)) for backend, cut in backends.items()}
    contenders |= {"ours": ours, "ours + float32": ours_float}

    # Best CPU time of each contender and image.
    best = {contender: np.full((2, len(files)), np.inf) for contender in contenders}
    for _ in tqdm.trange(rounds, desc=name, leave=False):
        for i, config in enumerate(plans):
            for contender, cut in contenders.items():
                open_file = _open_ours if contender.startswith("ours") else _open_theirs
                # Row 0: from decoded images. Row 1: from files.
                for row, source in enumerate((decoded[i], files[i])):
                    start = time.process_time()
                    tiles = cut(open_file(source) if row else source, config)
                    best[contender][row, i] = min(best[contender][row, i], time.process_time() - start)
                    assert len(tiles) == counts[i], (contender, len(tiles), counts[i])

    # Tiles per second over all images, and the ratio to the fastest image processor.
    rates = {contender: (sum(counts) / seconds.sum(axis=1)).tolist() for contender, seconds in best.items()}
    fastest = [max(rate[row] for contender, rate in rates.items() if contender[:4] != "ours") for row in range(2)]
    print(f"\n{name}: {sum(counts)} tiles of {side} x {side} ({', '.join(map(str, counts))})")
    print(f"{'tiles/s and core':<22}{'from images':>14}{'from files':>12}")
    for contender, rate in rates.items():
        print(f"{contender:<22}{rate[0]:>14.0f}{rate[1]:>12.0f}")
    ratios = {c: [rates[c][row] / fastest[row] for row in range(2)] for c in rates if c[:4] == "ours"}
    for contender, (from_images, from_files) in ratios.items():
        print(f"{contender + ' / theirs':<22}{from_images:>14.1f}{from_files:>12.1f}")
    is_met = ratios["ours"][0] >= BAR
    print(f"target: {BAR:g} times the fastest image processor: {'met' if is_met else 'missed'}")
    keys = ("from_pictures", "from_files")
    return {
        "tile_size": side,
        "tiles": counts,
        "rules": [config.rule for config in plans],
        "tiles_per_second_and_core": {c: dict(zip(keys, rate, strict=True)) for c, rate in rates.items()},
        "ratio": {c: dict(zip(keys, ratio, strict=True)) for c, ratio in ratios.items()},
        "met": is_met,
    }


def _open_ours(file: bytes) -> PIL.Image.Image:
    return open_image(file, keep_gray=True)


def _open_theirs(file: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(file))


def _config(name: str, side: int, size: tuple[int, int], count: int) -> TilingConfig:
    """Returns a config that cuts an image of this size into `count` tiles."""
    if name == "LLaVA-OneVision":
        return TilingConfig("anyres_max_9", side)
    for rule in ("ovis", "internvl"):
        for max_tiles in range(1, count + 1):
            config = TilingConfig(rule, side, max_tiles)
            if plan_tiles(*size, config).num_tiles == count:
                return config
    raise ValueError(f"no rule cuts {count} tiles from {size[0]} x {size[1]}")
