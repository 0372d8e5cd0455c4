"""How official scorers read folders of images, written after their code, without their models.

Each reader gives what its scorer would score: pairs of a prompt and an image. It fails where the
scorer would fail, count wrongly, or read something that is no image.
"""

import io
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

Pairs = list[tuple[str, np.ndarray]]


def names(folder: Path) -> list[str]:
    """os.listdir, which their code calls, in an order."""
    return sorted(file.name for file in folder.iterdir())


def pixels(file: Path | io.BytesIO) -> np.ndarray:
    with Image.open(file) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def geneval(folder: Path) -> Pairs:
    """djghosh13/geneval, evaluation/evaluate_images.py, main; evaluate_image reads `tag` and
    `prompt` of the metadata."""
    found = []
    for name in names(folder):
        place = folder / name
        if not place.is_dir() or not name.isdigit():
            continue
        metadata = json.loads((place / "metadata.jsonl").read_text())
        assert metadata["tag"]
        for image in names(place / "samples"):
            if re.match(r"\d+\.png", image):
                found.append((metadata["prompt"], pixels(place / "samples" / image)))
    return found


def dpg(folder: Path, resolution: int, prompts: dict[str, str]) -> Pairs:
    """TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py: PIC_NUM=4; keys as in dpg_bench.csv.

    An exception there leaves the picture out with a line; here it is one."""
    found, r = [], resolution
    for name in names(folder):
        picture = Image.open(folder / name)
        assert picture.size == (2 * r, 2 * r)  # else a crop would be filled up with black
        key = name.split(".")[0]
        for box in ((0, 0, r, r), (r, 0, 2 * r, r), (0, r, r, 2 * r), (r, r, 2 * r, 2 * r)):
            found.append((prompts[key], np.asarray(picture.crop(box))))
    return found


def t2i_compbench(out_dir: Path) -> Pairs:
    """Karine-Huang/T2I-CompBench: BLIP_vqa.py and CLIP_similarity.py, and UniDet's Dataset, which
    must put files into the same order; question ids have to count them, as 3_in_1.py adds up."""
    files = names(out_dir / "samples")
    blip = sorted(files, key=lambda x: int(x.split("_")[-1].split(".")[0]))
    unidet = sorted(files, key=lambda x: int(x.split("_")[1].split(".")[0]))
    assert blip == unidet
    ids = [int(name.split(".png")[0].split("_")[1]) for name in blip]  # numeracy_eval.py
    assert ids == list(range(len(ids)))
    return [(name.split("_")[0], pixels(out_dir / "samples" / name)) for name in blip]


def hpsv2(folder: Path, benchmark: Path) -> Pairs:
    """tgxs002/HPSv2, hpsv2/evaluation.py: evaluate_benchmark and BenchmarkDataset, which leaves
    out what is missing with a line; here that is an error."""
    return [
        (prompt, pixels(folder / style / f"{i:05d}.jpg"))
        for style in names(folder)
        for i, prompt in enumerate(json.loads((benchmark / f"{style}.json").read_text()))
    ]


def imagereward(img_dir: Path, model: str, prompts_path: Path) -> Pairs:
    """THUDM/ImageReward, test-benchmark.py, which counts whatever is in the folder."""
    items = json.loads(prompts_path.read_text())
    assert [name.strip() for name in model.split(",")] == [model]
    count = len(names(img_dir / model))
    each = count // len(items)
    assert each * len(items) == count
    return [
        (item["prompt"], pixels(img_dir / model / f"{item['id']}_{n}.png"))
        for item in items
        for n in range(each)
    ]
