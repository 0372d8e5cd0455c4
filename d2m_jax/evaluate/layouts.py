"""The folders that official scorers read, from the prompt files that belong to them.

Written after the scorers' own code: djghosh13/geneval (evaluation/evaluate_images.py),
TencentQQGYLab/ELLA (dpg_bench/compute_dpg_bench.py), Karine-Huang/T2I-CompBench (BLIPvqa_eval,
UniDet_eval, CLIPScore_eval, 3_in_1_eval), tgxs002/HPSv2 (hpsv2/evaluation.py), THUDM/ImageReward
(test-benchmark.py).
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2m_jax.config import ConfigError, check, suggestion
from d2m_jax.sampling.options import captions_of

CATEGORIES = (
    *("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex"),
)
STYLES = ("anime", "concept-art", "paintings", "photo")
LONGEST = 255  # bytes of a file's name


@dataclass(frozen=True)
class Picture:
    """One file: an image, or a grid without gaps of four, row by row."""

    file: str  # within the folder that the scorer is given
    prompt: str
    images: tuple[int, ...]  # their numbers, from which their noise follows


@dataclass(frozen=True)
class Layout:
    """All that is in one scorer's folder."""

    pictures: list[Picture]
    texts: dict[str, str]  # other files that it reads, by name
    command: str  # that scores them, in a checkout of the scorer; {folder} is the folder

    @property
    def prompts(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys(picture.prompt for picture in self.pictures))


@dataclass(frozen=True)
class Scorer:
    """One that reads a layout."""

    read: Callable[[Path, int, str], Layout]  # of its prompts, images per prompt, model's name
    each: int  # images per prompt in its paper or code
    fixed: bool = False  # whether it takes no other number
    square: bool = False


def layout(scorer: str, prompts: Path, each: int | None = None, name: str = "model") -> Layout:
    """The folder of a scorer, one of SCORERS, for the prompts in its own file or folder.

    `each`: images per prompt (None: as many as its paper has); `name`: how ImageReward calls the
    model. ConfigError names the file and line where the prompts are something else.
    """
    expected = f"expected {', '.join(SCORERS)}"
    check(scorer in SCORERS, f"{scorer}: no scorer{suggestion(scorer, SCORERS)} ({expected})")
    mine = SCORERS[scorer]
    each = mine.each if each is None else each
    check(each >= 1, f"images_per_prompt = {each}: expected at least 1")
    check(
        not mine.fixed or each == mine.each,
        f"images_per_prompt = {each}: {scorer} reads {mine.each}",
    )
    check(prompts.exists(), f"{prompts}: no such file or folder, expected {scorer}'s prompts")
    found = mine.read(prompts, each, name)
    captions_of(found.prompts, str(prompts))
    for picture in found.pictures:
        size = len(Path(picture.file).name.encode())
        check(size <= LONGEST, f"{prompts}: the prompt {picture.prompt!r} is too long for a name")
    return found


def _numbered(
    prompts: list[str], each: int, file: Callable[[int, int], str], first: int = 0
) -> list[Picture]:
    """`each` images of every prompt, in files of their own, numbered from `first`."""
    return [
        Picture(file(i, n), prompt, (first + i * each + n,))
        for i, prompt in enumerate(prompts)
        for n in range(each)
    ]


def _geneval(path: Path, each: int, name: str) -> Layout:
    """Folders of digits, with the line of evaluation_metadata.jsonl and samples."""
    lines = _text(path, "evaluation_metadata.jsonl").rstrip("\n").split("\n")
    prompts = []
    for number, line in enumerate(lines, 1):
        value = _json(line, f"{path}, line {number}")
        for field in ("prompt", "tag"):
            found = isinstance(value, dict) and isinstance(value.get(field), str)
            check(found, f"{path}, line {number}: expected an object with a {field!r}")
        prompts.append(value["prompt"])
    return Layout(
        _numbered(prompts, each, lambda i, n: f"{i:05d}/samples/{n:04d}.png"),
        {f"{i:05d}/metadata.jsonl": f"{line}\n" for i, line in enumerate(lines)},
        'python evaluation/evaluate_images.py "{folder}" --outfile results.jsonl --model-path'
        " DETECTOR && python evaluation/summary_scores.py results.jsonl",
    )


def _dpg(path: Path, each: int, name: str) -> Layout:
    """Grids, named as the files of prompts."""
    check(path.is_dir(), f"{path}: expected the folder dpg_bench/prompts")
    files = sorted(path.glob("*.txt"))
    check(len(files) > 0, f"{path}: expected files of prompts (0.txt, …), found none")
    pictures = []
    for i, file in enumerate(files):
        # The scorer's key ends at the first dot.
        check("." not in file.stem, f"{file}: expected a name with one dot")
        prompt = _text(file, "a prompt").strip()
        check(len(prompt) > 0, f"{file}: expected a prompt, found nothing")
        pictures.append(Picture(f"{file.stem}.png", prompt, tuple(range(i * each, (i + 1) * each))))
    command = 'PIC_NUM=4 bash dpg_bench/dist_eval.sh "{folder}" {side}'
    return Layout(pictures, {}, command)


