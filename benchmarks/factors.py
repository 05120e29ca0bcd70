"""f4, f8 or f16? The seed's experiment: autoencoders of like size trained for equal time on pictures of 128 pixels.

    python benchmarks/factors.py --data FOLDER --minutes 10 --out DIR
    python evaluate.py recon --data FOLDER --vq DIR/f4/last.pt DIR/f8/last.pt DIR/f16/last.pt --out DIR

The networks are those of the presets base, f8 and f16 at a quarter of their width and without norms, with the recipe
of the small preset: 3.5, 3.4 and 3.5 million parameters. The results stand in benchmarks/RESULTS.md.
"""
from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402

SIZE, CH, K = 128, 32, 4096
PRESET_OF = {"f4": "base", "f8": "f8", "f16": "f16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", required=True, help="folder for the runs")
    parser.add_argument("--factors", nargs="+", choices=PRESET_OF, default=list(PRESET_OF))
    args = parser.parse_args()
    for name in args.factors:
        flags = {"--stage": "vq", "--preset": "small", "--data": args.data, "--minutes": args.minutes,
                 "--out": Path(args.out) / name}
        c = train.make_config(train.parse_args([str(word) for pair in flags.items() for word in pair]))
        vq_config = replace(train.PRESETS[PRESET_OF[name]].vq_config, ch=CH, n_embed=K, resolution=SIZE,
                            **train.NORM_FREE)
        train.train_vq(replace(c, vq_config=vq_config))


if __name__ == "__main__":
    main()
