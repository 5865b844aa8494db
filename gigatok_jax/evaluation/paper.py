"""The paper's rows that a probe is compared with (Tables 2 and 10): AR probing with generator B."""

from typing import NamedTuple


class Row(NamedTuple):
    """One tokenizer of the paper.

    Attributes:
      name: as the paper has it.
      source: the table.
      million_parameters: of the tokenizer.
      metrics: by our names; `linear_accuracy` as a share.
    """

    name: str
    source: str
    million_parameters: int | None
    metrics: dict[str, float]


def _row(name: str, source: str, size: int | None, **metrics: float) -> Row:
    return Row(name, source, size, metrics)


# Table 2 trains each tokenizer for 100 epochs; Tables 3 and 10 for the lengths of Table 9.
ROWS = (
    _row("B-S", "Table 2", None, rfid=0.98, lpips=0.221, gfid=6.56, linear_accuracy=0.645),
    _row("S-B", "Table 2", None, rfid=0.94, lpips=0.214, gfid=5.65, linear_accuracy=0.598),
    _row("S-L", "Table 2", None, rfid=0.83, lpips=0.206, gfid=5.19, linear_accuracy=0.606),
    _row("B-L", "Table 2", None, rfid=0.81, lpips=0.206, gfid=4.82, linear_accuracy=0.669),
    _row(
        "LlamaGen-Tok.",
        "Table 10",
        72,
        rfid=2.19,
        psnr=20.79,
        ssim=0.675,
        gfid=5.46,
        inception_score=193.61,
        precision=0.83,
        recall=0.45,
    ),
    _row(
        "S-S",
        "Tables 3, 10",
        136,
        rfid=1.01,
        lpips=0.2226,
        psnr=20.74,
        ssim=0.670,
        gfid=4.05,
        linear_accuracy=0.626,
        inception_score=240.61,
        precision=0.81,
        recall=0.51,
    ),
    _row(
        "S-B",
        "Tables 3, 10",
        232,
        rfid=0.89,
        lpips=0.2121,
        psnr=20.93,
        ssim=0.677,
        gfid=3.83,
        linear_accuracy=0.629,
        inception_score=233.31,
        precision=0.83,
        recall=0.51,
    ),
    _row(
        "B-L",
        "Tables 3, 10",
        622,
        rfid=0.81,
        lpips=0.2059,
        psnr=21.21,
        ssim=0.685,
        gfid=3.26,
        linear_accuracy=0.676,
        inception_score=221.02,
        precision=0.81,
        recall=0.56,
    ),
    _row(
        "B-L, DINO discriminator",
        "Tables 3, 10",
        622,
        rfid=0.51,
        lpips=0.206,
        psnr=21.32,
        ssim=0.691,
        gfid=3.33,
        linear_accuracy=0.677,
        inception_score=265.43,
        precision=0.80,
        recall=0.56,
    ),
    _row(
        "XL-XXL",
        "Tables 3, 10",
        2_900,
        rfid=0.79,
        lpips=0.1947,
        psnr=21.65,
        ssim=0.699,
        gfid=3.15,
        linear_accuracy=0.720,
        inception_score=224.28,
        precision=0.82,
        recall=0.55,
    ),
)
