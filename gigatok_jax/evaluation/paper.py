"""The paper's rows that a probe is set beside.

Tables 2 and 5 are AR probing (3.1): a generator B of 111M parameters, 50 epochs, constant guidance.
Table 2's tokenizers were trained for 100 epochs. Tables 3 and 10 are the system-level comparison
(5.4, appendix B): the same generator for 300 epochs, its guidance a step function, on tokenizers
trained as Table 9 says. Their gFID, Inception Score, precision, recall and accuracy are not those
of AR probing. The tokenizers' sizes are Table 9's, which lacks B-S.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """One tokenizer of the paper.

    Attributes:
      name: as the paper has it.
      source: the tables.
      epochs: that generator B was trained for, and
      schedule: of its guidance; None and "": not said.
      million_parameters: of the tokenizer; None: not said.
      metrics: by our names; `linear_accuracy` as a share. SSIM is `ssim_range_2`, because the
        reference program passes scikit-image a data_range of 2.
    """

    name: str
    source: str
    epochs: int | None
    schedule: str
    million_parameters: int | None
    metrics: dict[str, float]


def _probed(name: str, source: str, size: int | None, **metrics: float) -> Row:
    return Row(name, source, 50, "constant", size, metrics)


def _compared(name: str, size: int, **metrics: float) -> Row:
    return Row(name, "Tables 3, 10", 300, "step", size, metrics)


ROWS = (
    _probed("S-S", "Table 5", 136, rfid=1.01, lpips=0.223, gfid=6.10, linear_accuracy=0.619),
    _probed("B-S", "Table 2", None, rfid=0.98, lpips=0.221, gfid=6.56, linear_accuracy=0.645),
    _probed("S-B", "Table 2", 232, rfid=0.94, lpips=0.214, gfid=5.65, linear_accuracy=0.598),
    _probed("S-L", "Table 2", 533, rfid=0.83, lpips=0.206, gfid=5.19, linear_accuracy=0.606),
    _probed("B-L", "Table 2", 622, rfid=0.81, lpips=0.206, gfid=4.82, linear_accuracy=0.669),
    _compared(
        "S-S",
        136,
        rfid=1.01,
        lpips=0.2226,
        psnr=20.74,
        ssim_range_2=0.670,
        gfid=4.05,
        linear_accuracy=0.626,
        inception_score=240.61,
        precision=0.81,
        recall=0.51,
    ),
    _compared(
        "S-B",
        232,
        rfid=0.89,
        lpips=0.2121,
        psnr=20.93,
        ssim_range_2=0.677,
        gfid=3.83,
        linear_accuracy=0.629,
        inception_score=233.31,
        precision=0.83,
        recall=0.51,
    ),
    _compared(
        "B-L",
        622,
        rfid=0.81,
        lpips=0.2059,
        psnr=21.21,
        ssim_range_2=0.685,
        gfid=3.26,
        linear_accuracy=0.676,
        inception_score=221.02,
        precision=0.81,
        recall=0.56,
    ),
    _compared(
        "B-L, DINO discriminator",
        622,
        rfid=0.51,
        lpips=0.206,
        psnr=21.32,
        ssim_range_2=0.691,
        gfid=3.33,
        linear_accuracy=0.677,
        inception_score=265.43,
        precision=0.80,
        recall=0.56,
    ),
    _compared(
        "XL-XXL",
        2_896,
        rfid=0.79,
        lpips=0.1947,
        psnr=21.65,
        ssim_range_2=0.699,
        gfid=3.15,
        linear_accuracy=0.720,
        inception_score=224.28,
        precision=0.82,
        recall=0.55,
    ),
    Row(
        "LlamaGen-Tok.",
        "Table 10",
        None,
        "",
        72,
        {
            "rfid": 2.19,
            "psnr": 20.79,
            "ssim_range_2": 0.675,
            "gfid": 5.46,
            "inception_score": 193.61,
            "precision": 0.83,
            "recall": 0.45,
        },
    ),
)
