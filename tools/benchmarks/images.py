"""Pictures into tiles: tiles a second and core, beside the image processors of transformers on the same pictures.

What is compared makes the same number of tiles of each picture, of the same size:

    LLaVA-OneVision   384 pixels, its anyres rule; ours by the rule anyres_max_9 are the same tiles, pixel by pixel
    Idefics3          364 pixels; ours by the rule ovis, or internvl for small pictures, with as many cells

Theirs convert to RGB, resize, cut, and also scale and normalise to float32, channels first. Ours check the size, turn
upright, convert to RGB, resize and cut; pixels stay uint8, for the device normalises them. "+ float32" is ours with
that done on the host as well. Time is the processor's (one thread): once from decoded pictures, all that an image
processor does, and once from the bytes of the files, where both decode with PIL. The best of several rounds counts,
picture by picture; what is compared takes turns.
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

BAR = 2.0
# name, width, height, format: pages scanned at 150 and 200 dpi, pages and charts drawn by a program, photographs.
PICTURES = (
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
    parser.add_argument("--quick", action="store_true", help="two small pictures, one round: does everything run")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed; the best counts")


def run(args: argparse.Namespace) -> dict | None:
    """Measures, prints a table for each image processor."""
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f'{error}: the image processors to compare with need torch and transformers: pip install -e ".[torch]"')
        return None
    torch.set_num_threads(1)
    processors, torchvision = _processors()
    pictures = [draw_picture(*picture, seed=i) for i, picture in enumerate(PICTURES)]
    if args.quick:
        pictures = pictures[4:6]
    figures = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "transformers": transformers.__version__,
        "torchvision": torchvision,
        "bar": BAR,
        "pictures": [f"{name}, {width} x {height} {kind}" for name, width, height, kind in PICTURES],
    }
    print(f"pillow {PIL.__version__}, transformers {transformers.__version__}, torchvision: {torchvision}")
    for name, (side, backends) in processors.items():
        figures[name] = _compare(name, side, backends, pictures, rounds=1 if args.quick else args.rounds)
    return figures


def draw_picture(name: str, width: int, height: int, kind: str, *, seed: int) -> bytes:
    """A file like those that come: print on paper, grained where it was scanned, or a photograph's smooth colours."""
    generator = np.random.default_rng(seed)
    if name == "photograph":
        colours = generator.integers(0, 256, (height // 40, width // 40, 3), np.uint8)
        image = PIL.Image.fromarray(colours).resize((width, height), PIL.Image.Resampling.BICUBIC)
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
    """For each model its tiles' side and its processors by backend; and torchvision's version or what is wrong."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    llava, idefics = {"PIL": LlavaOnevisionImageProcessorPil()}, {"PIL": Idefics3ImageProcessorPil()}
    try:
        import torchvision
        from transformers.models.idefics3.image_processing_idefics3 import Idefics3ImageProcessor
        from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor

        llava["torchvision"], idefics["torchvision"] = LlavaOnevisionImageProcessor(), Idefics3ImageProcessor()
        found = torchvision.__version__
    except (ImportError, RuntimeError) as error:  # RuntimeError: a build for another torch
        found = f"not here ({str(error).splitlines()[0]})"

    def cuts(backends):
        def cut(processor):
            return lambda image: np.asarray(processor(image, return_tensors="pt")["pixel_values"][0])

        return {name: cut(processor) for name, processor in backends.items()}

    return {"LLaVA-OneVision": (384, cuts(llava)), "Idefics3": (364, cuts(idefics))}, found


def _compare(name: str, side: int, backends: dict[str, Cut], files: list[bytes], *, rounds: int) -> dict:
    decoded = [_open_ours(file) for file in files]
    counts = [len(backends["PIL"](image)) for image in decoded]
    plans = [_config(name, side, image.size, count) for image, count in zip(decoded, counts, strict=True)]

    def ours(image, config):
        return cut_tiles(to_rgb(image, keep_grey=True), plan_tiles(*image.size, config), side)[0]

    def ours_float(image, config):
        tiles = ours(image, config).transpose(0, 3, 1, 2)
        return np.multiply(tiles, 1 / 127.5, dtype=np.float32, order="C") - np.float32(1)

    contenders = {f"theirs, {backend}": (lambda image, _, cut=cut: cut(image)) for backend, cut in backends.items()}
    contenders |= {"ours": ours, "ours + float32": ours_float}
    best = {contender: np.full((2, len(files)), np.inf) for contender in contenders}
    for _ in tqdm.trange(rounds, desc=name, leave=False):
        for i, config in enumerate(plans):
            for contender, cut in contenders.items():
                opened = _open_ours if contender.startswith("ours") else _open_theirs
                for row, source in enumerate((decoded[i], files[i])):
                    start = time.process_time()
                    tiles = cut(opened(source) if row else source, config)
                    best[contender][row, i] = min(best[contender][row, i], time.process_time() - start)
                    assert len(tiles) == counts[i], (contender, len(tiles), counts[i])
    rates = {contender: (sum(counts) / seconds.sum(axis=1)).tolist() for contender, seconds in best.items()}
    fastest = [max(rate[row] for contender, rate in rates.items() if contender[:4] != "ours") for row in range(2)]
    print(f"\n{name}: {sum(counts)} tiles of {side} x {side} ({', '.join(map(str, counts))})")
    print(f"{'tiles/s and core':<22}{'from pictures':>14}{'from files':>12}")
    for contender, rate in rates.items():
        print(f"{contender:<22}{rate[0]:>14.0f}{rate[1]:>12.0f}")
    ratios = {c: [rates[c][row] / fastest[row] for row in range(2)] for c in rates if c[:4] == "ours"}
    for contender, (pictures, whole) in ratios.items():
        print(f"{contender + ' / theirs':<22}{pictures:>14.1f}{whole:>12.1f}")
    met = ratios["ours"][0] >= BAR
    print(f"bar: {BAR:g} times the fastest image processor: {'met' if met else 'missed'}")
    keys = ("from_pictures", "from_files")
    return {
        "tile_size": side,
        "tiles": counts,
        "rules": [config.rule for config in plans],
        "tiles_per_second_and_core": {c: dict(zip(keys, rate, strict=True)) for c, rate in rates.items()},
        "ratio": {c: dict(zip(keys, ratio, strict=True)) for c, ratio in ratios.items()},
        "met": met,
    }


def _open_ours(file: bytes) -> PIL.Image.Image:
    return open_image(file, keep_grey=True)


def _open_theirs(file: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(file))


def _config(name: str, side: int, size: tuple[int, int], count: int) -> TilingConfig:
    """Settings under which ours are `count` tiles too."""
    if name == "LLaVA-OneVision":
        return TilingConfig("anyres_max_9", side)
    for rule in ("ovis", "internvl"):
        for max_tiles in range(1, count + 1):
            config = TilingConfig(rule, side, max_tiles)
            if plan_tiles(*size, config).num_tiles == count:
                return config
    raise ValueError(f"no rule makes {count} tiles of {size[0]} x {size[1]}")
