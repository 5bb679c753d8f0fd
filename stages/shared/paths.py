"""Paths of outputs that other stages read; a test compares them with dvc.yaml."""

from pathlib import Path

RAW = Path("data/raw")
RETENTION = Path("data/retention")
PREPARED = Path("data/prepared")
BASE = Path("models/base")
TOKENIZER = Path("models/tokenizer")
QUANTIZED = Path("models/quantized")
ADAPTER = Path("models/adapter")
MERGED = Path("models/merged")
