"""English dialogs from the package chatterbot-corpus: general questions and small talk.

Its YAML files are read as text; no module of the package is imported. Each has categories and
conversations, which are lists of alternating turns.
"""

from pathlib import Path

import yaml


def dialogs(folder: Path) -> list[dict]:
    """Rows {prompt, completion, group}: the first two turns of each conversation.

    `group` is the file's first category. Of several answers to a prompt, the first is kept.
    """
    rows: dict[str, dict] = {}
    for file in sorted(folder.glob("*.yml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        for conversation in content["conversations"]:
            texts = [said.strip() for said in conversation[:2] if isinstance(said, str)]
            if len(texts) == 2 and all(texts):
                row = {"prompt": texts[0], "completion": texts[1]}
                rows.setdefault(texts[0], row | {"group": content["categories"][0]})
    return list(rows.values())