def _t2i(path: Path, each: int, name: str) -> Layout:
    """A folder for each category, whose images are numbered throughout."""
    files = {category: path / f"{category}_val.txt" for category in CATEGORIES}
    if not path.is_dir():
        files = {path.name.removesuffix(".txt").removesuffix("_val"): path}
        (category,) = files
        expected = "expected a category's file, color_val.txt"
        check(category in CATEGORIES, f"{path}: {expected}, or the folder of them all")
    pictures = []
    for category, file in files.items():
        lines = _text(file, f"the prompts of {category}").splitlines()
        # As GORS_finetune/inference_eval.py reads them.
        prompts = [line.split("\t")[0] for line in lines]
        for number, prompt in enumerate(prompts, 1):
            where = f"{file}, line {number}"
            check(bool(prompt.strip()), f"{where}: expected a prompt, found none")
            bad = next((sign for sign in "_/\0" if sign in prompt), None)
            check(bad is None, f"{where}: found {bad!r}, which no file's name there can have")
        check(
            category != "complex" or each == 10,
            f"images_per_prompt = {each}: T2I-CompBench's 3_in_1.py reads 10 of {file}",
        )
        pictures += _numbered(
            prompts,
            each,
            lambda i, n, p=prompts, c=category: f"{c}/samples/{p[i]}_{i * each + n:06d}.png",
            len(pictures),
        )
    command = 'cd BLIPvqa_eval && python BLIP_vqa.py --out_dir="{folder}/color/"'
    return Layout(pictures, {}, f"{command}, and so on, category by category")


def _hpsv2(path: Path, each: int, name: str) -> Layout:
    """A folder for each style."""
    files = {style: path / f"{style}.json" for style in STYLES}
    if not path.is_dir():
        expected = "expected a style's file, anime.json, or the folder of them all"
        check(path.stem in STYLES, f"{path}: {expected}")
        files = {path.stem: path}
    pictures = []
    for style, file in files.items():
        prompts = _json(_text(file, f"the prompts of {style}"), str(file))
        right = isinstance(prompts, list) and all(isinstance(p, str) for p in prompts)
        check(right and len(prompts) > 0, f"{file}: expected a list of prompts")
        pictures += _numbered(
            prompts, each, lambda i, n, s=style: f"{s}/{i:05d}.jpg", len(pictures)
        )
    command = """python -c 'import hpsv2; hpsv2.evaluate("{folder}", hps_version="v2.1")'"""
    return Layout(pictures, {}, command)


def _imagereward(path: Path, each: int, name: str) -> Layout:
    """A folder of the model's name."""
    good = name not in ("", ".", "..") and not set(name) & set("/,\0") and name.strip() == name
    check(good, f"name = {name!r}: expected a folder's name without commas")
    items = _json(_text(path, "benchmark-prompts.json"), str(path))
    check(isinstance(items, list) and len(items) > 0, f"{path}: expected a list of prompts")
    for i, item in enumerate(items):
        right = isinstance(item, dict) and all(
            isinstance(item.get(field), str) for field in ("id", "prompt")
        )
        check(right, f"{path}[{i}]: expected an object with 'id' and 'prompt'")
        check("/" not in item["id"], f"{path}[{i}].id = {item['id']!r}: no name of a file")
    ids = [item["id"] for item in items]
    twice, times = Counter(ids).most_common(1)[0]
    check(times == 1, f"{path}: the id {twice!r} is there {times} times")
    prompts = [item["prompt"] for item in items]
    pictures = _numbered(prompts, each, lambda i, n: f"{name}/{ids[i]}_{n}.png")
    command = f'python test-benchmark.py --prompts_path "{path}" --img_dir "{{folder}}" --model '
    return Layout(pictures, {}, f'{command}"{name}"')


def _text(file: Path, what: str) -> str:
    check(file.is_file(), f"{file}: no such file, expected {what}")
    try:
        # No newline is lost but those that end lines: CRLF becomes LF, as the scorers read.
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is not UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: expected JSON ({error})") from None


def prompt_files(prompts: list[str], each: int) -> Iterator[Picture]:
    """Images of any prompts, numbered: for those who read our own folders."""
    yield from _numbered(prompts, each, lambda i, n: f"{i * each + n:08d}.png")


SCORERS = {
    "geneval": Scorer(_geneval, 4),
    "dpg": Scorer(_dpg, 4, fixed=True, square=True),
    "t2i-compbench": Scorer(_t2i, 10),
    "hpsv2": Scorer(_hpsv2, 1, fixed=True),
    "imagereward": Scorer(_imagereward, 10),
}
