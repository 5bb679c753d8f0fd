"""Where stages leave what other stages read. dvc.yaml names the same; a test holds the two."""

from pathlib import Path

RAW = Path("data/raw")
RETENTION = Path("data/retention")
PREPARED = Path("data/prepared")
BASE = Path("models/base")
TOKENIZER = Path("models/tokenizer")
QUANTIZED = Path("models/quantized")
ADAPTER = Path("models/adapter")
MERGED = Path("models/merged")
