"""How many JPEGs a core decodes and scales per second: data/decode.py beside simplejpeg.

    pip install simplejpeg
    python benchmarks/decode.py

Both use libjpeg-turbo. simplejpeg decodes JPEGs alone, and knows neither EXIF data nor colour
profiles; so it gets the same scaling of PIL's after it, and the same reduction by JPEG's own means.
The pictures are noise with the spectrum of photographs (amplitude 1 / frequency), of quality 90.
Seconds are those of the processor, for one thread.
"""

import io

import numpy as np
import simplejpeg
from PIL import Image
from timing import finish, measure, parser, table

from d2m_jax.data.decode import decode

# Height and width of the file, and of what it is to become.
CASES = (
    ((512, 512), (512, 512)),
    ((768, 1024), (512, 672)),
    ((1536, 2048), (896, 1152)),
    ((3000, 4000), (896, 1152)),
    ((3000, 4000), (256, 336)),
)


def photograph(height: int, width: int) -> bytes:
    """A JPEG that costs what a photograph of this size does."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    channels = []
    for _ in range(3):
        phase = np.exp(2j * np.pi * rng.random(frequency.shape))
        channel = np.fft.irfft2(phase / frequency, (height, width))
        channels.append(128 + 50 * channel / channel.std())
    grey = np.mean(channels, axis=0)
    pixels = np.stack([0.7 * grey + 0.3 * channel for channel in channels], -1)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def by_simplejpeg(content: bytes, size: tuple[int, int]) -> np.ndarray:
    """What `decode` does of a plain JPEG."""
    least = 2 * max(size)
    pixels = simplejpeg.decode_jpeg(content, min_height=least, min_width=least)
    height, width = size
    scale = max(height / pixels.shape[0], width / pixels.shape[1])
    kept = height / scale, width / scale
    top, left = (pixels.shape[0] - kept[0]) / 2, (pixels.shape[1] - kept[1]) / 2
    box = (left, top, left + kept[1], top + kept[0])
    image = Image.fromarray(pixels)
    filters = Image.Resampling.LANCZOS
    return np.asarray(image.resize((width, height), filters, box=box, reducing_gap=3.0))


def main() -> None:
    options = parser(__doc__, rounds=11).parse_args()

    def rows():
        for stored, size in CASES:
            content = photograph(*stored)
            calls = {
                ("decode",): lambda content=content, size=size: decode(content, size).pixels,
                ("simplejpeg",): lambda content=content, size=size: by_simplejpeg(content, size),
                ("bare",): lambda content=content: simplejpeg.decode_jpeg(content),
            }
            times = measure(calls, options.rounds)
            ours, theirs = (calls[key,]().astype(int) for key in ("decode", "simplejpeg"))
            yield {
                "file": "{} × {}".format(*stored),
                "kB": len(content) / 1000,
                "to": "{} × {}".format(*size),
                "decode, images/s": 1 / times["decode",].cores,
                "simplejpeg + PIL": 1 / times["simplejpeg",].cores,
                "ratio": times["simplejpeg",].cores / times["decode",].cores,
                "simplejpeg, no scaling": 1 / times["bare",].cores,
                "largest difference": int(np.abs(ours - theirs).max()),
            }

    columns = {
        "file": "<12",
        "kB": "6.0f",
        "to": "<12",
        "decode, images/s": "8.1f",
        "simplejpeg + PIL": "8.1f",
        "ratio": "5.2f",
        "simplejpeg, no scaling": "8.1f",
        "largest difference": "4d",
    }
    finish(options, table(columns, rows()))


if __name__ == "__main__":
    main()
